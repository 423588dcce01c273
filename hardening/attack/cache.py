"""Attacked images on disk, one file an image: a long evaluation resumes, a repeated one is free."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float

Craft = Callable[[Tensor, Tensor], Tensor]  # (B, 3, H, W), label (B,) -> (B, 3, H, W)


def crafted(
    folder: Path, key: str, images: Images, craft: Craft, *, title: str, batch: int = 50
) -> Tensor:
    """What `craft` makes of `images`, float32 (N, 3, H, W); `folder` keeps it under `key`."""
    home = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    files = [home / f"{name(images[slice(i, i + 1)])}.npy" for i in range(len(images))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    unit = f"steps of {batch} images"
    starts = range(0, len(missing), batch)
    bar = tqdm(starts, desc=title, unit=unit, leave=False, disable=not missing)
    for first in bar:
        few = torch.tensor(missing[first : first + batch], device=images.image.device)
        attacked = craft(to_float(images.image[few]), images.label[few]).float().cpu().numpy()
        for i, image in zip(few.tolist(), attacked, strict=True):
            write(files[i], image)
    return torch.from_numpy(np.stack([np.load(file) for file in files])).to(images.image.device)


def write(file: Path, array: np.ndarray) -> None:
    """Write so that an interruption leaves no half file."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, array)
    partial.replace(file)


def name(image: Images) -> str:
    """A file name for one labelled image."""
    digest = hashlib.sha256(image.image.cpu().numpy().tobytes())
    digest.update(bytes(image.label.cpu().numpy()))
    return digest.hexdigest()[:24]
