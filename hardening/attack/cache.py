"""Attacked images on disk, one file an image: a long evaluation resumes, a repeated one is free."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float

FIRST, BATCH = 4, 50  # images at a time: at first on a CPU, and at most
Craft = Callable[[Tensor, Tensor], Tensor]  # (B, 3, H, W), label (B,) -> (B, 3, H, W)


def crafted(
    folder: Path,
    key: str,
    images: Images,
    craft: Craft,
    *,
    title: str,
    batch: int = BATCH,
    seconds: float = 60.0,
) -> Tensor:
    """What `craft` makes of `images`, float32 (N, 3, H, W); `folder` keeps it under `key`.

    At most `batch` images go at a time, and on a CPU so few that they take about `seconds`, since
    an interruption loses those under way.
    """
    home = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    files = [home / f"{name(images[slice(i, i + 1)])}.npy" for i in range(len(images))]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    size = batch if images.image.device.type == "cuda" else min(FIRST, batch)
    bar = tqdm(total=len(missing), desc=title, unit="image", leave=False, disable=not missing)
    with bar:
        while missing:
            few, begun = torch.tensor(missing[:size], device=images.image.device), time.monotonic()
            attacked = craft(to_float(images.image[few]), images.label[few]).float().cpu().numpy()
            for i, image in zip(few.tolist(), attacked, strict=True):
                write(files[i], image)
            missing = missing[size:]
            bar.update(len(few))
            size = next_size(size, time.monotonic() - begun, batch, seconds)
    return torch.from_numpy(np.stack([np.load(file) for file in files])).to(images.image.device)


def next_size(size: int, took: float, most: int, seconds: float) -> int:
    """How many images go next, after `size` took so long: twice as many, half as many, or as many.

    More images take longer, but never more than twice as long for twice as many.
    """
    if took > seconds:
        return max(1, size // 2)
    return min(2 * size, most) if 2 * took < seconds else size


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
