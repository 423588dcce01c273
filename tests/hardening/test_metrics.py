import numpy as np
import pytest

from rampart.hardening.judge import metrics


@pytest.mark.parametrize(
    ("value", "n", "low", "high"),
    # Published Wilson intervals: 0/10, 5/10, 81/263 (Newcombe 1998, table I).
    [(0.0, 10, 0.0, 0.2775), (0.5, 10, 0.2366, 0.7634), (81 / 263, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_match_published_ones(
    value: float, n: int, low: float, high: float
) -> None:
    assert metrics.wilson(value, n) == pytest.approx((low, high), abs=1e-4)


def test_a_difference_is_paired() -> None:
    first = np.arange(100) < 60
    gap, (low, high) = metrics.difference(first, np.arange(100) < 50)
    assert gap == pytest.approx(0.10)
    # Ten images of a hundred differ, all one way: +-1.96 sqrt(0.1 * 0.9 / 100) = +-0.059.
    assert (low, high) == pytest.approx((0.041, 0.159), abs=0.02)


def test_no_difference_in_n_images_leaves_room_for_three_in_n() -> None:
    same = np.arange(100) < 60
    assert metrics.difference(same, same) == (0.0, (-0.03, 0.03))
    assert metrics.difference(same, ~same)[0] == pytest.approx(0.2)
    everywhere = np.ones(100, bool)
    assert metrics.difference(everywhere, ~everywhere) == (1.0, (0.97, 1.0))


def test_the_true_positive_rate_is_taken_where_no_more_clean_images_are_flagged() -> None:
    clean = np.arange(100, dtype=float)
    attacked = np.array([98.5, 99.5, 94.0, 0.0])
    curve = metrics.roc(clean, attacked)
    assert metrics.tpr_at_fpr(*curve, 0.01) == 0.5  # above 98: one clean image flagged
    assert metrics.tpr_at_fpr(*curve, 0.05) == 0.5  # above 94, strictly
    assert metrics.tpr_at_fpr(*curve, 0.06) == 0.75


def test_detection_figures_come_with_intervals_that_hold_them() -> None:
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=80), generator.normal(1.0, size=60)
    done = metrics.detection(clean, attacked)
    assert list(done) == ["tpr@1%fpr", "tpr@5%fpr", "auroc"]
    for value, (low, high) in done.values():
        assert low <= value <= high
    value, (low, high) = done["auroc"]
    assert value == pytest.approx(0.76, abs=0.08)  # Phi(1 / sqrt(2))
    assert 0.05 < high - low < 0.25


def test_no_detection_of_few_images_is_certain() -> None:
    clean, attacked = np.arange(40.0), 100 + np.arange(5.0)
    for value, (low, high) in metrics.detection(clean, attacked).values():
        assert (value, high) == (1.0, 1.0) and low == pytest.approx(0.4)


def test_an_auroc_of_one_half_means_no_separation() -> None:
    clean = np.arange(50, dtype=float)
    assert metrics.detection(clean, clean)["auroc"][0] == 0.5
    assert metrics.detection(clean, clean + 100)["auroc"][0] == 1.0
