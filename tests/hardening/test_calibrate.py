from pathlib import Path

import numpy as np
import pytest
import torch

from rampart.handlers.verdict import Calibration, combine, p_values
from rampart.hardening.model import calibrate
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier


@pytest.fixture(scope="module")
def full(tiny_folder: Path) -> Calibration:
    return calibrate.load_variant(tiny_folder, "full")


def gaussian(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)) * [1.0, 5.0, 0.01]


def from_scores(tuning: np.ndarray, ranked: np.ndarray) -> Calibration:
    knots, surprise = calibrate.tables(tuning)
    first = Calibration(("a", "b", "c"), knots, surprise, np.zeros(1), 1, "full")
    return Calibration(
        first.detectors, knots, surprise, np.sort(combine(ranked, first)), len(ranked), "full"
    )


def test_torch_and_numpy_combine_scores_alike(
    full: Calibration, tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    scores = torch.from_numpy(calibrate.scores_of(tiny_pipeline, tiny_images.image))
    # Also far beyond the tables on both sides, where the extrapolation rules differ.
    scores = torch.cat([scores, scores * 3, scores / 3, scores - 1])
    expected = combine(scores.numpy(), full)
    np.testing.assert_allclose(calibrate.combined(scores, full), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.2])
def test_the_threshold_flags_exactly_where_the_p_value_does(rate: float) -> None:
    calibration = from_scores(gaussian(300, 0), gaussian(700, 1))
    scores = gaussian(4000, 2) * 1.5
    flagged = combine(scores, calibration) > calibrate.threshold(calibration, rate)
    np.testing.assert_array_equal(flagged, p_values(scores, calibration) < rate)


def test_too_few_images_for_a_rate_never_flag() -> None:
    calibration = from_scores(gaussian(300, 0), gaussian(50, 1))
    assert calibrate.threshold(calibration, 0.01) == np.inf
    assert (p_values(gaussian(100, 2) * 100, calibration) >= 0.01).all()


def test_clean_images_are_flagged_at_the_promised_rate() -> None:
    # Over 200 calibrations the mean flag rate is at most alpha, and not far below it.
    rates = [
        (
            p_values(
                gaussian(200, 3 * i),
                from_scores(gaussian(200, 3 * i + 1), gaussian(199, 3 * i + 2)),
            )
            < 0.05
        ).mean()
        for i in range(200)
    ]
    assert 0.04 < np.mean(rates) < 0.05 + 3 * np.std(rates) / np.sqrt(200)


def test_the_margin_has_gradients_inside_and_beyond_the_tables(full: Calibration) -> None:
    scores = torch.tensor(full.knots[:, [20, -1]].T.copy())
    scores[1] = scores[1] * 2 + 10
    scores.requires_grad_()
    calibrate.detection_margin(scores, full, 0.01).sum().backward()
    assert (scores.grad > 0).all()


def test_the_margin_is_positive_exactly_on_flagged_images(
    full: Calibration, tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    scores = torch.from_numpy(calibrate.scores_of(tiny_pipeline, tiny_images.image))
    margin = calibrate.detection_margin(scores, full, 0.1).numpy()
    np.testing.assert_array_equal(margin > 0, p_values(scores.numpy(), full) < 0.1)
    assert 0 < (margin > 0).mean() < 0.3


def test_too_few_held_out_images_are_refused(
    tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    with pytest.raises(ValueError, match=r"36 held-out images leave 19 .* needs at least 20"):
        calibrate.calibrate(tiny_pipeline, tiny_images[slice(36)], "full")
    assert calibrate.calibrate(tiny_pipeline, tiny_images[slice(37)], "full").images == 20


def test_a_written_calibration_loads_as_it_was(tmp_path: Path, full: Calibration) -> None:
    file = calibrate.write(tmp_path, full, "blobs")
    again = Calibration.load(file)
    assert again.detectors == full.detectors
    np.testing.assert_array_equal(again.combined, full.combined)
    np.testing.assert_array_equal(again.knots, full.knots)
