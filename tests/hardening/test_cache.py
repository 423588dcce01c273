from pathlib import Path

import pytest
import torch
from torch import Tensor

from rampart.hardening.attack import cache
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float


class Attacker:
    """Adds a tenth and counts the images it was given."""

    def __init__(self, patience: int = 1000) -> None:
        self.seen, self.patience = 0, patience

    def __call__(self, x: Tensor, label: Tensor) -> Tensor:
        if self.seen >= self.patience:
            raise KeyboardInterrupt
        self.seen += len(x)
        return (x + 0.1 + 0.01 * label.view(-1, 1, 1, 1)).clamp(0, 1)


def test_an_interrupted_attack_goes_on_where_it_stopped(
    tmp_path: Path, tiny_images: Images
) -> None:
    few = tiny_images[slice(10)]
    with pytest.raises(KeyboardInterrupt):
        cache.crafted(tmp_path, "key", few, Attacker(patience=6), title="", batch=3)
    rest = Attacker()
    found = cache.crafted(tmp_path, "key", few, rest, title="", batch=3)
    assert rest.seen == 4
    expected = to_float(few.image) + 0.1 + 0.01 * few.label.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, expected.clamp(0, 1))


def test_attacks_that_take_long_take_few_images_at_a_time_so_that_little_is_lost(
    tmp_path: Path, tiny_images: Images
) -> None:
    sizes, cpu = list[int](), torch.device("cpu")

    def count(x: Tensor, _: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    batch = cache.batch_of(2000, cpu)
    cache.crafted(tmp_path, "key", tiny_images[slice(14)], count, title="", batch=batch)
    assert sizes == [6, 6, 2]
    assert [cache.batch_of(passes, cpu) for passes in (0, 21, 1300, 1e5)] == [50, 50, 9, 5]
    assert cache.batch_of(1e5, torch.device("cuda")) == 50


def test_another_key_and_another_image_are_attacked_anew(
    tmp_path: Path, tiny_images: Images
) -> None:
    few, other = tiny_images[slice(4)], Attacker()
    cache.crafted(tmp_path, "key", few, Attacker(), title="")
    cache.crafted(tmp_path, "another", few, other, title="")
    assert other.seen == 4
    more = Attacker()
    cache.crafted(tmp_path, "key", tiny_images[slice(6)], more, title="")
    assert more.seen == 2
