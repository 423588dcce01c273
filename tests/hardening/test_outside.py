from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import Learned
from PIL import Image
from skimage.data import data_dir

from rampart.handlers.image import decode
from rampart.hardening.attack import victims
from rampart.hardening.attack.ladder import Budget
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.patch import patch
from rampart.hardening.judge import outside
from rampart.hardening.judge.alarms import photographs
from rampart.hardening.model import calibrate, checkpoint
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import as_file, to_float

BUDGET = Budget(steps=3, targets=1, queries=10, standard=False)


def test_a_patch_fools_and_leaves_the_rest_as_it_is(learned: Learned) -> None:
    found = patch(learned.look, learned.x, learned.label, share=0.5)
    changed = (found != learned.x).any(1)  # (N, H, W)
    side = learned.x.shape[2] // 2
    for mask in changed:
        rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
        assert side - 2 < rows.max() - rows.min() < side
        assert side - 2 < columns.max() - columns.min() < side
    assert 0 <= found.min() <= found.max() <= 1
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in changed}) > 3  # not always one corner
    fooled = learned.model(found).argmax(1) != learned.label
    grey = torch.where(changed[:, None], torch.tensor(0.5), learned.x)
    by_chance = learned.model(grey).argmax(1) != learned.label
    assert fooled.float().mean() > by_chance.float().mean() + 0.2


@pytest.mark.parametrize("name", outside.CORRUPTIONS)
def test_a_corruption_changes_the_picture_and_not_beyond_recognition(name: str) -> None:
    x = to_float(photographs(32)[::25])
    noise = Noise(torch.arange(len(x)))
    after = outside.CORRUPTIONS[name](x, noise).clamp(0, 1)
    assert after.shape == x.shape
    assert after.dtype == x.dtype
    assert 0.5 / 255 < (after - x).abs().mean() < 0.3


@pytest.mark.slow
def test_what_is_found_against_one_victim_counts_for_all(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    weights = tiny_folder / "weights.safetensors"
    net = pipelines.load_classifier(weights)
    lean, _ = pipelines.load(weights, "lean")
    few = tiny_images[slice(8)]
    labels = net(few.image.permute(0, 3, 1, 2) / 255).argmax(1)
    few = Images(few.image, labels, few.classes)
    every = [
        victims.label_victim("classifier", net, checkpoint.digest(net)),
        victims.pipeline_victim(
            lean, calibrate.load_variant(tiny_folder, "lean"), checkpoint.digest(lean), rate=0.1
        ),
    ]
    rows = list(outside.rows(every, few, BUDGET, folder=tmp_path))
    assert len(rows) == 2 * (3 + len(outside.CORRUPTIONS))
    by = {(row["threat"], row["subject"]): row for row in rows}
    assert by["clean", "classifier"]["right"]["value"] == 1
    assert by["L2 0.5", "classifier"]["right"]["value"] < 1
    for threat in ("clean", "L2 0.5", "patch", *outside.CORRUPTIONS):
        alone, behind = by[threat, "classifier"], by[threat, "pipeline"]
        # lean labels as the classifier does, so the same images are lost to both.
        assert alone["right"] == behind["right"] == alone["right_or_rejected"]
        assert behind["right_or_rejected"]["value"] >= behind["right"]["value"]
    head, body = outside.table(rows)
    assert head[2:] == ("classifier: right", "lean: right", "lean: right or rejected")
    assert {len(cells) for cells in body} == {len(head)}


def test_our_resize_step_cannot_be_fooled_unseen_where_picking_pixels_can() -> None:
    found = outside.scaling(32)
    assert found["psnr"] < 15
    assert found["psnr_nearest"] > 25
    # The attack is a working one: the model would indeed see the other picture.
    assert found["levels_off_target"] < 2
    assert "256" in outside.in_words(found)


def test_a_forged_picture_scales_down_to_its_target() -> None:
    sides = {"coffee.png": 128, "rocket.jpg": 32}
    shown, target = (decode((Path(data_dir) / name).read_bytes(), sides[name]) for name in sides)
    forged = Image.fromarray(outside.forge(shown, target, Image.Resampling.NEAREST))
    picked = np.asarray(forged.resize((32, 32), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(picked, target)
    honest = decode(as_file(forged), 32).astype(int)
    assert np.abs(honest - target).mean() > 20
