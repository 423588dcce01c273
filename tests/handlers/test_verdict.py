"""Scores to p-values to verdicts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rampart.handlers.verdict import (
    Calibration,
    Judge,
    Policy,
    combine,
    drift,
    drift_by_chance,
    p_values,
    surprises,
)

RNG = np.random.default_rng(0)
KNOTS = np.array([[0.0, 1.0, 2.0, 4.0], [-1.0, -1.0, 0.5, 0.5]])
SURPRISE = np.array([0.0, 1.0, 2.0, 5.0])


def calibration(images: int = 199) -> Calibration:
    combined = np.linspace(0.0, 10.0, images)
    return Calibration(("first", "second"), KNOTS, SURPRISE, combined, images, "full")


def judge(**policy: object) -> Judge:
    labels = tuple("abcdefg")
    return Judge(labels, calibration(), Policy(**policy), {"name": "m", "version": "1"})


def by_hand(score: float, knots: list[float], surprise: list[float]) -> float:
    if score <= knots[0]:
        return 0.0
    if score > knots[-1]:
        half = len(knots) // 2
        gap = max(knots[-1] - knots[half], 1e-6)
        return surprise[-1] + (surprise[-1] - surprise[half]) / gap * (score - knots[-1])
    last = max(i for i in range(len(knots)) if knots[i] <= score)
    if last == len(knots) - 1:
        return surprise[-1]
    share = (score - knots[last]) / (knots[last + 1] - knots[last])
    return surprise[last] + share * (surprise[last + 1] - surprise[last])


def test_combination_is_the_sum_of_interpolated_surprises() -> None:
    scores = np.stack([RNG.uniform(-1, 6, 200), RNG.uniform(-2, 1, 200)], axis=1)
    expected = np.array(
        [
            [by_hand(score, list(KNOTS[i]), list(SURPRISE)) for i, score in enumerate(row)]
            for row in scores
        ]
    )
    np.testing.assert_allclose(surprises(scores, calibration()), expected, rtol=1e-12)
    np.testing.assert_allclose(combine(scores, calibration()), expected.sum(1), rtol=1e-12)


@pytest.mark.parametrize(
    ("score", "surprise"),
    [(-9.0, 0.0), (0.0, 0.0), (0.5, 0.5), (3.0, 3.5), (4.0, 5.0), (6.0, 8.0)],
)
def test_surprise_is_clamped_below_and_extrapolated_above(score: float, surprise: float) -> None:
    assert combine(np.array([[score, -1.0]]), calibration()) == pytest.approx([surprise])


def test_a_score_at_tied_first_knots_is_no_surprise() -> None:
    assert combine(np.array([[0.0, -1.0]]), calibration()) == [0.0]


def test_more_suspicious_scores_never_raise_the_p_value() -> None:
    rising = np.linspace(-2, 8, 500)
    p = p_values(np.stack([rising, np.zeros(500)], axis=1), calibration())
    assert (np.diff(p) <= 0).all()


def test_p_value_counts_the_image_itself_and_ties() -> None:
    table = replace(calibration(3), combined=np.array([1.0, 2.0, 2.0]))
    scores = np.array([[0.5, -1.0], [1.0, -1.0], [2.0, -1.0], [2.1, -1.0]])
    np.testing.assert_allclose(p_values(scores, table), [4 / 4, 4 / 4, 3 / 4, 1 / 4])


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_gives_the_smallest_p_value(score: float) -> None:
    scores = np.array([[score, -1.0], [0.0, score]])
    np.testing.assert_array_equal(combine(scores, calibration()), [np.inf, np.inf])
    p = p_values(scores, calibration())
    np.testing.assert_array_equal(p, [1 / 200, 1 / 200])


def test_clean_images_are_flagged_at_most_at_the_promised_rate() -> None:
    """Averaged over calibration draws, as split conformal promises it."""
    flagged = []
    for _ in range(300):
        scores = RNG.normal(1.5, 1.5, (400, 2))
        table = calibration(99)
        table = replace(table, combined=np.sort(combine(scores[:99], table)))
        flagged.append((p_values(scores[99:], table) < 0.05).mean())
    assert 0.03 < np.mean(flagged) <= 0.05


def test_scores_of_another_number_of_detectors_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 2 detectors"):
        combine(np.zeros((1, 3)), calibration())


GOOD = {
    "variant": "full",
    "detectors": ["first", "second"],
    "knots": KNOTS.tolist(),
    "surprise": SURPRISE.tolist(),
    "combined": [0.0, 1.0, 1.0],
    "images": 3,
    "data": "made up",
}


def test_a_calibration_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(GOOD))
    read = Calibration.load(path)
    assert (read.detectors, read.images, read.variant) == (("first", "second"), 3, "full")
    np.testing.assert_array_equal(read.knots, KNOTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "best"}, "variant"),
        ({"detectors": ["first", "first"]}, "detectors"),
        ({"detectors": []}, "detectors"),
        ({"knots": [[0, 1, 2, 4]]}, "one row a detector"),
        ({"knots": [[0, 1, 2, 4], [0, 1, 2]]}, "calibration.json"),
        ({"knots": [[0, 1, 2, 1], [0, 1, 2, 3]]}, "do not decrease"),
        ({"knots": [[0, 1, 2, math.nan], [0, 1, 2, 3]]}, "finite"),
        ({"surprise": [1, 2, 3, 4]}, "starts at 0"),
        ({"surprise": [0, 2, 2, 4]}, "starts at 0"),
        ({"combined": [1, 0, 2]}, "sorted"),
        ({"images": 4}, "one value an image"),
        ({"combined": [], "images": 0}, "one value an image"),
    ],
)
def test_a_malformed_calibration_file_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)


@pytest.mark.parametrize("missing", sorted(set(GOOD) - {"data"}))
def test_a_missing_entry_is_named(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != missing}))
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        Calibration.load(path)


CALM, ALARMING = [[0.0, -1.0]], [[9.0, 9.0]]
LOGITS = np.array([[0, 1, 2, 3, 6, 5, 4]], dtype=np.float32)
RAW = np.array([[9, 1, 2, 3, 4, 5, 6]], dtype=np.float32)


def verdict(scores: list[list[float]], **policy: object) -> dict[str, object]:
    (answer,) = judge(**policy).verdicts(LOGITS, RAW, np.array(scores, dtype=np.float32))
    return answer.to_dict()


def test_an_unsuspicious_image_is_accepted_with_its_label() -> None:
    answer = verdict(CALM)
    exponentials = np.exp(np.arange(7.0))
    assert answer["label"] == "e" and answer["index"] == 4 and answer["decision"] == "accept"
    assert answer["confidence"] == pytest.approx(exponentials[6] / exponentials.sum(), rel=1e-5)
    assert [entry["label"] for entry in answer["top"]] == list("efgdc")
    assert answer["model"] == {"name": "m", "version": "1"}
    assert answer["detail"] == {
        "p_value": 1.0,
        "scores": {"first": 0.0, "second": -1.0},
        "raw_label": "a",
        "changed_by_purifier": True,
    }


def test_a_flag_keeps_the_label_and_a_reject_hides_it() -> None:
    flagged, rejected = verdict(ALARMING), verdict(ALARMING, on_detection="reject")
    assert (flagged["decision"], flagged["label"]) == ("flag", "e")
    assert rejected["decision"] == "reject" and not rejected["top"]
    assert [rejected[key] for key in ("label", "index", "confidence")] == [None] * 3


def test_a_shadow_is_told_to_the_operator_and_not_to_the_client() -> None:
    (shadowed,) = judge(on_detection="shadow").verdicts(LOGITS, RAW, np.array(ALARMING))
    assert shadowed.detected and shadowed.p_value < 0.01
    assert shadowed.to_dict() == verdict(ALARMING) | {"decision": "accept"}


def test_where_the_defence_fails_closed_no_rate_lets_the_image_through() -> None:
    broken = np.array([[math.nan, 0.0]], dtype=np.float32)
    (answer,) = judge(false_alarm_rate=0.0).verdicts(LOGITS, RAW, broken)
    assert (answer.decision, answer.failed) == ("flag", True)
    # Who only looks on changes no answer, and is told.
    (answer,) = judge(on_detection="shadow").verdicts(LOGITS, RAW, broken)
    assert (answer.decision, answer.detected, answer.failed) == ("accept", True, True)


def test_where_the_defence_fails_open_the_classifiers_word_stands() -> None:
    broken = np.full_like(LOGITS, math.nan)
    for logits, scores in ((broken, CALM), (LOGITS, [[math.nan, 0.0]])):
        made = np.array(scores, dtype=np.float32)
        (answer,) = judge(on_failure="open").verdicts(logits, RAW, made)
        assert (answer.label, answer.decision, answer.failed) == ("a", "accept", True)
        json.dumps(answer.to_dict(), allow_nan=False)
    (sound,) = judge(on_failure="open").verdicts(LOGITS, RAW, np.array(ALARMING))
    assert (sound.label, sound.decision, sound.failed) == ("e", "flag", False)
    with pytest.raises(ValueError, match="not finite"):
        judge(on_failure="open").verdicts(broken, broken, np.array(CALM))


def test_public_detail_shows_no_scores() -> None:
    assert set(verdict(ALARMING, detail="public")) == set(verdict(ALARMING)) - {"detail"}


def test_a_rate_of_zero_never_flags() -> None:
    assert verdict(ALARMING, false_alarm_rate=0.0)["decision"] == "accept"


def test_nan_scores_are_flagged_and_stay_json() -> None:
    answer = verdict([[math.nan, 0.0]])
    assert answer["decision"] == "flag"
    assert json.loads(json.dumps(answer, allow_nan=False))["detail"]["scores"]["first"] is None


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_verdict(logit: float) -> None:
    broken = LOGITS.copy()
    broken[0, 3] = logit
    for logits, raw in ((broken, RAW), (LOGITS, broken)):
        with pytest.raises(ValueError, match="not finite"):
            judge().verdicts(logits, raw, np.zeros((1, 2), dtype=np.float32))


@pytest.mark.parametrize(
    "policy",
    [
        {"false_alarm_rate": -0.1},
        {"false_alarm_rate": 1.0},
        {"false_alarm_rate": math.nan},
        {"on_detection": "shrug"},
        {"detail": "some"},
        {"on_failure": "ajar"},
    ],
)
def test_a_policy_outside_its_choices_is_refused(policy: dict[str, object]) -> None:
    (name,) = policy
    with pytest.raises(ValueError, match=name):
        Policy(**policy)


def test_a_rate_finer_than_the_calibration_is_refused() -> None:
    """Otherwise nothing could ever be flagged."""
    with pytest.raises(ValueError, match="199 calibration images cannot support"):
        judge(false_alarm_rate=0.005)
    assert judge(false_alarm_rate=0.0051)


def test_drift_of_images_as_calibrated_stays_below_its_bound() -> None:
    generator = np.random.default_rng(0)
    bound, seen = drift_by_chance(150, 300), []
    for _ in range(500):
        scores = generator.normal(size=(450, 1))
        knots = np.quantile(scores[:300], [0, 0.5, 1])[None]
        ranked = replace(FLAT, knots=knots)
        ranked = replace(ranked, combined=np.sort(combine(scores[:300], ranked)), images=300)
        seen.append(drift(p_values(scores[300:], ranked)))
    assert 0.02 < np.mean(np.array(seen) > bound) < 0.08


FLAT = Calibration(("a",), np.zeros((1, 3)), np.array([0.0, 1.0, 2.0]), np.zeros(1), 1, "lean")


def test_drift_is_large_where_p_values_are_not_uniform() -> None:
    assert drift(np.random.default_rng(0).random(400) ** 3) > 0.3
    assert drift(np.ones(10)) == pytest.approx(1.0)
    assert drift(np.full(10, 0.5)) == pytest.approx(0.5)
