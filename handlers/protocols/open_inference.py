"""Open Inference Protocol v2 over HTTP: one tensor of images in, a few tensors of verdicts out.

Takes Triton's binary tensors too, which its clients send by default.
Sources: the protocol's REST specification (KServe), "Binary tensor data extension" (Triton).
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from rampart.handlers.errors import ImageError
from rampart.handlers.image import check_count, check_size, from_base64
from rampart.handlers.types import Answer, Pixels, Replier

SHAPE = (
    'send one input: {"name": "image", "datatype": "UINT8", "shape": [N, height, width, 3],'
    ' "data": [...]}, or "BYTES" with one base64 image an element'
)
MAX_ID = 256  # characters of a request's id, which its answer repeats
# What the model's metadata names; it takes pixels, UINT8, as well.
INPUTS = ({"name": "image", "datatype": "BYTES", "shape": [-1]},)
# Datatype of each output, and its value for a verdict; a rejected image has no label.
OUTPUTS = {
    "label": ("BYTES", lambda verdict: verdict["label"] or ""),
    "index": ("INT64", lambda verdict: -1 if verdict["index"] is None else verdict["index"]),
    "confidence": ("FP32", lambda verdict: verdict["confidence"] or 0.0),
    "decision": ("BYTES", lambda verdict: verdict["decision"]),
    "p_value": ("FP32", lambda verdict: verdict["detail"]["p_value"]),
}


def images(body: Mapping[str, Any], binary: bytes) -> Sequence[bytes | Pixels | ImageError]:
    """The images of a request: encoded ones of BYTES, pixels (H, W, 3) of UINT8.

    `binary` is what follows the JSON part. Raises ImageError.
    """
    inputs = body.get("inputs")
    tensor = inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else None
    if not isinstance(tensor, Mapping):
        raise wrong("the request has not exactly one input")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
        raise wrong("its shape is not a list of positive whole numbers")
    name = body.get("id")
    if isinstance(name, str) and len(name) > MAX_ID:
        raise ImageError(422, "id_too_long", f"an id may have {MAX_ID} characters: shorten it")
    if wanted(body) - set(OUTPUTS):
        raise ImageError(422, "unknown_output", f"the outputs that there are: {', '.join(OUTPUTS)}")
    check_count(shape[0] if shape else 0)
    raw = "data" not in tensor
    if tensor.get("datatype") == "UINT8":
        return list(pixels(shape, binary if raw else flat(tensor["data"])))
    if tensor.get("datatype") == "BYTES" and shape[1:] in ([], [1]) and shape:
        return elements(binary, shape[0]) if raw else texts(tensor["data"], shape[0])
    raise wrong("it is neither UINT8 nor BYTES of shape [N] or [N, 1]")


def pixels(shape: Sequence[int], data: bytes) -> Pixels:
    """`data` as uint8 (N, H, W, 3)."""
    if len(shape) != 4 or shape[3] != 3:
        raise wrong("its shape is not [N, height, width, 3]")
    check_size((shape[2], shape[1]))
    if len(data) != int(np.prod(shape, dtype=object)):
        raise wrong("its data has another length than its shape")
    return np.frombuffer(data, np.uint8).reshape(tuple(shape))


def flat(data: object) -> bytes:
    """Numbers 0 to 255, in a flat or nested list, as bytes.

    Without numpy, which would build arrays of any size from hostile lists.
    """
    row = listed(data)
    while row and isinstance(row[0], list):
        row = [item for part in row for item in listed(part)]
    try:
        if set(map(type, row)) <= {int}:  # true and false would pass for numbers
            return bytes(row)  # type: ignore[arg-type]
    except ValueError:  # a number beyond those of a byte
        pass
    raise wrong("its data is not whole numbers from 0 to 255")


def listed(data: object) -> list[object]:
    """`data`, a list."""
    if not isinstance(data, list):
        raise wrong("its data is not a list, or is ragged")
    return data


def texts(data: object, count: int) -> list[bytes | ImageError]:
    """`count` images in base64, in a list or each in a list of its own."""
    row = [part[0] if isinstance(part, list) and len(part) == 1 else part for part in listed(data)]
    if len(row) != count:
        raise wrong("its data has another length than its shape")
    return [from_base64(text) for text in row]


def elements(data: bytes, count: int) -> list[bytes]:
    """`count` byte strings, each after its length in 4 bytes, little end first."""
    out, at = [], 0
    for _ in range(count):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if max(start, at) > len(data):
            raise wrong("its binary data ends within an element")
        out.append(data[start:at])
    if at < len(data):
        raise wrong("its data has another length than its shape")
    return out


def replier(body: Mapping[str, Any]) -> Replier:
    """What answers a request. It keeps little of the body, which may be 25 times as large parsed as
    in bytes."""
    name = body.get("id")
    echo = {"id": name} if isinstance(name, str) and len(name) <= MAX_ID else {}
    return partial(reply, wanted(body), echo)


def reply(names: Collection[str], echo: Mapping[str, str], answers: Sequence[Answer]) -> Answer:
    """The outputs `names`, or all where there are none, as tensors; `echo` is the request's id.

    The protocol has no place for errors next to results, so the first error is the answer.
    """
    for number, (code, answer) in enumerate(answers):
        if code != 200:
            message = (
                f"image {number}: {answer['message']}" if len(answers) > 1 else answer["message"]
            )
            return code, {**echo, **answer, "message": message, "error": message}
    verdicts = [answer for _, answer in answers]
    model = verdicts[0]["model"]
    hidden = set() if "detail" in verdicts[0] else {"p_value"}
    if hidden & set(names):
        message = "this endpoint shows no p_value: ask for the other outputs"
        error = {"code": 422, "type": "unknown_output", "message": message}
        return 422, {**echo, **error, "error": message}
    shown = names or set(OUTPUTS) - hidden
    outputs = [
        {"name": name, "datatype": kind, "shape": [len(verdicts)], "data": [*map(of, verdicts)]}
        for name, (kind, of) in OUTPUTS.items()
        if name in shown
    ]
    return 200, {
        "model_name": model["name"],
        "model_version": model["version"],
        **echo,
        "outputs": outputs,
    }


def wanted(body: Mapping[str, Any]) -> set[str]:
    """Names of the outputs that a request asks for."""
    outputs = body.get("outputs")
    entries = outputs if isinstance(outputs, list) else []
    return {str(e.get("name")) for e in entries if isinstance(e, Mapping)}


def wrong(what: str) -> ImageError:
    """A 422 that says what is wrong and what to send."""
    return ImageError(422, "malformed_tensor", f"{what}: {SHAPE}")
