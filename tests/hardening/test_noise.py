import pytest
import torch

from rampart.hardening.attack.noise import Noise, mix

INDEX = torch.arange(200)


def test_mixing_is_that_of_splitmix64() -> None:
    # The first outputs from seed 1234567, as published with the reference implementation.
    golden = 0x9E3779B97F4A7C15 - 2**64
    state = torch.tensor([1234567]) + torch.arange(1, 4) * golden
    unsigned = [value % 2**64 for value in mix(state).tolist()]
    assert unsigned == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_draws_fill_the_unit_interval_evenly() -> None:
    draws = Noise(INDEX).uniform(3, 8, 8).flatten()
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    expected = len(draws) / 20
    # Chi-square with 19 degrees of freedom: above 43.8 once in a thousand.
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8


def test_normal_draws_have_the_moments_of_a_normal_variable() -> None:
    draws = Noise(INDEX).normal(500).flatten()
    moments = [float((draws**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.1)


@pytest.mark.parametrize(
    "other",
    [Noise(INDEX, seed=1), Noise(INDEX, epoch=1), Noise(INDEX + 200)],
    ids=["seed", "epoch", "index"],
)
def test_other_keys_draw_unrelated_numbers(other: Noise) -> None:
    pair = torch.stack([noise.uniform(64).flatten() for noise in (Noise(INDEX), other)])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.04


def test_neighbours_and_later_draws_are_unrelated() -> None:
    noise = Noise(INDEX)
    first, second = noise.uniform(64), noise.uniform(64)
    for a, b in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        pair = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.04


def test_a_samples_draws_do_not_depend_on_who_is_beside_it() -> None:
    few = torch.tensor([7, 150])
    assert torch.equal(Noise(few).normal(4), Noise(INDEX).normal(4)[few])
