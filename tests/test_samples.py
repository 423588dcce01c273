"""Drawn traffic signs."""

from pathlib import Path

import numpy as np
import pytest
from command import run
from PIL import Image

from rampart.samples import SIDE, SIGNS, sample


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_is_the_same_for_one_seed_and_another_for_the_next(name: str) -> None:
    first, again, other = (np.asarray(sample(name, seed)) for seed in (0, 0, 1))
    assert first.shape == (SIDE, SIDE, 3)
    assert (first == again).all()
    assert np.abs(first.astype(int) - other).mean() > 5


def test_a_stop_sign_is_red_around_white_letters() -> None:
    pixels = np.asarray(sample("stop", 4)).astype(int)
    middle = pixels[24:72, 24:72].reshape(-1, 3)
    red = (middle[:, 0] > 1.8 * middle[:, 1]) & (middle[:, 0] > 1.8 * middle[:, 2])
    bright = middle.min(1) > 0.6 * pixels.max()
    assert 0.4 < red.mean() < 0.9
    assert 0.02 < bright.mean() < 0.4


def test_samples_writes_as_many_of_each_as_are_asked_for(tmp_path: Path) -> None:
    output = run("samples", tmp_path / "signs", "--count", 2, "--seed", 3)
    files = sorted(file.name for file in (tmp_path / "signs").iterdir())
    assert len(files) == 2 * len(SIGNS)
    assert {"stop-3.png", "stop-4.png", "no-entry-3.png"} <= set(files)
    assert "24 pictures" in output
    with Image.open(tmp_path / "signs" / "stop-3.png") as file:
        assert np.array_equal(np.asarray(file), np.asarray(sample("stop", 3)))
