"""Request bodies to images, and their answers to one body.

Taken are raw bytes, multipart files, JSON with base64 (KServe v1) and Open Inference Protocol v2.
Parts of one multipart request need different names: TorchServe keeps the last of each name.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from handlers import open_inference
from handlers.image import ImageError, check_count, from_base64
from handlers.open_inference import Answer, Pixels
from handlers.wire import MAX_PARTS, TOO_MANY

# Of JSON, so much is read at most: a list takes 3 bytes on its way and 64 in memory.
MAX_NUMBERS, MAX_VALUES = 2**19, 200_000
PIXELS_A_NUMBER = 25  # that are decoded while one is read
JSON_SHAPE = '{"instances": [{"b64": "..."}]}'

Reply = Callable[[Sequence[Answer]], Answer]


class Request(NamedTuple):
    """Images as they came, an ImageError for an unreadable one, and what makes of their answers
    the answer to the request."""

    images: Sequence[bytes | Pixels | ImageError]
    reply: Reply


def read(fields: Mapping[str, object], headers: Mapping[str, object]) -> Request:
    """One request, in whichever protocol it speaks; what is wrong with all of it is its one image.

    `fields` are the body or the multipart parts and query parameters by name; `headers` hold, under
    the name of each part, its content type.
    """
    known = {name.lower(): value for name, value in headers.items()}
    try:
        body, rest = _body(fields, headers, known.get("inference-header-content-length"))
    except ImageError as error:
        return Request([error.bare()], plain)
    if isinstance(body, list):
        return Request(body, plain)
    # TorchServe gives its own route, /predictions/NAME, a header that /v1 and /v2 lack.
    reply: Reply = plain if "url_path" in known else predictions
    reply = open_inference.replier(body) if "inputs" in body else reply
    try:
        images = open_inference.images(body, rest) if "inputs" in body else _read_instances(body)
    except ImageError as error:
        return Request([error.bare()], reply)
    return Request(images, reply)


def reading_cost(fields: Mapping[str, object]) -> int:
    """What reading a request costs, in decoded pixels: numbers in JSON are read one by one."""
    bodies = (value for value in fields.values() if isinstance(value, (bytes, bytearray)))
    return sum(
        body.count(b",") * PIXELS_A_NUMBER for body in bodies if body.lstrip()[:1] in (b"{", b"[")
    )


def plain(answers: Sequence[Answer]) -> Answer:
    """One answer as it is; several in a list."""
    return answers[0] if len(answers) == 1 else predictions(answers)


def predictions(answers: Sequence[Answer]) -> Answer:
    """KServe v1: a list whatever its length; what is wrong with the only one is an error."""
    if len(answers) == 1 and answers[0][0] != 200:
        return answers[0]
    return 200, {"predictions": [body for _, body in answers]}


def _body(
    fields: Mapping[str, object], headers: Mapping[str, object], json_length: object
) -> tuple[list[bytes] | Mapping[str, Any], bytes]:
    """Encoded images, or a JSON object and what follows it: the first `json_length` bytes of a body
    of binary tensors are JSON.

    TorchServe calls a whole body `body`; gRPC clients call their image `data` by custom.
    """
    if TOO_MANY in fields:
        raise ImageError(
            413,
            "too_many_parts",
            f"a request may have {MAX_PARTS} parts, fields and query parameters: send fewer",
        )
    whole = "body" if "body" in fields else "data"
    parts = [
        value for name, value in fields.items() if name == whole or _content_type(headers.get(name))
    ]
    if not parts:
        raise ImageError(
            415,
            "no_image",
            "the request carries no image: send the file itself (curl -T FILE, or --data-binary"
            f" with -H 'Content-Type: image/png'), -F image=@FILE, or JSON {JSON_SHAPE}; over gRPC"
            ' under the key "data"',
        )
    check_count(len(parts))
    if len(parts) > 1:
        return [_as_bytes(part) for part in parts], b""
    body, rest = parts[0], b""
    if isinstance(body, (bytes, bytearray, str)):
        data = _as_bytes(body)
        told = re.fullmatch(r"[0-9]{1,9}", str(json_length))
        length = int(told[0]) if told else len(data)
        start = data.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if start not in (b"{", b"["):  # which no image starts with
            return [data], b""
        check_values(data[:length])
        body, rest = _parse_json(data[:length]), data[length:]
    return (body if isinstance(body, Mapping) else {}), rest


def _content_type(entry: object) -> object:
    """A part's content type; query parameters and plain form fields have none."""
    return entry.get("content-type") if isinstance(entry, Mapping) else None


def _as_bytes(value: object) -> bytes:
    """TorchServe hands over bodies of type text/* as str, parts of type JSON parsed."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return str(value).encode("utf-8", "surrogatepass")


def check_values(data: bytes) -> None:
    """Raise ImageError where JSON has so much in it that it would take long, or fill memory."""
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
            400, "malformed_json", f"the body is not JSON: send {JSON_SHAPE}"
        ) from error


def _read_instances(body: Mapping[str, Any]) -> list[bytes | ImageError]:
    instances = body.get("instances")
    if not isinstance(instances, list) or not instances:
        raise ImageError(422, "no_instances", f"the JSON holds no images: send {JSON_SHAPE}")
    check_count(len(instances))
    return [_read_instance(instance) for instance in instances]


def _read_instance(instance: object) -> bytes | ImageError:
    text = instance.get("b64") if isinstance(instance, Mapping) else None
    if not isinstance(text, str):
        return ImageError(
            422, "no_base64", 'an instance must be an object: {"b64": "the image in base64"}'
        )
    return from_base64(text)
