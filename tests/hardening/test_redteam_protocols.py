"""How servers of others are asked, and what their answers are taken for."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from rampart.handlers.image import decode
from rampart.hardening.attack.redteam import Wire
from rampart.hardening.attack.redteam.protocols import (
    Mapped,
    TensorFlow,
    open_inference,
    reached,
    speech_of,
    steps,
)
from rampart.hardening.attack.redteam.said import Reading, Said
from rampart.hardening.model.scaling import NAMES, SCALINGS

CLASSES = ("cat", "dog", "7")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)


def metadata(datatype: str, *shape: int) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": list(shape)}]}


@pytest.mark.parametrize(
    ("said", "kind", "label", "first"),
    [
        (Said(scores=[0.2, 0.7, 0.1]), "probabilities", 1, (1, 0.7)),
        (Said(scores=[0.0, 0.0, 0.0]), "logits", 0, (0, 1 / 3)),
        (Said(scores=[0.9, 0.8, 0.1]), "logits", 0, (0, 0.4)),
        (Said(scores={"dog": 0.6, "cat": 0.3}), "probabilities", 1, (1, 0.6)),
        (Said("dog", 0.4), "a confidence", 1, (1, 0.4)),
        (Said("dog"), "labels", 1, (1, 1.0)),
        (Said(1), "labels", 1, (1, 1.0)),
        (Said("7"), "labels", 2, (2, 1.0)),
        (Said("dog", 0.9, accepted=False), "a confidence", None, (1, 0.9)),
    ],
)
def test_an_answer_is_read_as_what_it_is(
    said: Said, kind: str, label: int | None, first: tuple[int, float]
) -> None:
    reading = Reading(CLASSES)
    answer = reading.answer(said)
    assert (reading.kind, answer.label) == (kind, label)
    assert answer.top[0][0] == first[0] and answer.top[0][1] == pytest.approx(first[1], abs=0.05)


def test_logits_become_their_softmax() -> None:
    answer = Reading(CLASSES).answer(Said(scores=[2.0, -1.0, 0.5]))
    shares = np.exp([2.0, -1.0, 0.5]) / np.exp([2.0, -1.0, 0.5]).sum()
    assert dict(answer.top) == pytest.approx(dict(enumerate(shares)))


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        (None, Said(scores=[0.5, 0.5]), "2 scores do not fit the 3 classes"),
        (None, Said("bird"), "'bird' is not a class of these images .cat, dog, 7."),
        (None, Said(scores=[0.5, float("nan"), 0.5]), "not finite numbers"),
        (None, Said(), "neither label nor scores"),
        (
            Said(scores=[0.5, 0.5, 0.0]),
            Said(scores=[3.0, 1.0, 0.0]),
            "earlier answers were probabilities, but",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(first: Said | None, then: Said, says: str) -> None:
    reading = Reading(CLASSES)
    if first:
        reading.answer(first)
    with pytest.raises(ValueError, match=says):
        reading.answer(then)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((-1, 3, 8, 8), "nchw"), ((-1, 8, 8, 3), "nhwc"), ((1, 3, -1, -1), "nchw")],
)
def test_v2_takes_layout_and_batches_from_what_the_server_tells(
    shape: tuple[int, ...], layout: str
) -> None:
    speech = open_inference(Wire(), metadata("FP32", *shape), 8)
    assert speech.layout == layout and speech.most == (1 if shape[0] == 1 else 32)
    body, _ = speech.request(IMAGES)
    (tensor,) = json.loads(body)["inputs"]
    sent = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    back = sent.transpose(0, 2, 3, 1) if layout == "nchw" else sent
    assert np.array_equal((back * 255).round(), IMAGES)


def test_v2_sends_whole_numbers_and_pictures_where_these_are_taken() -> None:
    body, _ = open_inference(Wire(), metadata("UINT8", -1, 8, 8, 3), 8).request(IMAGES)
    assert json.loads(body)["inputs"][0]["data"] == IMAGES.ravel().tolist()
    body, _ = open_inference(Wire(), metadata("BYTES", -1, 1), 8).request(IMAGES)
    (tensor,) = json.loads(body)["inputs"]
    assert tensor["shape"] == [2, 1]
    assert np.array_equal(decode(base64.b64decode(tensor["data"][1])), IMAGES[1])


def test_v2_finds_scores_among_outputs_or_asks_for_their_name() -> None:
    speech = open_inference(Wire(), metadata("FP32", -1, 3, 8, 8), 8)
    scores = {"name": "s", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}
    labels = {"name": "l", "datatype": "BYTES", "shape": [2], "data": ["cat", "dog"]}
    assert speech.read({"outputs": [labels, scores]}, 2) == [
        Said(scores=[1, 2, 3]), Said(scores=[4, 5, 6]),
    ]  # fmt: skip
    assert speech.read({"outputs": [labels]}, 2) == [Said("cat"), Said("dog")]
    other = {**scores, "name": "t"}
    with pytest.raises(ValueError, match=r"name one with --output \(s, t\)"):
        speech.read({"outputs": [scores, other]}, 2)
    named = open_inference(Wire(output="t"), metadata("FP32", -1, 3, 8, 8), 8)
    assert named.read({"outputs": [scores, other]}, 2)[1] == Said(scores=[4, 5, 6])


def test_a_model_of_no_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes x INT64 \[-1, 7\], which is neither pictures"):
        open_inference(Wire(), metadata("INT64", -1, 7), 8)


def test_tensorflow_serving_has_scores_alone_or_under_a_name() -> None:
    speech = TensorFlow(SCALINGS["unit"], "nhwc")
    body, _ = speech.request(IMAGES)
    assert np.allclose(json.loads(body)["instances"], IMAGES / 255, atol=1e-5)
    assert speech.read({"predictions": [[0.1, 0.9]]}, 1) == [Said(scores=[0.1, 0.9])]
    assert speech.read({"predictions": [{"p": [0.1, 0.9], "n": 3}]}, 1) == [Said(scores=[0.1, 0.9])]
    assert speech.read({"predictions": ["cat"]}, 1) == [Said("cat")]
    with pytest.raises(ValueError, match="2 lists of scores"):
        speech.read({"predictions": [{"p": [0.1], "q": [2]}]}, 1)


def test_a_template_is_filled_with_one_picture_or_with_all() -> None:
    one = Mapped(Wire(send='{"a": [{"image": "$b64"}], "k": "$b"}', label="$.x"))
    body, kind = one.request(IMAGES[:1])
    content = json.loads(body)
    assert (one.most, kind, content["k"]) == (1, "application/json", "$b")
    assert np.array_equal(decode(base64.b64decode(content["a"][0]["image"])), IMAGES[0])
    every = Mapped(Wire(send='{"rows": "$pixels*"}', score="$[*].p", scaling=SCALINGS["bytes"]))
    body, _ = every.request(IMAGES)
    assert every.most == 32 and np.array_equal(json.loads(body)["rows"], IMAGES)
    assert every.read([{"p": [1.0, 2.0]}, {"p": [3.0, 4.0]}], 2)[1] == Said(None, [3.0, 4.0])
    bare = Mapped(Wire(label="$.x"))
    body, kind = bare.request(IMAGES[:1])
    assert kind == "image/png" and np.array_equal(decode(body), IMAGES[0])


def test_paths_lead_into_json() -> None:
    content = {"a b": [{"c": [1, 2]}, {"c": [3, 4]}]}
    assert reached(content, steps("$['a b'][*].c[1]") or []) == [2, 4]
    assert reached(content, steps("$") or []) == [content]
    for wrong in ("a.b", "$.", "$..a", "$[x]"):
        with pytest.raises(ValueError, match="is not a path"):
            steps(wrong)


@pytest.mark.parametrize(
    ("wire", "says"),
    [(Wire(send="{", label="$"), "--send is not JSON"), (Wire(send="{}"), "--label PATH")],
)
def test_a_template_without_what_it_needs_is_refused(wire: Wire, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Mapped(wire)


def test_the_protocol_follows_from_the_url_where_none_is_named() -> None:
    urls = {
        "v2/models/m/infer": "v2",
        "v1/models/m:predict": "tensorflow",
        "predictions/m": "rampart",
    }
    for path, name in urls.items():
        assert Wire().name(f"http://127.0.0.1/{path}?a=/infer") == name
    assert Wire(label="$.x").name("http://127.0.0.1/v2/models/m/infer") == "json"
    assert speech_of(Wire("rampart"), "http://127.0.0.1/", 8, lambda url: None) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_scaling_has_the_range_that_its_name_says(name: str) -> None:
    ends = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(3, 3)
    low, high = SCALINGS[name].of(ends, "nhwc")[0, 0, :, 0]  # type: ignore[index]
    expected = {"unit": (0, 1), "bytes": (0, 255), "signed": (-1, 1)}
    wanted = expected.get(name, (-0.485 / 0.229, 0.515 / 0.229))
    assert (low, high) == pytest.approx(wanted, rel=1e-5)
