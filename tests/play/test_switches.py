"""The p-value that some detectors would give."""

import math

import numpy as np
import pytest

from rampart.handlers.verdict import Calibration, p_values, surprises
from rampart.hardening.model.calibrate import scores_of
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.play.switches import p_value_of


@pytest.fixture(scope="module")
def clean(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, tiny_calibration: Calibration
) -> np.ndarray:
    """The scores (N, D) of the images that the calibration ranks."""
    return scores_of(tiny_pipeline, split(tiny_images, "calibration").image)


def test_all_detectors_give_the_p_value_of_the_endpoint(
    clean: np.ndarray, tiny_calibration: Calibration
) -> None:
    rows, expected = surprises(clean, tiny_calibration), p_values(clean, tiny_calibration)
    for row, p in zip(rows, expected, strict=True):
        chosen = p_value_of(tiny_calibration, row, tiny_calibration.detectors)
        assert chosen == (pytest.approx(p), False)


@pytest.mark.parametrize(
    "names",
    [
        ("energy",),
        ("median",),
        ("confidence", "energy"),
        ("median", "bit_depth"),
        ("confidence", "energy", "feature_distance", "median", "disagreement"),
    ],
)
def test_some_detectors_flag_about_as_many_clean_images_as_their_p_value_says(
    names: tuple[str, ...], clean: np.ndarray, tiny_calibration: Calibration
) -> None:
    rows = surprises(clean, tiny_calibration)
    chosen = [p_value_of(tiny_calibration, row, names) for row in rows]
    assert {one.estimated for one in chosen} == {len(names) > 1}
    p = np.array([one.p_value for one in chosen])
    for rate in (0.1, 0.25, 0.5):
        assert (p <= rate).mean() == pytest.approx(rate, abs=0.13), rate


@pytest.mark.parametrize(("same", "expected"), [(True, math.exp(-3)), (False, 7 * math.exp(-6))])
def test_detectors_that_agree_count_as_one_and_others_as_many(same: bool, expected: float) -> None:
    drawn = np.random.default_rng(0).exponential(size=(20_000, 4))
    drawn = np.repeat(drawn[:, :1], 4, axis=1) if same else drawn  # surprises (N, 4)
    knots, names = np.linspace(0, 12, 5), ("a", "b", "c", "d")
    ranks = np.sort(drawn.sum(1))
    table = Calibration(names, np.tile(knots, (4, 1)), knots, ranks, len(ranks), "lean")
    chosen = p_value_of(table, np.full(4, 3.0), ("a", "d"))
    assert chosen == (pytest.approx(expected, rel=0.1), True)


def test_no_detector_finds_anything_unusual(tiny_calibration: Calibration) -> None:
    row = np.full(len(tiny_calibration.detectors), 50.0)
    assert p_value_of(tiny_calibration, row, ()) == (1.0, False)


def test_no_p_value_is_below_what_so_many_images_can_tell(tiny_calibration: Calibration) -> None:
    row, least = np.full(len(tiny_calibration.detectors), 1e9), 1 / (tiny_calibration.images + 1)
    for names in (("energy",), ("energy", "median"), tiny_calibration.detectors):
        assert p_value_of(tiny_calibration, row, names).p_value == pytest.approx(least)
