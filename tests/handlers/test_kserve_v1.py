"""KServe v1: instances to encoded images, answers to predictions."""

import base64

import pytest

from rampart.handlers.errors import ImageError
from rampart.handlers.protocols.kserve_v1 import images, reply

PICTURE = b"\x89PNG\r\n\x1a\n and so on"
B64 = base64.b64encode(PICTURE).decode()


@pytest.mark.parametrize("instances", [[], {}, None, "text", 7])
def test_a_body_without_images_is_422(instances: object) -> None:
    with pytest.raises(ImageError) as caught:
        images({"instances": instances})
    assert (caught.value.code, caught.value.type) == (422, "no_instances")


@pytest.mark.parametrize("instance", [{}, {"b64": 1}, {"b64": None}, "text", 3, None, [B64]])
def test_an_instance_without_base64_is_an_error_in_its_place(instance: object) -> None:
    first, second = images({"instances": [instance, {"b64": B64}]})
    assert isinstance(first, ImageError) and (first.code, first.type) == (422, "no_base64")
    assert second == PICTURE


@pytest.mark.parametrize(
    "text", ["a", "!!!!", B64[:8] + "\n" + B64[8:], "data:image/png;base64," + B64, "é" * 4]
)
def test_malformed_base64_is_refused_and_not_repaired(text: str) -> None:
    (error,) = images({"instances": [{"b64": text}]})
    assert isinstance(error, ImageError)
    assert (error.code, error.type) == (422, "malformed_base64")


def test_answers_come_in_a_list_but_for_a_lone_error() -> None:
    good, bad = (200, {"label": "cat"}), (415, {"code": 415})
    assert reply([good]) == (200, {"predictions": [{"label": "cat"}]})
    assert reply([good, bad]) == (200, {"predictions": [{"label": "cat"}, {"code": 415}]})
    assert reply([bad]) == bad
