"""What augmentations may change, and what they must not."""

import math
from pathlib import Path

import pytest
import torch
from blobs import blobs

from rampart.hardening.attack.noise import Noise
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train import augmentation
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Recipe, Trainer
from rampart.hardening.train.methods import METHODS

CUTMIX = Recipe(augment=("cutmix",))


def test_flip_mirrors_about_half_and_changes_nothing_else() -> None:
    x = torch.rand(200, 3, 4, 4)
    flipped = augmentation.flip(x, Noise(torch.arange(200)))
    mirrored = (flipped == x.flip(-1)).all(dim=(1, 2, 3))
    assert 60 < int(mirrored.sum()) < 140
    assert torch.equal(flipped[~mirrored], x[~mirrored])


def test_crop_shifts_by_at_most_the_padding() -> None:
    x = torch.rand(50, 3, 12, 12)
    shifted = augmentation.crop(x, Noise(torch.arange(50)), padding=2)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    windows = [padded[:, :, i : i + 12, j : j + 12] for i in range(5) for j in range(5)]
    found = torch.stack([(shifted == window).all(dim=(1, 2, 3)) for window in windows])
    assert found.any(0).all()
    assert int(found.any(1).sum()) > 10


def test_warp_keeps_what_is_even_even_and_changes_its_brightness_within_bounds() -> None:
    gray = torch.full((200, 3, 16, 16), 0.5)
    warped = augmentation.warp(gray, Noise(torch.arange(200)))
    assert torch.allclose(warped, warped[:, :1, :1, :1].expand_as(warped), atol=1e-5)
    level = warped[:, 0, 0, 0]
    assert 0.5 * math.exp(-0.35) <= float(level.min()) < 0.4
    assert 0.6 < float(level.max()) <= 0.5 * math.exp(0.35)


def test_warp_moves_a_corner_by_at_most_a_sixth_and_turns_both_ways() -> None:
    x = torch.zeros(200, 1, 33, 33)
    x[:, :, 4, 16] = 1  # above the middle
    warped = augmentation.warp(x.expand(-1, 3, -1, -1), Noise(torch.arange(200)))[:, 0]
    where = warped.flatten(1).argmax(1)
    rows, columns = where // 33, where % 33
    assert int(rows.min()) >= 2
    assert int(rows.max()) <= 6
    assert int((columns < 16).sum()) > 40
    assert int((columns > 16).sum()) > 40
    assert int((columns - 16).abs().max()) <= 4


def test_cutout_paints_a_gray_square_of_at_most_half_the_side() -> None:
    x = torch.ones(100, 3, 16, 16)
    cut = augmentation.cutout(x, Noise(torch.arange(100))) == 0.5
    assert torch.equal(cut[:, 0], cut[:, 1])
    share = cut[:, 0].float().mean((1, 2))
    assert float(share.max()) <= 0.25 + 1e-6
    assert float(share.min()) >= 1 / 16


def test_an_unknown_augmentation_is_told_before_training(tmp_path: Path) -> None:
    recipe = Recipe(augment=("flip", "mixup"))
    with pytest.raises(ValueError, match="unknown augmentation 'mixup': choose among flip, crop"):
        Trainer(Classifier(ClassifierConfig("resnet18", 2, 0.125)), recipe, tmp_path)


def test_cutmix_puts_a_rectangle_of_another_image_and_as_much_of_its_label() -> None:
    levels = torch.arange(8) / 8  # of which each image has one
    x = levels.view(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()
    label = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, soft = augmentation.cutmix(x, label, 5)
        assert soft.sum(1).tolist() == pytest.approx([1.0] * 8)
        other = torch.arange(8) - 1  # the neighbour
        own = (mixed == x).all(1).float()  # (8, 16, 16)
        assert ((mixed == x) | (mixed == x[other])).all()
        assert (own == own[0]).all()
        share = own[0].mean()
        expected = torch.zeros(8, 5).scatter_add(1, label[:, None], share.expand(8, 1))
        expected.scatter_add_(1, label[other][:, None], (1 - share).expand(8, 1))
        torch.testing.assert_close(soft, expected)
        painted = (own[0] == 0).nonzero()
        if len(painted):
            height, width = (painted.amax(0) - painted.amin(0) + 1).tolist()
            assert len(painted) == height * width  # a rectangle
        shares.append(float(share))
    assert min(shares) < 0.4 and max(shares) > 0.8


def test_one_image_alone_is_not_mixed() -> None:
    x = torch.rand(1, 3, 8, 8)
    mixed, soft = augmentation.cutmix(x, torch.tensor([1]), 3)
    assert torch.equal(mixed, x) and soft.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("recipe", "rectified", "other"),
    [(Recipe("mart", augment=("cutmix",)), False, "mart"), (CUTMIX, True, "--rectify")],
)
def test_what_takes_one_label_an_image_refuses_mixed_ones(
    recipe: Recipe, rectified: bool, other: str, tmp_path: Path
) -> None:
    net = Classifier(ClassifierConfig("resnet10", 2, 0.125, rectified=rectified))
    with pytest.raises(ValueError, match=f"cutmix does not work with {other}"):
        Trainer(net, recipe, tmp_path)


@pytest.mark.training
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("mart", "rslad")])
def test_every_method_takes_mixed_images(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    recipe = Recipe(method, batch_size=16, steps=2, smoothing=0.1, augment=("cutmix",))
    trainer, images = Trainer(net, recipe, tmp_path), blobs(16, size=16)
    batch = Batch(to_float(images.image), images.label, Noise(torch.arange(16)))
    before = net.head.weight.detach().clone()
    losses = [float(trainer.step(batch, 0.5)) for _ in range(2)]
    assert all(map(math.isfinite, losses)) and not torch.equal(net.head.weight, before)
