"""What a training notes of its images: beside the weights each one, in the checkpoint their sum."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rampart.hardening.model import provenance
from rampart.hardening.model.images import Images
from rampart.hardening.model.provenance import Prints
from rampart.hardening.train import distributed
from rampart.hardening.train.data import Folder

BATCH = 256


def prints_of(images: Images | Folder) -> Prints:
    """The fingerprints of all images; a folder is decoded for it, once, by all processes."""
    if isinstance(images, Images):
        return provenance.fingerprints(images.image)
    return of_all(image for image, _ in images.read(portions(len(images))))


def portions(count: int) -> tuple[Tensor, ...]:
    """This process's part of the rows of `count` images, by as many as are decoded at a time."""
    return torch.split(distributed.mine(torch.arange(count)), BATCH)


def of_all(parts: Iterable[Tensor]) -> Prints:
    """The fingerprints of the images (N, H, W, 3) that all processes have, part by part."""
    own = provenance.union(map(provenance.fingerprints, parts))
    return provenance.union(distributed.gather(own))


def note(folder: Path, train: Images | Folder, held: Images) -> dict[str, Any]:
    """Write the fingerprints of `train` into `folder`, once; returns a checkpoint's entry."""
    prints = distributed.from_first(provenance.read(folder) if isinstance(train, Folder) else None)
    if prints is None:
        prints = prints_of(train)
        if distributed.first():
            provenance.write(folder, prints)
    return entry(prints, held.image)


def entry(prints: Prints, held: Tensor) -> dict[str, Any]:
    """What checkpoints and cards say of training images, and of those `held` out, (N, H, W, 3)."""
    out = provenance.summary(provenance.fingerprints(held))
    return {"training": provenance.summary(prints), "held_out": out}


def collect(
    model: Path, weights: Sequence[Path], train: Images | Folder, *, fitted: Images, held: Images
) -> dict[str, Any]:
    """Write the fingerprints of all training images into a model folder; returns the card's entry.
    What no file beside `weights` lists was trained on `train`; `fitted` count unless they are
    `held`.
    """
    records = [provenance.read(file.parent) for file in weights]
    parts = [prints if prints is not None else prints_of(train) for prints in records]
    own, more = (provenance.fingerprints(images.image) for images in (held, fitted))
    prints = provenance.union([*parts, more[~np.isin(more, own)]])
    provenance.write(model, prints)
    return entry(prints, held.image)
