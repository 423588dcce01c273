"""Request bodies to encoded images: raw bytes, multipart files, JSON with base64.

Parts of one multipart request need different names: TorchServe keeps the last of each name.
"""

import base64
import binascii
import json
from collections.abc import Mapping

from handlers.image import ImageError

MAX_IMAGES = 32
# What TorchServe calls a whole body, and gRPC clients call their image by custom.
BODY_NAMES = ("body", "data")
JSON_SHAPE = '{"instances": [{"b64": "..."}]}'


def read(fields: Mapping[str, object], headers: Mapping[str, object]) -> list[bytes | ImageError]:
    """The encoded images of one request, in order, an ImageError in place of an unreadable one.

    `fields` are the body or the multipart parts and query parameters by name; `headers` hold, under
    the name of each part, its content type. Raises ImageError if the request as a whole is wrong.
    """
    parts = [
        value
        for name, value in fields.items()
        if name in BODY_NAMES or _content_type(headers.get(name))
    ]
    if not parts:
        raise ImageError(
            415,
            "no_image",
            "the request carries no image: send the file itself (curl -T FILE, or --data-binary"
            f" with -H 'Content-Type: image/png'), -F image=@FILE, or JSON {JSON_SHAPE}",
        )
    _check_count(len(parts))
    if len(parts) > 1:
        return [_as_bytes(part) for part in parts]
    body = parts[0]
    if isinstance(body, (bytes, bytearray, str)):
        data = _as_bytes(body)
        if data.lstrip()[:1] not in (b"{", b"["):  # which no image starts with
            return [data]
        body = _parse_json(data)
    return _read_instances(body)


def _content_type(entry: object) -> object:
    """A part's content type; query parameters and plain form fields have none."""
    return entry.get("content-type") if isinstance(entry, Mapping) else None


def _as_bytes(value: object) -> bytes:
    """TorchServe hands over bodies of type text/* as str, parts of type JSON parsed."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return str(value).encode("utf-8", "surrogatepass")


def _parse_json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(
            400, "malformed_json", f"the body is not JSON: send {JSON_SHAPE}"
        ) from error


def _read_instances(body: object) -> list[bytes | ImageError]:
    instances = body.get("instances") if isinstance(body, Mapping) else None
    if not isinstance(instances, list) or not instances:
        raise ImageError(422, "no_instances", f"the JSON holds no images: send {JSON_SHAPE}")
    _check_count(len(instances))
    return [_read_instance(instance) for instance in instances]


def _read_instance(instance: object) -> bytes | ImageError:
    text = instance.get("b64") if isinstance(instance, Mapping) else None
    if not isinstance(text, str):
        return ImageError(
            422, "no_base64", 'an instance must be an object: {"b64": "the image in base64"}'
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return ImageError(
            422,
            "malformed_base64",
            "the image is not valid base64: encode it without line breaks or prefix",
        )


def _check_count(count: int) -> None:
    if count > MAX_IMAGES:
        raise ImageError(
            413, "too_many_images", f"a request may carry {MAX_IMAGES} images: split it up"
        )
