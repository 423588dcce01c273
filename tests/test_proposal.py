from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from PIL import Image

from rampart.hardening.model.classifier import ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.train.augmentation import mirroring, suited
from rampart.proposal import Wishes, batch_for, epochs_for, image_size, propose


def images(count: int, *classes: str) -> Images:
    one = blobs(1)
    rows = [0] * count
    return Images(one.image[rows], one.label[rows] * 0, classes or ("cat", "dog"))


def pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    (folder / "a").mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / "a" / f"{number}.png")
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    return folder


def test_the_image_size_follows_the_pictures_and_the_machine(tmp_path: Path) -> None:
    large = pictures(tmp_path / "large", (300, 200), (200, 400), (500, 90))
    assert image_size(large, gpu=True).value == 192
    assert image_size(large, gpu=False).value == 64
    small = pictures(tmp_path / "small", (40, 50), (60, 40))
    assert image_size(small, gpu=True).value == 32
    np.savez(tmp_path / "d.npz", image=np.zeros((2, 48, 48, 3), np.uint8), label=[0, 1])
    assert image_size(tmp_path / "d.npz", gpu=False).value == 48
    assert image_size(tmp_path / "none", gpu=False).value == 32


def test_what_is_said_is_kept_and_the_rest_is_proposed_with_its_reason() -> None:
    own = ClassifierConfig("vgg11", 0)
    said = Wishes(
        arch="vgg11",
        net=own,
        image_size=64,
        epochs=7,
        batch_size=48,
        lr=0.05,
        augment=("flip",),
        purifier_epochs=1,
    )
    plan, rows = propose(said, images(60, "3", "7"), gpu=False)
    assert rows == []
    assert (plan.net.arch, plan.net.image_size, plan.net.width) == ("vgg11", 64, 1.0)
    assert (plan.recipe.epochs, plan.recipe.batch_size, plan.recipe.lr) == (7, 48, 0.05)
    assert plan.recipe.augment == ("flip",) and plan.purifier_epochs == 1
    proposal = propose(Wishes(image_size=64), images(60, "3", "7"), gpu=False)
    plan, rows = proposal
    assert (plan.net.arch, plan.net.width, plan.purifier_epochs) == ("resnet10", 0.25, 0)
    assert (plan.recipe.batch_size, plan.recipe.lr, plan.recipe.augment) == (8, 0.05, ("crop",))
    told = {row.option for row in rows}
    assert told >= {"--arch", "--width", "--epochs", "--batch-size", "--lr", "--augment"}
    assert all(row.why for row in rows)
    lines = proposal.lines()
    assert len(lines) == 1 + len(rows) and "resnet10" in lines[1]


def test_many_images_and_a_gpu_get_a_larger_network() -> None:
    many, wishes = images(20_000), Wishes(image_size=32)
    cpu, gpu = (propose(wishes, many, gpu=gpu).plan for gpu in (False, True))
    assert [(p.net.arch, p.net.width) for p in (cpu, gpu)] == [("resnet18", 0.5), ("resnet18", 1.0)]
    assert cpu.purifier_epochs == 2 and cpu.recipe.batch_size == 128 and cpu.recipe.lr == 0.2
    assert (cpu.recipe.epochs, gpu.recipe.epochs) == (15, 30)


def test_weights_of_ones_own_keep_their_network() -> None:
    plan, rows = propose(Wishes(weights=Path("w.pth"), image_size=32), images(60), gpu=False)
    assert (plan.net.arch, plan.net.width) == ("resnet18", 1.0)
    assert not {"--arch", "--width"} & {row.option for row in rows}


def test_weights_are_fine_tuned_in_a_third_of_the_epochs_at_the_same_rate() -> None:
    def recipe(count: int, weights: Path | None) -> tuple[int, float]:
        wishes = Wishes(weights=weights, image_size=32)
        plan = propose(wishes, images(count), gpu=False).plan
        return plan.recipe.epochs, plan.recipe.lr

    assert recipe(60, None) == (60, 0.05) and recipe(60, Path("w.pth")) == (20, 0.05)
    assert recipe(5_000, None) == (39, 0.2) and recipe(5_000, Path("w.pth")) == (13, 0.2)
    assert recipe(50_000, None) == (15, 0.2) and recipe(50_000, Path("w.pth")) == (5, 0.2)
    _, rows = propose(Wishes(weights=Path("w.pth"), image_size=32), images(5_000), gpu=False)
    told = {row.option: row.why for row in rows}
    assert told["--epochs"] == "a third of the 39 epochs from scratch, 5 at least"


@pytest.mark.parametrize(("small", "balance"), [(100, 0.5), (101, 0.0), (0, 0.0)])
def test_classes_of_very_unlike_size_are_drawn_more_alike(small: int, balance: float) -> None:
    one = blobs(1)
    label = torch.tensor([0] * 400 + [1] * small)
    uneven = Images(one.image[[0] * len(label)], label, ("cat", "dog"))
    plan, rows = propose(Wishes(image_size=32), uneven, gpu=False)
    assert plan.recipe.balance == balance
    told = [row for row in rows if row.option == "--balance"]
    assert len(told) == bool(balance)
    if told:
        assert told[0].why == "cat has 400 images, dog has 100: small classes are shown more often"
    plan, rows = propose(Wishes(image_size=32, balance=0.25), uneven, gpu=False)
    assert plan.recipe.balance == 0.25 and "--balance" not in {row.option for row in rows}


def test_a_purifier_is_trained_on_images_that_are_not_mixed() -> None:
    wishes = Wishes(image_size=32, augment=("crop", "cutmix"))
    plan = propose(wishes, images(20_000), gpu=False).plan
    assert plan.recipe.augment == ("crop", "cutmix")
    assert plan.purifier.augment == ("crop",)


@pytest.mark.parametrize(
    ("classes", "mirrored"),
    [
        (["cat", "dog"], True),
        (["0", "1", "2"], False),
        (["a", "b"], False),
        (["00012", "00013"], False),
        (["turn left", "stop"], False),
        (["stop_signs", "trees"], False),
        (["leftovers", "pasta"], True),
        (["design", "assign"], True),
    ],
)
def test_what_may_be_signs_letters_or_digits_is_not_mirrored(
    classes: list[str], mirrored: bool
) -> None:
    assert mirroring(classes)[0] is mirrored
    assert ("flip" in suited(classes)) is mirrored and "crop" in suited(classes)


def test_batches_and_epochs_of_small_sets_give_steps_enough() -> None:
    assert [batch_for(count) for count in (10, 60, 300, 1024, 50_000)] == [8, 8, 32, 128, 128]
    assert epochs_for(60, 16, gpu=False) == 60
    assert epochs_for(5_000, 128, gpu=False) == 39
    assert epochs_for(50_000, 128, gpu=False) == 15
