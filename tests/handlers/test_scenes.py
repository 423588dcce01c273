"""Candidates of an object detector to boxes of the picture, and what clients see of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms

from rampart.handlers.engine import SceneOutputs
from rampart.handlers.image import View, framed
from rampart.handlers.protocols.open_inference import SCENE_OUTPUTS, replier
from rampart.handlers.scenes import MAX_BOXES, SceneJudge, SceneVerdict, distinct
from rampart.handlers.tasks import terms
from rampart.handlers.verdict import Calibration, Policy

LABELS = "red", "white"
NO_BOX = 4 * (0.0,)


def judge(min_confidence: float = 0.5, **policy: Any) -> SceneJudge:
    knots, surprise = np.linspace(0, 1, 5)[None], np.linspace(0, 4, 5)
    ranks = Calibration(("a",), knots, surprise, np.linspace(0, 4, 199), 199, "lean")
    model = {"name": "m", "version": "1"}
    return SceneJudge(LABELS, ranks, Policy(**policy), model, min_confidence)


def outputs(*rows: tuple[float, int, tuple[float, ...]], score: float = 0.0) -> SceneOutputs:
    """Of one picture: (confidence, label, box) of each candidate."""
    confidences, labels, boxes = zip(*rows, strict=True)
    return SceneOutputs(
        np.array([boxes], np.float32),
        np.array([confidences], np.float32),
        np.array([labels], np.int64),
        np.array([[score]], np.float32),
    )


def view(width: int = 64, height: int = 64) -> View:
    return framed(Image.new("RGB", (width, height)), 64, (width, height))


def verdict(*rows: tuple[float, int, tuple[float, ...]], **policy: Any) -> SceneVerdict:
    (one,) = judge(**policy).of(outputs(*rows), [view()])
    return one


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("above", [0.05, 0.6])
def test_the_boxes_that_are_kept_are_those_of_torchvision(seed: int, above: float) -> None:
    draw = np.random.default_rng(seed)
    corners = draw.uniform(0, 200, (600, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(1, 80, (600, 2))], 1)
    boxes, confidences = boxes.astype(np.float32), draw.random(600).astype(np.float32)
    labels = draw.integers(0, 3, 600)
    kept = distinct(boxes, confidences, labels, above=above, overlap=0.45)
    sure = torch.from_numpy(confidences > above)
    parts = [torch.from_numpy(part)[sure] for part in (boxes, confidences, labels)]
    expected = sure.nonzero().squeeze(1)[batched_nms(*parts, 0.45)][:MAX_BOXES]
    assert kept.tolist() == expected.tolist() and len(kept) > 20


@pytest.mark.parametrize("seed", range(3))
def test_what_many_candidates_cover_is_kept_once_however_many_there_are(seed: int) -> None:
    """More candidates of one object than are compared at once."""
    draw = np.random.default_rng(seed)
    objects = draw.integers(0, 8, 700)
    corners = np.stack([objects % 4 * 60.0, objects // 4 * 60.0], 1) + draw.normal(0, 2, (700, 2))
    boxes = np.concatenate([corners, corners + 40], 1).astype(np.float32)
    confidences, labels = draw.random(700).astype(np.float32), objects % 2
    kept = distinct(boxes, confidences, labels, above=0.05, overlap=0.45)
    parts = [torch.from_numpy(part) for part in (boxes, confidences, labels)]
    assert kept.tolist() == batched_nms(*parts, 0.45).tolist() and len(kept) < 16


def test_no_candidate_and_no_sure_one_are_no_boxes() -> None:
    assert verdict((0.5, 0, (1, 1, 9, 9))).boxes == ()
    empty = SceneOutputs(
        np.zeros((1, 0, 4), np.float32),
        np.zeros((1, 0), np.float32),
        np.zeros((1, 0), np.int64),
        np.zeros((1, 1), np.float32),
    )
    assert judge().of(empty, [view()])[0].boxes == ()


def test_of_one_class_overlapping_boxes_are_one_and_of_two_classes_two() -> None:
    rows = [(0.9, 0, (0, 0, 10, 10)), (0.8, 0, (1, 0, 11, 10)), (0.7, 1, (0, 0, 10, 10))]
    boxes = verdict(*rows).boxes
    assert [(box["label"], box["index"]) for box in boxes] == [("red", 0), ("white", 1)]
    assert [box["confidence"] for box in boxes] == pytest.approx([0.9, 0.7], abs=1e-6)


@pytest.mark.parametrize(("width", "height"), [(128, 64), (64, 128), (640, 480), (30, 50)])
def test_boxes_are_in_pixels_of_the_picture_as_sent_and_within_it(width: int, height: int) -> None:
    scale = 64 / max(width, height)
    left, top = (64 - width * scale) / 2, (64 - height * scale) / 2
    own = (0.25 * width, 0.5 * height, 0.75 * width, height)
    inside = np.array(own) * scale + (left, top, left, top)
    found = outputs((0.9, 0, tuple(inside + np.array([0, 0, 0, 9]))), (0.8, 1, (-5, -5, -1, 70)))
    (one,) = judge().of(found, [view(width, height)])
    (box,) = one.boxes  # the other lies outside, so it is none
    assert box["box"] == pytest.approx(own, abs=0.51 / scale)
    assert box["box"][3] == height


def test_a_detection_is_flagged_or_withholds_the_boxes_and_is_never_hidden_from_the_operator() -> (
    None
):
    row, found = (0.9, 0, (0, 0, 9, 9)), {}
    for policy in ("flag", "reject", "shadow"):
        (found[policy],) = judge(false_alarm_rate=0.05, on_detection=policy).of(
            outputs(row, score=5.0), [view()]
        )
    assert [one.decision for one in found.values()] == ["flag", "reject", "accept"]
    assert [len(one.boxes) for one in found.values()] == [1, 0, 1]
    assert all(one.detected and one.p_value == 0.005 for one in found.values())


def test_a_score_that_is_no_number_counts_as_detected_unless_failures_are_open() -> None:
    found = outputs((0.9, 0, (0, 0, 9, 9)), score=np.nan)
    for failure, decision in (("closed", "flag"), ("open", "accept")):
        (one,) = judge(on_failure=failure).of(found, [view()])
        assert (one.decision, one.failed) == (decision, True)
        assert one.to_dict()["detail"]["scores"] == {"a": None}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (outputs((np.nan, 0, NO_BOX)), "not finite"),
        (outputs((0.9, 0, (np.inf,) * 4)), "not finite"),
        (outputs((0.9, 2, NO_BOX)), "beyond the 2"),
        (outputs((0.9, 0, NO_BOX))._replace(labels=np.zeros((1, 2), np.int64)), "do not fit"),
    ],
)
def test_candidates_that_nobody_should_trust_are_refused(found: SceneOutputs, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        judge().of(found, [view()])


def test_the_json_of_a_verdict_hides_scores_where_the_policy_is_public() -> None:
    row = (0.9, 1, (8, 8, 16, 24))
    full, public = (verdict(row, detail=detail).to_dict() for detail in ("full", "public"))
    expected = {"label": "white", "index": 1, "confidence": 0.9, "box": [8, 8, 16, 24]}
    assert full["boxes"] == (expected,)
    assert full["detail"] == {"p_value": 1.0, "scores": {"a": 0.0}}
    assert set(public) == {"boxes", "decision", "model"} == set(full) - {"detail"}


def test_the_threshold_is_the_cards_unless_the_operator_sets_another() -> None:
    card = {"task": "detect", "min_confidence": 0.3, "max_overlap": 0.5}
    assert terms(card, {}) == {"min_confidence": 0.3, "max_overlap": 0.5}
    assert terms(card, {"min_confidence": 0.7})["min_confidence"] == 0.7
    with pytest.raises(ValueError, match="min_confidence is not a setting for this kind"):
        terms({}, {"min_confidence": 0.7})
    with pytest.raises(ValueError, match=r"the card's task is segment.*classify, detect"):
        terms({"task": "segment"}, {})


@pytest.mark.parametrize("share", [0, 1, -0.1, "0.5", True, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match="min_confidence must be a number above 0 and below 1"):
        judge(min_confidence=share)


def test_tensors_have_rows_as_long_as_the_longest_and_a_count_of_what_is_real() -> None:
    two = verdict((0.9, 0, (0, 0, 8, 8)), (0.8, 1, (16, 16, 32, 32))).to_dict()
    none = replace(verdict((0.1, 0, NO_BOX)), decision="flag").to_dict()
    code, body = replier({}, SCENE_OUTPUTS)([(200, two), (200, none)])
    tensors = {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in body["outputs"]}
    assert code == 200 and tensors["count"].tolist() == [2, 0]
    assert tensors["boxes"].tolist() == [
        [[0, 0, 8, 8], [16, 16, 32, 32]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    assert tensors["label"].tolist() == [["red", "white"], ["", ""]]
    assert tensors["index"].tolist() == [[0, 1], [-1, -1]]
    assert tensors["confidence"].tolist() == [[0.9, 0.8], [0, 0]]
    assert tensors["decision"].tolist() == ["accept", "flag"]
    assert tensors["p_value"].shape == (2,)


def test_a_reply_without_any_box_still_has_a_row() -> None:
    _, body = replier({}, SCENE_OUTPUTS)([(200, verdict((0.1, 0, NO_BOX)).to_dict())])
    shapes = {one["name"]: one["shape"] for one in body["outputs"]}
    assert shapes["boxes"] == [1, 1, 4] and shapes["label"] == [1, 1] and shapes["count"] == [1]
