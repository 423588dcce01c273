"""Why a verdict: which detector spoke, where in the picture, and what that may cost."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clock import Clock
from inprocess import ask, png
from PIL import Image

from rampart.handlers import explanation as reasons
from rampart.handlers.budget import MAX_CREDIT, Budget
from rampart.handlers.engine import Engine, Outputs
from rampart.handlers.service import Service
from rampart.handlers.settings import read_explain
from rampart.handlers.types import Incoming, Route
from rampart.handlers.verdict import Calibration, Judge, Policy, Verdict, combine

Encode = Callable[..., bytes]
EXPLAIN = {"explain": True, "false_alarm_rate": 0.05}


@pytest.fixture(scope="module")
def service(unpacked: Path) -> Service:
    return Service.open(unpacked, EXPLAIN, name="tiny", version="1.0")


def why(service: Service, *parts: bytes, route: Route = "predictions") -> tuple[int, Any]:
    """Status and content of the answer to a request for an explanation."""
    (reply,) = service.answer([Incoming({}, parts, route, explain=True)])
    return reply.status, json.loads(reply.body)


def decoded(picture: str) -> np.ndarray:
    return np.array(Image.open(BytesIO(base64.b64decode(picture))))


def test_an_effect_is_what_the_graph_says_less_without_the_patch(
    service: Service, unpacked: Path, pixels: np.ndarray, tiny_calibration: Calibration
) -> None:
    status, content = why(service, png(pixels))
    plain = ask(service, png(pixels))
    explanation = content.pop("explanation")
    assert status == 200 and content == plain
    hidden = pixels.copy()
    hidden[8:12, 20:24] = 127  # the third row's sixth patch
    outputs = Engine(unpacked / "graph.onnx").run(np.stack([pixels, hidden]))
    index = explanation["label"]["index"]
    assert index == plain["index"] and explanation["label"]["label"] == plain["label"]
    lost = outputs.logits[0, index] - outputs.logits[1, index]
    effect = np.array(explanation["label"]["effect"])
    assert effect.shape == (8, 8) and effect[2, 5] == pytest.approx(lost, abs=1e-5)
    suspicion = combine(outputs.scores, tiny_calibration)
    found = explanation["suspicion"]["effect"][2][5]
    assert found == pytest.approx(suspicion[0] - suspicion[1], abs=1e-4)


def test_the_picture_is_the_image_with_its_patches_coloured_by_their_effect(
    service: Service, pixels: np.ndarray
) -> None:
    _, content = why(service, png(pixels))
    for part in ("label", "suspicion"):
        effect = np.array(content["explanation"][part]["effect"])
        overlay = decoded(content["explanation"][part]["picture"]).astype(int)
        assert overlay.shape == (32, 32, 3)
        colder = (overlay - pixels)[..., 2].reshape(8, 4, 8, 4).mean((1, 3))
        warmer = (overlay - pixels)[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        strongest = np.unravel_index(np.abs(effect).argmax(), effect.shape)
        assert np.abs(effect).max() > 0
        warms = bool(warmer[strongest] > colder[strongest])
        assert warms == (effect[strongest] > 0)
        still = np.abs(overlay - pixels).max((2,)).reshape(8, 4, 8, 4).max((1, 3)) == 0
        assert (np.abs(effect[still]) < 0.02 * np.abs(effect).max()).all()


@pytest.mark.parametrize("size", [3, 8, 30, 224])
def test_each_pixel_is_hidden_once(size: int) -> None:
    pixels = np.full((size, size, 3), 200, np.uint8)
    images = reasons.occlusions(pixels)
    patches = min(size, 8) ** 2
    assert images.shape == (patches + 1, size, size, 3) and (images[0] == 200).all()
    assert ((images[1:] == reasons.GREY).sum(0) == 1).all()


def test_the_detector_that_spoke_comes_first_with_its_own_p_value(
    tiny_calibration: Calibration,
) -> None:
    names, knots = tiny_calibration.detectors, tiny_calibration.knots
    middle = knots[:, knots.shape[1] // 2]
    for loud, name in enumerate(names):
        scores = knots[:, :1].T.copy()
        scores[0, loud] = knots[loud, -1] + 9 * np.ptp(knots[loud])
        first, *others = reasons.detectors(scores.astype(np.float32), tiny_calibration)
        assert first["name"] == name
        assert first["p_value"] == pytest.approx(1 / (tiny_calibration.images + 1), rel=1e-5)
        assert {row["name"] for row in others} == set(names) - {name}
        assert all(row["p_value"] == 1 for row in others)
    # In the middle of the table it is the share that the table says.
    rows = reasons.detectors(middle[None], tiny_calibration)  # type: ignore[arg-type]
    (share,) = {row["p_value"] for row in rows}
    expected = np.exp(-tiny_calibration.surprise[len(tiny_calibration.surprise) // 2])
    assert share == pytest.approx(expected, rel=1e-4)


def test_kserves_explain_gives_verdicts_and_explanations_side_by_side(
    service: Service, pixels: np.ndarray
) -> None:
    text = base64.b64encode(png(pixels)).decode()
    status, content = why(service, json.dumps({"instances": [{"b64": text}]}).encode(), route="v1")
    assert status == 200 and content["predictions"] == [ask(service, png(pixels))]
    assert content["explanations"] == [why(service, png(pixels))[1]["explanation"]]
    status, content = why(service, b'{"instances": [{"b64": "bm8="}]}', route="v1")
    assert (status, content["type"]) == (415, "unsupported_format")


def test_it_is_off_by_default_and_impossible_where_scores_are_hidden(
    unpacked: Path, pixels: np.ndarray
) -> None:
    service = Service.open(unpacked)
    status, content = why(service, png(pixels))
    assert (status, content["type"]) == (403, "not_explained")
    assert "serve --explain" in content["message"]
    with pytest.raises(ValueError, match="explanation shows the scores that `detail: public`"):
        Service.open(unpacked, {"explain": "true", "detail": "public"})
    with pytest.raises(ValueError, match="explain must be true or false"):
        read_explain({"explain": "maybe"})
    assert [read_explain({"explain": value}) for value in (True, "true", False)] == [1, 1, 0]


def test_only_one_picture_is_explained_and_a_bad_one_gets_its_error(
    service: Service, pixels: np.ndarray
) -> None:
    picture = png(pixels)
    text = base64.b64encode(picture).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    two = json.dumps({"instances": [{"b64": text}] * 2}).encode()
    for parts in ((picture, picture), (two,), (json.dumps({"inputs": [tensor]}).encode(),)):
        status, content = why(service, *parts)
        assert (status, content["type"]) == (422, "explain_one")
    assert why(service, b"hello")[1]["type"] == "unsupported_format"
    assert why(service)[1]["type"] == "no_image"


def test_one_who_looks_for_an_attack_gets_no_map_of_it_and_quarantine_keeps_none(
    unpacked: Path, tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    settings = {**EXPLAIN, "query_store": str(tmp_path / "q"), "false_alarm_rate": 0.99}
    service = Service.open(unpacked, settings | {"quarantine": str(tmp_path / "kept")})
    assert "explanation" in why(service, png(image))[1]
    service._quarantine._waiting.join()  # type: ignore[union-attr]
    (file,) = (tmp_path / "kept").glob("*.png")
    assert "explanation" not in json.loads(Image.open(file).text["rampart"])  # type: ignore[attr-defined]
    image[0, 0] ^= 1
    _, content = why(service, png(image))
    assert content["detail"]["similar_query"] and "explanation" not in content


class Slow:
    """The graph, by a clock on which each image takes so long."""

    def __init__(self, engine: Engine, clock: Clock, seconds: float) -> None:
        self._engine, self._clock, self._seconds = engine, clock, seconds
        self.device, self.image_shape = engine.device, engine.image_shape

    def run(self, images: np.ndarray) -> Outputs:
        self._clock.now += self._seconds * len(images)
        return self._engine.run(images)


def test_explanations_take_no_more_than_idle_time_and_a_tenth_and_leave_others_their_verdicts(
    service: Service, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, picture = Clock(), png(pixels)
    monkeypatch.setattr(service, "_budget", Budget(clock.monotonic))
    monkeypatch.setattr(service, "_engine", Slow(service._engine, clock, 0.01))  # type: ignore[arg-type]
    wants = [Incoming({}, [picture], explain=True)] * 3 + [Incoming({}, [picture])]
    began, explained = clock.now, 0
    for _ in range(200):
        replies = service.answer(wants)
        assert replies[3].status == 200
        assert {reply.status for reply in replies} <= {200, 503}
        assert all(r.headers["retry-after"] == "1" for r in replies if r.status == 503)
        explained += sum(reply.status == 200 for reply in replies[:3])
    spent = explained * 0.01 * reasons.IMAGES
    assert MAX_CREDIT < spent <= 0.12 * (clock.now - began) + 2 * MAX_CREDIT
    clock.now += 2  # at rest it saves up
    assert service.answer(wants[:1])[0].status == 200


def test_a_batch_out_of_time_ends_an_explanation(
    service: Service, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(service, "_budget", Budget(clock.monotonic))
    monkeypatch.setattr(service, "_engine", Slow(service._engine, clock, 0.4))  # type: ignore[arg-type]
    began = clock.now
    status, content = why(service, png(pixels))
    assert (status, content["type"]) == (503, "busy")
    assert clock.now - began < 15  # and not 26


def test_what_fails_in_the_graph_is_the_request_own_fault_alone(
    service: Service, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = service._engine.run

    def fails(images: np.ndarray) -> Outputs:
        if len(images) > 2:
            raise RuntimeError("CUDA")
        return run(images)

    monkeypatch.setattr(service._engine, "run", fails)
    replies = service.answer(
        [Incoming({}, [png(pixels)], explain=True), Incoming({}, [png(pixels)])]
    )
    assert [reply.status for reply in replies] == [500, 200]


def test_scores_that_are_no_numbers_become_null(tiny_calibration: Calibration) -> None:
    judge = Judge(tuple("abcdefghij"), tiny_calibration, Policy(0.05), {})
    count = len(tiny_calibration.detectors)
    outputs = Outputs(
        np.zeros((65, 10), np.float32),
        np.zeros((65, 10), np.float32),
        np.full((65, count), np.nan, np.float32),
        np.zeros((65, 8, 8, 3), np.uint8),
    )
    found = reasons.explanation(np.zeros((8, 8, 3), np.uint8), outputs, judge)
    assert json.dumps(found, allow_nan=False)
    assert found["detectors"][0]["score"] is None


def test_a_verdict_is_read_back_with_its_explanation(service: Service, pixels: np.ndarray) -> None:
    content = why(service, png(pixels))[1]
    verdict = Verdict.from_dict(content)
    assert json.loads(json.dumps(verdict.to_dict())) == content
    assert "explanation" not in replace(verdict, explanation=None).to_dict()
