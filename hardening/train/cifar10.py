"""CIFAR-10 (Krizhevsky 2009) from its official Python batches, read and fetched by torchvision."""

import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torchvision

from rampart.hardening.model.images import Images
from rampart.hardening.train.fetching import fetching

BATCHES: str = torchvision.datasets.CIFAR10.base_folder
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def lies_in(path: Path) -> bool:
    """Whether a folder holds the batches."""
    return (path / BATCHES).is_dir()


def load(path: Path, *, train: bool = True) -> Images:
    """The images under `path`, of training or of the test. Raises ValueError where files are
    missing or have other hashes.
    """
    try:
        data = torchvision.datasets.CIFAR10(str(path), train=train)
    except RuntimeError as error:
        raise ValueError(
            f"{path / BATCHES} is incomplete: remove it, and fetch it again with"
            f" `rampart download cifar10 {path}`"
        ) from error
    return Images(torch.from_numpy(data.data), torch.tensor(data.targets), CLASSES)


def download(path: Path) -> Images:
    """Fetch it into `path`: all of it, or nothing. Raises OSError that says how by hand.

    A cifar-10-python.tar.gz that lies there is taken, if it is the official one.
    """
    kind = torchvision.datasets.CIFAR10
    home = path / BATCHES
    with suppress(ValueError):
        return load(path)
    remedy = f"get {kind.url} by hand, put it into {path}, and run this again. Its MD5 is"
    with fetching(path, "CIFAR-10", f"{remedy} {kind.tgz_md5}") as scratch:
        if (packed := path / kind.filename).is_file():
            shutil.copy(packed, scratch)
        kind(str(scratch), download=True)
        shutil.rmtree(home, ignore_errors=True)
        (scratch / BATCHES).rename(home)
    return load(path)
