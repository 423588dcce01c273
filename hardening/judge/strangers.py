"""Pictures that show nothing the model tells apart, and how many of them are flagged.

Here a high share is good: whatever the label, it is wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rampart.hardening.judge.alarms import Judged, p_of
from rampart.hardening.judge.metrics import share
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.card import Row, cell_text

COUNT = 200  # of each kind


def noise(draws: np.random.Generator, size: int) -> Pixels:
    """Every pixel of a colour of its own."""
    return draws.integers(0, 256, (size, size, 3), dtype=np.uint8)


def plain(draws: np.random.Generator, size: int) -> Pixels:
    """One colour all over."""
    return np.tile(draws.integers(0, 256, 3, dtype=np.uint8), (size, size, 1))


def clouds(draws: np.random.Generator, size: int) -> Pixels:
    """Sixteen colours that run into one another."""
    colours = Image.fromarray(noise(draws, 4))
    return np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC))


KINDS: dict[str, Callable[[np.random.Generator, int], Pixels]] = {
    "noise": noise,
    "plain colours": plain,
    "clouds of colour": clouds,
}


def drawn(size: int) -> dict[str, Tensor]:
    """COUNT pictures of each kind, uint8 (COUNT, size, size, 3), the same each time."""
    draws = np.random.default_rng(0)
    return {
        name: torch.from_numpy(np.stack([kind(draws, size) for _ in range(COUNT)]))
        for name, kind in KINDS.items()
    }


def flagged(
    every: Sequence[Judged], pictures: Mapping[str, Iterable[Tensor]], *, rate: float
) -> Iterator[Row]:
    """How many of the pictures, in pieces uint8 (N, H, W, 3), each variant flags at `rate`."""
    for name, pieces in pictures.items():
        found = [[p_of(judged, piece) < rate for judged in every] for piece in pieces]
        for judged, parts in zip(every, zip(*found, strict=True), strict=True):
            flags = np.concatenate(parts)
            row: Row = {"pictures": name, "variant": judged.calibration.variant}
            yield row | share(flags) | {"n": len(flags)}


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of the rows, a column a variant."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    head = ("pictures of no class", "images", *(f"{v}: flagged" for v in variants))
    body: dict[str, list[str]] = {}
    for row in rows:
        body.setdefault(row["pictures"], [str(row["n"])]).append(cell_text(row))
    return head, [(name, *cells) for name, cells in body.items()]
