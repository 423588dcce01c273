"""Which protocol a request speaks: its body decides, and hardly its route.

It may be raw bytes, files of a form, JSON with base64 (KServe v1), or Open Inference Protocol v2.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rampart.handlers.errors import ImageError, outcome
from rampart.handlers.explanation import ONE_PICTURE
from rampart.handlers.image import check_count
from rampart.handlers.protocols import kserve_v1, open_inference
from rampart.handlers.types import Answer, Incoming, Pixels, Replier, Request

# Bounds of JSON: a list takes 3 bytes in a body and 64 in memory.
MAX_NUMBERS, MAX_VALUES = 2**19, 200_000
PIXELS_A_NUMBER = 25  # decoded in the time that it takes to read one number
NO_IMAGE = ImageError(
    415,
    "no_image",
    "the request carries no image: send the file itself (curl -T FILE, or --data-binary"
    f" with -H 'Content-Type: image/png'), -F image=@FILE, or JSON {kserve_v1.SHAPE} with"
    " -H 'Content-Type: application/json', which curl -d leaves out; over gRPC under the key"
    ' "data"',
)


def read(
    incoming: Incoming, outputs: Mapping[str, open_inference.Output] = open_inference.OUTPUTS
) -> Request:
    """The images of a request, and what answers it in its own protocol, in v2 by these `outputs`.

    An error that concerns the whole request stands as its one image.
    """
    content = outcome(_body, incoming)
    if isinstance(content, ImageError):
        return Request([content], plain)
    body, binary = content
    if isinstance(body, list):
        return Request(body, plain, incoming.explain)
    if incoming.explain and "inputs" in body:
        return Request([ONE_PICTURE], open_inference.replier(body))
    images: Sequence[bytes | Pixels | ImageError] | ImageError
    reply: Replier
    if "inputs" in body:
        reply = open_inference.replier(body, outputs)
        images = outcome(open_inference.images, body, binary, outputs)
    else:
        in_v1 = kserve_v1.reply_with_reasons if incoming.explain else kserve_v1.reply
        reply = plain if incoming.route == "predictions" else in_v1
        images = outcome(kserve_v1.images, body)
    if isinstance(images, ImageError):
        return Request([images], reply)
    return Request(images, reply, incoming.explain)


def reading_cost(incoming: Incoming) -> int:
    """The cost of reading a request, in decoded pixels: Python reads JSON number by number."""
    return sum(part.count(b",") * PIXELS_A_NUMBER for part in incoming.parts if _is_json(part))


def plain(answers: Sequence[Answer]) -> Answer:
    """One answer as it is; several in a list."""
    return answers[0] if len(answers) == 1 else kserve_v1.reply(answers)


def _body(incoming: Incoming) -> tuple[list[bytes] | Mapping[str, Any], bytes]:
    """Encoded images, or a JSON object, as long as a header says, and the binary tensors."""
    if incoming.refusal:
        raise incoming.refusal.bare()
    if not incoming.parts:
        raise NO_IMAGE.bare()
    check_count(len(incoming.parts))
    if len(incoming.parts) > 1:
        return list(incoming.parts), b""
    (data,) = incoming.parts
    if not _is_json(data):
        return [data], b""
    length = incoming.headers.get("inference-header-content-length", "")
    end = int(length) if re.fullmatch(r"[0-9]{1,9}", length) else len(data)
    check_values(data[:end])
    body = _parse_json(data[:end])
    return (body if isinstance(body, Mapping) else {}), data[end:]


def _is_json(data: bytes) -> bool:
    """By its first character, with which no image starts."""
    return data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")


def check_values(data: bytes) -> None:
    """Raise ImageError where JSON would take long to read, or fill memory."""
    others = max(data.count(b"["), data.count(b"{"), data.count(b'"') // 2)
    if data.count(b",") > MAX_NUMBERS or others > MAX_VALUES:
        raise ImageError(
            413,
            "too_many_values",
            f"the JSON has more than {MAX_NUMBERS} numbers, or {MAX_VALUES} lists, objects or"
            " texts: send a binary tensor, or the picture itself",
        )


def _parse_json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(
            400, "malformed_json", f"the body is not JSON: send {kserve_v1.SHAPE}"
        ) from error
