"""Open Inference Protocol v2 over HTTP: one tensor of images in, a few tensors of verdicts out.

Takes Triton's binary tensors too, which its clients send by default.
Sources: the protocol's REST specification (KServe), "Binary tensor data extension" (Triton).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from rampart.handlers.errors import ImageError
from rampart.handlers.image import check_count, check_size, from_base64
from rampart.handlers.types import Answer, Pixels, Replier

SHAPE = (
    'send one input: {"name": "image", "datatype": "UINT8", "shape": [N, height, width, 3],'
    ' "data": [...]}, or "BYTES" with one base64 image per element'
)
MAX_ID = 256  # characters of a request's id, which its answer repeats
# What the model's metadata names; it takes pixels, UINT8, as well.
INPUTS = ({"name": "image", "datatype": "BYTES", "shape": [-1]},)


class Output(NamedTuple):
    """An output tensor: `of` a verdict one value, or with `sides` a row of them.

    Rows are as long as the longest of a reply, and one at least; `fill` makes them so.
    """

    datatype: str
    of: Callable[[Mapping[str, Any]], Any]
    sides: tuple[int, ...] = ()  # of a row, -1 for its length
    fill: Any = None

    def tensor(self, verdicts: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[Any]]:
        """Shape and flat data."""
        rows = [self.of(verdict) for verdict in verdicts]
        if not self.sides:
            return [len(rows)], rows
        longest = max(1, *map(len, rows))
        each = [[*row, *[self.fill] * (longest - len(row))] for row in rows]
        data = list(chain.from_iterable(each))
        inner = self.sides[1:]
        return [len(rows), longest, *inner], list(chain.from_iterable(data)) if inner else data


# A rejected image has no label.
OUTPUTS = {
    "label": Output("BYTES", lambda verdict: verdict["label"] or ""),
    "index": Output("INT64", lambda verdict: -1 if verdict["index"] is None else verdict["index"]),
    "confidence": Output("FP32", lambda verdict: verdict["confidence"] or 0.0),
    "decision": Output("BYTES", lambda verdict: verdict["decision"]),
    "p_value": Output("FP32", lambda verdict: verdict["detail"]["p_value"]),
}


def _of_boxes(name: str) -> Callable[[Mapping[str, Any]], list[Any]]:
    return lambda verdict: [box[name] for box in verdict["boxes"]]


# Of object detectors; `count` tells boxes from what fills the rows.
SCENE_OUTPUTS = {
    "count": Output("INT64", lambda verdict: len(verdict["boxes"])),
    "boxes": Output("FP32", _of_boxes("box"), (-1, 4), (0.0,) * 4),
    "label": Output("BYTES", _of_boxes("label"), (-1,), ""),
    "index": Output("INT64", _of_boxes("index"), (-1,), -1),
    "confidence": Output("FP32", _of_boxes("confidence"), (-1,), 0.0),
    "decision": OUTPUTS["decision"],
    "p_value": OUTPUTS["p_value"],
}


def images(
    body: Mapping[str, Any], binary: bytes, outputs: Mapping[str, Output] = OUTPUTS
) -> Sequence[bytes | Pixels | ImageError]:
    """The images of a request: encoded ones of BYTES, pixels (H, W, 3) of UINT8.

    `binary` is what follows the JSON part, `outputs` what may be asked for. Raises ImageError.
    """
    inputs = body.get("inputs")
    tensor = inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else None
    if not isinstance(tensor, Mapping):
        raise wrong("the request does not have exactly one input")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
        raise wrong("its shape is not a list of positive whole numbers")
    name = body.get("id")
    if isinstance(name, str) and len(name) > MAX_ID:
        raise ImageError(422, "id_too_long", f"an id may have {MAX_ID} characters: shorten it")
    if wanted(body) - set(outputs):
        known = ", ".join(outputs)
        raise ImageError(422, "unknown_output", f"unknown output: ask for some of {known}")
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


def replier(body: Mapping[str, Any], outputs: Mapping[str, Output] = OUTPUTS) -> Replier:
    """What answers a request. It keeps little of the body, which may be 25 times as large parsed as
    in bytes."""
    name = body.get("id")
    echo = {"id": name} if isinstance(name, str) and len(name) <= MAX_ID else {}
    return partial(reply, outputs, wanted(body), echo)


def reply(
    table: Mapping[str, Output],
    names: Collection[str],
    echo: Mapping[str, str],
    answers: Sequence[Answer],
) -> Answer:
    """The outputs `names` of a `table`, or all where there are none, as tensors.

    `echo` is the request's id.
    The protocol has no place for errors next to results, so the first error is the answer.
    """
    if fault := _first_fault(answers):
        code, error = fault
        return code, {**echo, **error}
    verdicts = [answer for _, answer in answers]
    model = verdicts[0]["model"]
    hidden = set() if "detail" in verdicts[0] else {"p_value"}
    if hidden & set(names):
        message = "this endpoint shows no p_value: ask for the other outputs"
        error = {"code": 422, "type": "unknown_output", "message": message}
        return 422, {**echo, **error, "error": message}
    shown = names or set(table) - hidden
    outputs = []
    for name, output in table.items():
        if name in shown:
            shape, data = output.tensor(verdicts)
            entry = {"name": name, "datatype": output.datatype, "shape": shape, "data": data}
            outputs.append(entry)
    return 200, {
        "model_name": model["name"],
        "model_version": model["version"],
        **echo,
        "outputs": outputs,
    }


def _first_fault(answers: Sequence[Answer]) -> Answer | None:
    """The first error, which names its image where there are several."""
    for number, (code, answer) in enumerate(answers):
        if code != 200:
            which = f"image {number}: " if len(answers) > 1 else ""
            message = f"{which}{answer['message']}"
            return code, {**answer, "message": message, "error": message}
    return None


def wanted(body: Mapping[str, Any]) -> set[str]:
    """Names of the outputs that a request asks for."""
    outputs = body.get("outputs")
    entries = outputs if isinstance(outputs, list) else []
    return {str(e.get("name")) for e in entries if isinstance(e, Mapping)}


def wrong(what: str) -> ImageError:
    """A 422 that says what is wrong and what to send."""
    return ImageError(422, "malformed_tensor", f"{what}: {SHAPE}")
