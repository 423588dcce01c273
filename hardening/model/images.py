"""Labelled images in memory, one uint8 tensor, and the splits of those that are held out."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.provenance import fingerprints, summary

# Shares of the held-out images: (split, first, last) in parts of 5,170. Checkpoints are chosen on
# validation, detectors combined on tuning, thresholds set on calibration.
PARTS = 5170
ENOUGH = 200  # held-out images, which leave 103 for calibration: enough for false alarms of 1%
S = TypeVar("S", bound="Source")
SPLITS = {"validation": (0, 1500), "tuning": (1500, 2500), "calibration": (2500, 5170)}


@dataclass(frozen=True)
class Images:
    """Labelled images: `image` uint8 (N, H, W, 3) RGB, `label` int64 (N,), `classes` by index, and
    `paths` within their source, "" where it has no names.
    """

    image: Tensor
    label: Tensor
    classes: tuple[str, ...]
    paths: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> "Images":
        """The same images with both tensors on `device`."""
        return replace(self, image=self.image.to(device), label=self.label.to(device))

    def __getitem__(self, index: slice | Tensor) -> "Images":
        chosen = torch.arange(len(self))[index]
        paths = tuple(self.paths[i] for i in chosen.tolist()) if self.paths else ()
        return Images(self.image[chosen], self.label[chosen], self.classes, paths)

    def read(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (image, label) for each index tensor of `rows`, which are on the same device."""
        for index in rows:
            yield self.image[index], self.label[index]

    def hold_out(self, held: "Images | None" = None, *, seed: int = 0) -> "tuple[Images, Held]":
        """(training images, those held out), as the function `hold_out` divides them; of a small
        set half.
        """
        train, rest = hold_out(self, held, seed=seed, least=least_held(len(self)))
        return train, Held(rest, train)

    def whole(self) -> "Images":
        """All of them, which are in memory already."""
        return self

    def unlike(self, held: "Images") -> Tensor:
        """Which images (N,) have other pixels than all of `held`."""
        prints, others = fingerprints(self.image), fingerprints(held.image)
        return torch.from_numpy(~np.isin(prints, others))

    def digest(self) -> str:
        """Stands for the pixels, labels and classes."""
        total = hashlib.sha256(self.image.cpu().numpy().tobytes())
        total.update(self.label.cpu().numpy().tobytes())
        total.update(repr(self.classes).encode())
        return total.hexdigest()


class Source(Protocol):
    """Labelled images, in memory or on disk."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by index."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The name of each image within its source, or none at all."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Self: ...

    def whole(self) -> Images:
        """All of them, in memory."""

    def unlike(self, held: Images) -> Tensor:
        """Which images (N,) have other pixels than all of `held`."""


class Held(NamedTuple):
    """Images kept out of training; `train` are the others, where there are any."""

    images: Images
    train: Source | None = None

    @property
    def validation(self) -> Images:
        """On which a checkpoint is chosen."""
        return split(self.images, "validation")

    @property
    def tuning(self) -> Images:
        """On which detectors are combined."""
        return split(self.images, "tuning")

    @property
    def calibration(self) -> Images:
        """Which rank what the endpoint sees."""
        return split(self.images, "calibration")

    @property
    def sets(self) -> dict[str, Any]:
        """All of them, and each split, as cards name sets of images."""
        parts = {"held_out": self.images} | {name: split(self.images, name) for name in SPLITS}
        return {name: summary(fingerprints(part.image)) for name, part in parts.items()}


def least_held(count: int) -> int:
    """How many of `count` images are held out at least: 200, which promise 1%, or half of them."""
    return min(ENOUGH, count // 2)


def hold_out(images: S, held: Images | None, *, seed: int = 0, least: int = 0) -> tuple[S, Images]:
    """Divide into (training images, held-out images).

    `held` images leave training by `paths` (the lossless twins of JPEG images) or pixels. Without
    them a tenth, at most 5,170, or `least` where that is more, is drawn with `seed`, and other
    images of the same pixels leave too. Raises ValueError for other classes, or without any twin.
    """
    if held is not None:
        if held.classes != images.classes:
            raise ValueError(
                f"classes differ: {images.classes} in training, {held.classes} held out: give both"
                " the same classes, in the same order"
            )
        twins = set(held.paths)
        paths = images.paths or ("",) * len(images)
        keep = torch.tensor([path not in twins for path in paths]) & images.unlike(held)
        if twins and keep.all():
            raise ValueError(
                f"the held-out file names its images among the training data ({held.paths[0]} ...),"
                " but none of them is there: pass the folder that these paths name"
            )
        return images[keep.nonzero().flatten()], held
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = min(PARTS, max(least, math.ceil(len(images) / 10)))
    out, rest = images[order[:count]].whole(), images[order[count:]]
    return rest[rest.unlike(out).nonzero().flatten()], out


def split(held: Images, name: str) -> Images:
    """The images of a split of `held`, in order; images sorted by class, or nearly so, are shuffled
    first.
    """
    rows = torch.arange(len(held))
    present, runs = len(set(held.label.tolist())), 1 + int((held.label.diff() != 0).sum())
    if present > 1 and runs < 2 * present:
        rows = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    first, last = SPLITS[name]
    return held[rows[len(held) * first // PARTS : len(held) * last // PARTS]]


def batches(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x float (B, 3, H, W), label (B,)) of all images, in order."""
    for start in range(0, len(images), size):
        chosen = slice(start, start + size)
        yield to_float(images.image[chosen]), images.label[chosen]
