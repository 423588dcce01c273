"""Which images a model was made of, by 8 bytes of hash of the pixels of each."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rampart.hardening.model import files
from rampart.hardening.model.arrays import Bools

if TYPE_CHECKING:
    from rampart.hardening.model.images import Images

FILE = files.TRAINED_ON
Prints = NDArray[np.uint64]  # (N,) one an image


def fingerprints(image: Tensor) -> Prints:
    """What stands for the pixels of each image uint8 (N, H, W, 3)."""
    each = (hashlib.blake2b(one.tobytes(), digest_size=8).digest() for one in image.cpu().numpy())
    return np.frombuffer(b"".join(each), "<u8").astype(np.uint64)


def summary(prints: Prints) -> dict[str, Any]:
    """A set of images as cards and checkpoints name it: their number and one digest."""
    every = np.unique(prints)
    digest = hashlib.sha256(every.astype("<u8").tobytes()).hexdigest()
    return {"count": len(every), "sha256": digest}


def write(folder: Path, prints: Prints) -> None:
    """Say in `folder` that the weights there were made of the images of `prints`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.partial"
    with partial.open("wb") as file:
        np.save(file, np.unique(prints).astype("<u8"))
    partial.replace(folder / FILE)


def carry(homes: Iterable[Path], folder: Path) -> None:
    """Say in `folder` what the folders of its parts say, if any does."""
    prints = union(map(read, homes))
    if len(prints):
        write(folder, prints)
    else:
        (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> Prints | None:
    """The fingerprints of the images behind the weights in `folder`; None without a record."""
    file = folder / FILE
    if not file.is_file():
        return None
    prints: Prints = np.load(file, allow_pickle=False)
    return prints


def union(parts: Iterable[Prints | None]) -> Prints:
    """All fingerprints of some sets; None says nothing."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(p for p in parts if p is not None)]))


class Pictured(Protocol):
    """Anything that holds pictures."""

    @property
    def image(self) -> Tensor:
        """Their pixels, uint8 (N, H, W, 3)."""


def trained_on(folder: Path, images: Pictured) -> Bools | None:
    """Which `images` (N,) the model in `folder` was trained on; None where it has no record."""
    prints = read(folder)
    return None if prints is None else np.isin(fingerprints(images.image), prints)


def check_unseen(folder: Path, images: "Images") -> None:
    """Raise ValueError where a model was trained on any of `images` that pass as held out."""
    overlap = trained_on(folder, images)
    if overlap is not None and overlap.any():
        raise ValueError(
            f"{folder} was trained on {overlap.sum()} of these {len(images)} images, by their"
            " pixels: pass --data and --held as for `rampart train`, or images of a test set"
        )
