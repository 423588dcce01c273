import numpy as np
import pytest

from rampart.handlers.verdict import p_values
from rampart.hardening.model import calibrate, promise
from rampart.hardening.model.images import PARTS, SPLITS
from rampart.hardening.model.promise import PromiseCheck


@pytest.mark.parametrize(
    ("images", "rate"), [(20, 0.05), (49, 0.05), (50, 0.02), (99, 0.02), (100, 0.01), (2670, 0.01)]
)
def test_the_lowest_usual_rate_that_so_many_images_can_tell_is_promised(
    images: int, rate: float
) -> None:
    assert promise.finest_rate(images) == rate
    ranks = np.linspace(0, 1, images)
    table = calibrate.Calibration(
        ("a",), np.array([[0.0, 1.0, 2.0]]), np.array([0.0, 1.0, 2.0]), ranks, images, "lean"
    )
    table.check_rate(rate)
    assert promise.least_images(rate) <= images
    assert p_values(np.array([[9.0]]), table)[0] < rate  # it flags at all


def test_the_bound_holds_for_95_of_100_calibration_sets() -> None:
    """Scores are uniform, so what a threshold flags is known exactly."""
    draws = np.random.default_rng(0).random((4000, 77))
    ranks = promise.flagged_ranks(0.02, 77)
    assert ranks == 1
    flagged = 1 - np.sort(draws, axis=1)[:, -ranks]
    assert np.mean(flagged) <= 0.02
    assert 0.94 < np.mean(flagged <= promise.bound(0.02, 77)) < 0.96
    low, high = promise.spread(0.02, 77)
    assert 0.94 < np.mean((low <= flagged) & (flagged <= high)) < 0.96


def test_the_promise_is_told_on_average_and_for_this_set() -> None:
    text = promise.in_words(promise.finest_rate(31), 31)
    assert text.startswith("at most 5.0% of clean images flagged on average over calibration sets")
    assert text.endswith("for this one of 31 images up to 9.2% with 95% confidence")


@pytest.mark.parametrize("ranked", [20, 50, 100])
def test_as_many_held_out_images_as_are_asked_for_leave_enough_to_rank(ranked: int) -> None:
    held, (first, last) = promise.held_for(ranked), SPLITS["calibration"]
    assert ranked <= held * last // PARTS - held * first // PARTS < ranked + 10


def test_more_flags_than_chance_explains_break_a_promise_and_fewer_do_not() -> None:
    """With 103 ranks, 1% is the one most suspicious: among 58 more images 3 are chance."""
    usual, broken = (PromiseCheck.on(k, 58, rate=0.01, ranked=103) for k in (3, 8))
    assert not usual.broken and "Warning" not in usual.in_words()
    assert "3 of 58 validation images flagged, 5.2% (1.8% to 14.1%), where 1.0% is promised" in (
        usual.in_words()
    )
    assert broken.broken and "Warning" in broken.in_words()
    assert PromiseCheck.on(0, 58, rate=0.01, ranked=103).chance == 1


def test_the_chance_of_so_many_flags_is_what_many_draws_show() -> None:
    draws = np.random.default_rng(1).random((20000, 50 + 30))
    threshold = np.sort(draws[:, :50], axis=1)[:, -promise.flagged_ranks(0.05, 50)]
    flagged = (draws[:, 50:] > threshold[:, None]).sum(1)
    for count in (1, 3, 5):
        chance = PromiseCheck.on(count, 30, rate=0.05, ranked=50).chance
        assert abs(chance - np.mean(flagged >= count)) < 0.01
