"""KServe v1: a JSON list of base64 images in, a list of verdicts out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rampart.handlers.errors import ImageError
from rampart.handlers.image import check_count, from_base64
from rampart.handlers.types import Answer

SHAPE = '{"instances": [{"b64": "..."}]}'


def images(body: Mapping[str, Any]) -> list[bytes | ImageError]:
    """The encoded images of a request. Raises ImageError."""
    instances = body.get("instances")
    if not isinstance(instances, list) or not instances:
        raise ImageError(422, "no_instances", f"the JSON holds no images: send {SHAPE}")
    check_count(len(instances))
    return [_image(instance) for instance in instances]


def _image(instance: object) -> bytes | ImageError:
    text = instance.get("b64") if isinstance(instance, Mapping) else None
    if not isinstance(text, str):
        return ImageError(
            422, "no_base64", 'an instance must be an object: {"b64": "the image in base64"}'
        )
    return from_base64(text)


def reply(answers: Sequence[Answer]) -> Answer:
    """A list whatever its length; what is wrong with the only image is an error."""
    if len(answers) == 1 and answers[0][0] != 200:
        return answers[0]
    return 200, {"predictions": [body for _, body in answers]}


def reply_with_reasons(answers: Sequence[Answer]) -> Answer:
    """The protocol's answer to `:explain`: verdicts, and their explanations in a list beside."""
    verdicts = [(code, {**body}) for code, body in answers]
    reasons = [body.pop("explanation", None) for _, body in verdicts]
    status, content = reply(verdicts)
    return status, content | {"explanations": reasons} if status == 200 else content
