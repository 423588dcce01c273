"""Pictures of no class."""

from pathlib import Path

import numpy as np
import torch

from rampart.hardening.judge import strangers
from rampart.hardening.judge.alarms import Judged
from rampart.hardening.model import calibrate
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.images import Images, split


def test_each_kind_is_what_its_name_says() -> None:
    drawn = strangers.drawn(16)
    assert {image.shape for image in drawn.values()} == {(200, 16, 16, 3)}
    noise, plain, clouds = (drawn[name].float() for name in strangers.KINDS)
    assert float(plain.std((1, 2)).max()) == 0
    assert len({image.numpy().tobytes() for image in plain}) > 190
    steps = [float(x.diff(dim=1).abs().mean()) for x in (noise, clouds)]
    assert steps[0] > 4 * steps[1] > 0
    assert all(
        torch.equal(image, again)
        for image, again in zip(drawn.values(), strangers.drawn(16).values(), strict=True)
    )


def test_noise_is_flagged_far_more_often_than_what_was_trained_on(
    tiny_folder: Path, tiny_images: Images
) -> None:
    lean, _ = pipelines.load(tiny_folder / "weights.safetensors", "lean")
    every = [Judged(lean, calibrate.load_variant(tiny_folder, "lean"))]
    clean = split(tiny_images, "calibration").image
    pictures = {"clean": [clean], "noise": strangers.drawn(32)["noise"].split(60)}
    clean_row, noise_row = strangers.flagged(every, pictures, rate=0.05)
    assert clean_row["value"] <= 0.05 < 0.9 < noise_row["value"]
    assert noise_row["n"] == 200
    head, body = strangers.table([clean_row, noise_row])
    assert head == ("pictures of no class", "images", "lean: flagged")
    assert [row[:2] for row in body] == [("clean", str(len(clean))), ("noise", "200")]
    assert np.isclose(noise_row["interval"][0], noise_row["value"], atol=0.1)
