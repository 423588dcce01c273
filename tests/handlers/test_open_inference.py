"""Tensors of the Open Inference Protocol v2 to images, verdicts to tensors."""

import base64
import gc
import json
import weakref

import numpy as np
import pytest

from rampart.handlers.errors import ImageError
from rampart.handlers.image import MAX_IMAGES
from rampart.handlers.protocols.open_inference import images, replier
from rampart.handlers.types import Answer

IMAGE = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
PICTURES = [b"\x89PNG", b"", b"\xff\xd8\xff"]


def uint8(data: object, shape: object = (2, 4, 5, 3)) -> dict[str, object]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"inputs": [{"name": "image", "datatype": "UINT8", "shape": shape, "data": data}]}


def verdict(label: str | None = "cat", **more: object) -> Answer:
    known = {"index": 3, "confidence": 0.5, "decision": "accept", "detail": {"p_value": 0.25}}
    return 200, {"label": label, "model": {"name": "m", "version": "1.0"}} | known | more


@pytest.mark.parametrize("data", [IMAGE.ravel().tolist(), IMAGE.tolist()], ids=["flat", "nested"])
def test_uint8_tensors_are_pixels(data: list[object]) -> None:
    np.testing.assert_array_equal(np.stack(images(uint8(data), b"")), IMAGE)


def test_a_uint8_tensor_may_be_binary() -> None:
    body = uint8(None)
    del body["inputs"][0]["data"]  # type: ignore[index]
    np.testing.assert_array_equal(np.stack(images(body, IMAGE.tobytes())), IMAGE)


def test_bytes_are_encoded_images_in_base64_or_binary() -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [3]}
    text = [base64.b64encode(picture).decode() for picture in PICTURES]
    assert images({"inputs": [tensor | {"data": text}]}, b"") == PICTURES
    binary = b"".join(len(p).to_bytes(4, "little") + p for p in PICTURES)
    assert images({"inputs": [tensor]}, binary) == PICTURES
    first, second, _ = images({"inputs": [tensor | {"data": ["!", text[1], text[2]]}]}, b"")
    assert isinstance(first, ImageError) and first.type == "malformed_base64"
    assert second == PICTURES[1]


