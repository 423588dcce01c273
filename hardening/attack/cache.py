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

BATCH, LEAST = 50, 5  # images at a time, at most and at least
# Passes of a network that a CPU makes at a time: about a minute, which an interruption loses. The
# number counts and not the clock, since what is found depends a little on the images beside.
PASSES = 12_000
Craft = Callable[[Tensor, Tensor], Tensor]  # (B, 3, H, W), label (B,) -> (B, 3, H, W)


def crafted(
    folder: Path, key: str, images: Images, craft: Craft, *, title: str, batch: int = BATCH
) -> Tensor:
    """What `craft` makes of `images`, float32 (N, 3, H, W); `folder` keeps it under `key`, `batch`
    images at a time.
    """
    home = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    files = [home / f"{name(images[slice(i, i + 1)])}.npy" for i in range(len(images))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    bar = tqdm(total=len(missing), desc=title, unit="image", leave=False, disable=not missing)
    with bar:
        for start in range(0, len(missing), batch):
            few = torch.tensor(missing[start : start + batch], device=images.image.device)
            attacked = craft(to_float(images.image[few]), images.label[few]).float().cpu().numpy()
            for i, image in zip(few.tolist(), attacked, strict=True):
                write(files[i], image)
            bar.update(len(few))
    return torch.from_numpy(np.stack([np.load(file) for file in files])).to(images.image.device)


def batch_of(passes: float, device: torch.device) -> int:
    """How many images an attack of so many passes an image takes at a time."""
    if device.type != "cpu":
        return BATCH
    return max(LEAST, min(BATCH, int(PASSES / max(1.0, passes))))


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
