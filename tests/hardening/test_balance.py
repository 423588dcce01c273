"""How often images of large and small classes are drawn."""

import pytest
import torch

from rampart.hardening.model.images import Images
from rampart.hardening.train.data import balanced, shuffled
from rampart.hardening.train.loop import Recipe

SIZES = (900, 90, 10)


def uneven() -> Images:
    """Each image has its number in its first two pixels."""
    label = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    image = torch.zeros(len(label), 8, 8, 3, dtype=torch.uint8)
    number = torch.arange(len(label))
    image[:, 0, 0, 0], image[:, 0, 1, 0] = (number // 256).byte(), (number % 256).byte()
    return Images(image, label, ("a", "b", "c"))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_class_is_drawn_by_its_size_to_the_power_of_what_is_not_balanced(balance: float) -> None:
    batches = shuffled(uneven(), 100, seed=0, epoch=3, balance=balance)
    label = torch.cat([batch.label for batch in batches])
    assert len(label) == 1000
    wanted = torch.tensor(SIZES, dtype=torch.float64) ** (1 - balance)
    counts = torch.bincount(label, minlength=3)
    assert (counts - 1000 * wanted / wanted.sum()).abs().max() <= 2


def test_each_image_of_a_class_comes_as_often_as_the_others_give_or_take_one() -> None:
    label = uneven().label
    order, keys = balanced(label, 3, 1.0, torch.Generator().manual_seed(0))
    times = torch.bincount(order, minlength=1000)
    for index in range(3):
        own = times[label == index]
        assert int(own.max() - own.min()) <= 1
    assert len(set(keys.tolist())) == 1000  # other noise each time
    assert torch.equal(keys % 1000, order)


def test_epochs_differ_and_a_run_that_goes_on_draws_what_it_would_have_drawn() -> None:
    def drawn(epoch: int, skip: int = 0) -> list[list[float]]:
        few = shuffled(
            uneven(), 100, seed=1, epoch=epoch, skip=skip, balance=0.5, augmentations=("crop",)
        )
        return [batch.x.flatten().tolist() for batch in few]

    assert drawn(0)[7:] == drawn(0, skip=7)
    assert drawn(0) != drawn(1)


def test_repeated_images_are_augmented_differently() -> None:
    images = Images(
        torch.arange(12 * 8 * 8 * 3).view(12, 8, 8, 3).byte(),
        torch.tensor([0] * 11 + [1]),
        ("a", "b"),
    )
    (batch,) = shuffled(images, 12, seed=0, epoch=0, balance=1.0, augmentations=("crop",))
    rare = batch.x[batch.label == 1]
    assert len(rare) in (5, 6, 7) and len(rare.unique(dim=0)) > 1


def test_runs_without_balance_go_on_under_the_text_that_they_began_with() -> None:
    assert "balance" not in repr(Recipe())
    assert repr(Recipe()).startswith("Recipe(method='nfgsm', threat=Threat(norm='Linf', eps=0.03")
    assert repr(Recipe()).endswith("augment=('flip', 'crop'), after='')")
    assert repr(Recipe(balance=0.5)).endswith("after='', balance=0.5)")