def test_bytes_may_be_a_column() -> None:
    """As clients send them that put a dimension of batches before each shape."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [3, 1]}
    text = [base64.b64encode(picture).decode() for picture in PICTURES]
    for data in (text, [[one] for one in text]):
        assert images({"inputs": [tensor | {"data": data}]}, b"") == PICTURES
    binary = b"".join(len(p).to_bytes(4, "little") + p for p in PICTURES)
    assert images({"inputs": [tensor]}, binary) == PICTURES


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": []},
        {"inputs": 7},
        {"inputs": [{}, {}]},
        {"inputs": [None]},
        {"inputs": [{"datatype": "FP32", "shape": [1], "data": [0.5]}]},
        {"inputs": [{"datatype": "BYTES", "shape": [], "data": []}]},
        {"inputs": [{"datatype": "BYTES", "shape": [1, 2], "data": [""]}]},
        {"inputs": [{"datatype": "BYTES", "shape": [1, 1, 1], "data": [""]}]},
        {"inputs": [{"datatype": "BYTES", "shape": [2, 1], "data": ["", "", ""]}]},
        {"inputs": [{"datatype": "BYTES", "shape": [2], "data": [""]}]},
        {"inputs": [{"datatype": "BYTES", "shape": [1], "data": ""}]},
        uint8([1, 2, 3]),
        uint8([0] * 120, "2453"),
        uint8([0] * 120, (2, 4, 15)),
        uint8([0] * 120, (-2, 4, 5, -3)),
        uint8([0] * 120, (True, 8, 5, 3)),
        uint8([256] + [0] * 119),
        uint8([-1] + [0] * 119),
        uint8([0.0] * 120),
        uint8([True] * 120),
        uint8(["x" * 100_000] + [0] * 119),
        uint8([[0, 1], 2]),
        uint8([2, [0, 1]]),
        uint8(None),
        uint8([]),
    ],
)
def test_what_is_no_tensor_of_images_says_what_to_send(body: dict[str, object]) -> None:
    with pytest.raises(ImageError, match="send one input") as caught:
        images(body, b"")
    assert (caught.value.code, caught.value.type) == (422, "malformed_tensor")


@pytest.mark.parametrize("shape", [(1, 4097, 4096, 3), (1, 1, 100, 3), (1, 10**30, 5, 3)])
def test_the_bounds_are_those_of_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"million pixels|20 times"):
        images(uint8([0] * 300, shape), b"")


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_binary_data_that_ends_early_is_refused(cut: int) -> None:
    body = {"inputs": [{"datatype": "BYTES", "shape": [1]}]}
    with pytest.raises(ImageError, match="ends within an element"):
        images(body, (b"\x02\0\0\0ab")[:cut])


def test_verdicts_become_tensors_with_the_requests_id() -> None:
    code, body = replier({"id": "7"})([verdict(), verdict("dog", index=5, decision="flag")])
    assert (code, body["id"], body["model_name"], body["model_version"]) == (200, "7", "m", "1.0")
    outputs = {entry["name"]: (entry["datatype"], entry["data"]) for entry in body["outputs"]}
    assert outputs == {
        "label": ("BYTES", ["cat", "dog"]),
        "index": ("INT64", [3, 5]),
        "confidence": ("FP32", [0.5, 0.5]),
        "decision": ("BYTES", ["accept", "flag"]),
        "p_value": ("FP32", [0.25, 0.25]),
    }
    assert all(entry["shape"] == [2] for entry in body["outputs"])


def test_only_the_outputs_that_are_asked_for_come_back() -> None:
    _, body = replier({"outputs": [{"name": "decision"}, {"name": "label"}]})([verdict()])
    assert [entry["name"] for entry in body["outputs"]] == ["label", "decision"]


@pytest.mark.parametrize("outputs", [True, 7, "label", {}, [], None])
def test_outputs_that_name_nothing_are_all_of_them(outputs: object) -> None:
    assert len(replier({"outputs": outputs})([verdict()])[1]["outputs"]) == 5


@pytest.mark.parametrize("name", ["nope", None, [1], 7])
def test_an_output_that_there_is_not_is_refused(name: object) -> None:
    with pytest.raises(ImageError, match="label, index, confidence, decision, p_value"):
        images(uint8(IMAGE.tolist()) | {"outputs": [{"name": "label"}, {"name": name}]}, b"")


def test_too_many_images_are_refused_before_any_is_made() -> None:
    many = MAX_IMAGES + 1
    bodies = [uint8([0] * many * 3, (many, 1, 1, 3))]
    bodies += [{"inputs": [{"datatype": "BYTES", "shape": [n]}]} for n in (many, 10**9)]
    bodies += [{"inputs": [{"datatype": "BYTES", "shape": [many], "data": [0] * many}]}]
    for body in bodies:
        with pytest.raises(ImageError) as caught:
            images(body, bytes(4 * many))
        assert caught.value.code == 413


def test_a_body_of_a_million_empty_elements_is_refused_at_once() -> None:
    with pytest.raises(ImageError, match="another length"):
        images({"inputs": [{"datatype": "BYTES", "shape": [2]}]}, bytes(6_400_000))


def test_a_rejected_image_has_no_label_and_a_public_answer_no_p_value() -> None:
    answer = verdict(None, index=None, confidence=None, decision="reject")
    del answer[1]["detail"]
    _, body = replier({})([answer])
    values = {entry["name"]: entry["data"] for entry in body["outputs"]}
    assert values == {"label": [""], "index": [-1], "confidence": [0.0], "decision": ["reject"]}
    assert "id" not in body


def test_who_asks_for_a_p_value_that_is_not_shown_is_told() -> None:
    answer = verdict()
    del answer[1]["detail"]
    code, body = replier({"id": "7", "outputs": [{"name": "p_value"}]})([answer])
    assert (code, body["type"], body["id"]) == (422, "unknown_output", "7")
    assert "p_value" in body["error"] == body["message"]


class Marked(dict[str, object]):
    """A parsed body, to see whether anything still holds it."""


def test_nothing_of_a_large_body_is_kept_until_its_answer() -> None:
    body = Marked(uint8(IMAGE.tolist()), id="7", more=[{}] * 1000)
    gone = weakref.ref(body)
    reply = replier(body)
    del body
    gc.collect()
    assert gone() is None
    assert reply([verdict()])[1]["id"] == "7"


def test_an_image_at_fault_is_the_answer_and_is_named() -> None:
    bad = (415, {"code": 415, "type": "unsupported_format", "message": "send one of these"})
    code, body = replier({"id": "7"})([verdict(), bad])
    assert code == body["code"] == 415
    assert body["error"] == body["message"] == "image 1: send one of these"
    assert replier({})([bad])[1]["error"] == "send one of these"
    json.dumps(body, allow_nan=False)
