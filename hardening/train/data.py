"""Labelled images from CIFAR-10, an ImageFolder or an .npz file, and their augmentation."""

import hashlib
import os
import stat
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rampart.handlers.errors import ImageError
from rampart.handlers.image import decode
from rampart.hardening.attack.noise import Noise
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.images import Held, Images, Source, hold_out
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train import distributed

ARRAYS = ("image", "label", "classes", "jpeg_path")  # of an .npz file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Decoded training images up to this size are kept in memory; beyond, files are read as needed.
MEMORY = 4 * 2**30
LARGEST = 256 * 2**20  # bytes of one picture's file
AHEAD = 2  # batches decoded before they are asked for


@dataclass(frozen=True)
class Folder:
    """Pictures on disk, decoded to `size` when they are needed; `device` is where batches go."""

    files: tuple[Path, ...]
    label: Tensor  # (N,) int64
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    size: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> "Folder":
        """The same pictures, read for `device`."""
        return replace(self, device=device)

    def __getitem__(self, index: Tensor) -> "Folder":
        rows = index.tolist()
        files, paths = tuple(self.files[i] for i in rows), tuple(self.paths[i] for i in rows)
        return replace(self, files=files, label=self.label[index], paths=paths)

    def read(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (image, label) for each index tensor of `rows`, decoded ahead by threads."""
        pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // distributed.beside()))
        waiting: deque[tuple[Tensor, list[Future[Pixels]]]] = deque()
        try:
            for index in rows:
                files = [self.files[row] for row in index.tolist()]
                pictures = [pool.submit(read_picture, file, self.size) for file in files]
                waiting.append((index, pictures))
                if len(waiting) > AHEAD:
                    yield self.collect(*waiting.popleft())
            while waiting:
                yield self.collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def collect(self, index: Tensor, pictures: list[Future[Pixels]]) -> tuple[Tensor, Tensor]:
        """(image, label) of a batch on the device."""
        image = torch.from_numpy(np.stack([picture.result() for picture in pictures]))
        return self.send(image), self.send(self.label[index])

    def send(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, without waiting for the way there."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def whole(self) -> Images:
        """All pictures, decoded."""
        image = torch.empty((len(self), self.size, self.size, 3), dtype=torch.uint8)
        rows = torch.split(torch.arange(len(self)), 64)
        bar = tqdm(rows, desc="reading pictures", leave=False)
        for index, (some, _) in zip(bar, self.read(rows), strict=True):
            image[index] = some.cpu()
        return Images(image, self.label, self.classes, self.paths)

    def hold_out(self, held: Images | None = None, *, seed: int = 0) -> "tuple[Folder, Held]":
        """(training images, those held out), as the function `hold_out` divides them."""
        train, rest = hold_out(self, held, seed=seed)
        return train, Held(rest, train)

    def unlike(self, held: Images) -> Tensor:
        """Which pictures (N,) have other pixels than all of `held`: nothing is read, so all."""
        return torch.ones(len(self), dtype=torch.bool)

    def digest(self) -> str:
        """Stands for the files by names and sizes; times would differ between copies."""
        sizes = [file.stat().st_size for file in self.files]
        listing = list(zip(self.paths, sizes, strict=True))
        return hashlib.sha256(repr((listing, self.classes, self.size)).encode()).hexdigest()


def load(path: Path, *, train: bool = True, size: int = 32) -> Images:
    """Read the images under `path`: an .npz file, CIFAR-10's official batches, or an ImageFolder.
    An .npz file holds `image` uint8 (N, H, W, 3) and `label` (N,), optionally `classes`. `train`
    picks the half of CIFAR-10. Raises FileNotFoundError or ValueError with the remedy.
    """
    if path.suffix == ".npz" and path.is_file():
        images = load_npz(path)
    elif (path / "cifar-10-batches-py").is_dir():
        images = load_cifar10(path, train=train)
    elif path.is_dir():
        images = find_pictures(path, size=size).whole()
    else:
        raise FileNotFoundError(
            f"no data at {path}: pass an .npz file, a folder of class folders, or the folder that"
            " holds cifar-10-batches-py (`rampart download PATH` fetches it)"
        )
    if images.image.shape[1:3] != (size, size):
        sides = "x".join(map(str, images.image.shape[1:3]))
        raise ValueError(f"{path} holds {sides} images where the model takes {size}x{size}")
    return images


# fmt: off
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
# fmt: on


def load_cifar10(path: Path, *, train: bool = True, download: bool = False) -> Images:
    """CIFAR-10 (Krizhevsky, 2009) from its official Python batches under `path`."""
    data = torchvision.datasets.CIFAR10(str(path), train=train, download=download)
    return Images(torch.from_numpy(data.data), torch.tensor(data.targets), CIFAR10_CLASSES)


def load_npz(path: Path) -> Images:
    """Read `image`, `label` and, where present, `classes` and `jpeg_path` from an .npz file."""
    try:  # numpy would leave the file open where it fails
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is cut or damaged ({error}): copy or save it anew") from error
    if missing := {"image", "label"} - set(arrays):
        raise ValueError(f"{path} lacks {sorted(missing)}: save image (N, H, W, 3) and label")
    image, label = arrays["image"], arrays["label"].astype(np.int64)
    paths = tuple(map(str, arrays.get("jpeg_path", ())))
    # Only the CIFAR-10 files of this layout name their JPEG twins.
    usual = CIFAR10_CLASSES if paths else range(label.max(initial=-1) + 1)
    classes = tuple(map(str, arrays.get("classes", usual)))
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(
            f"{path}: image must be uint8 (N, H, W, 3), found {image.dtype} {image.shape}"
        )
    if label.shape != image.shape[:1]:
        raise ValueError(f"{path}: {len(image)} images but labels of shape {label.shape}")
    if len(label) and not 0 <= label.min() <= label.max() < len(classes):
        raise ValueError(f"{path}: a label lies outside the {len(classes)} classes")
    return Images(torch.from_numpy(image), torch.from_numpy(label), classes, paths)


def load_training(path: Path, *, size: int) -> Images | Folder:
    """As `load`, but a folder whose pictures would fill memory is left on disk."""
    if not path.is_dir() or (path / "cifar-10-batches-py").is_dir():
        return load(path, size=size)
    folder = find_pictures(path, size=size)
    # Whatever the number of processes, or a run could not go on with another one.
    return folder if len(folder) * size * size * 3 > MEMORY else folder.whole()


def find_pictures(path: Path, *, size: int) -> Folder:
    """The pictures of an ImageFolder directory, each class in a folder of its own. Raises
    ValueError for no pictures, for what is none (a device, a pipe, a broken link), and for folders
    of splits.
    """
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    pictures = {folder.name: pictures_below(folder) for folder in folders}
    classes = tuple(name for name, files in pictures.items() if files)
    files = tuple(file for name in classes for file in pictures[name])
    for file in files:  # now, and not hours into a training
        try:
            check_picture(file, file.stat())
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}: remove it") from error
    if not files:
        raise ValueError(f"{path} has no pictures: expected {path}/CLASS/NAME.{{jpg,png,webp}}")
    if set(classes) <= {"train", "test", "val", "valid", "validation"}:
        raise ValueError(f"{path} holds splits and not classes: pass one, as {path / classes[0]}")
    label = torch.tensor([index for index, name in enumerate(classes) for _ in pictures[name]])
    root = path.resolve().name
    names = tuple(f"{root}/{file.relative_to(path)}" for file in files)
    return Folder(files, label, classes, names, size, torch.device("cpu"))


def pictures_below(folder: Path) -> list[Path]:
    """What is named as a picture at any depth, sorted. Folders that are links are not entered."""
    files = (Path(home) / name for home, _, names in os.walk(folder) for name in names)
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES)


def read_picture(file: Path, size: int) -> Pixels:
    """One plain file as uint8 (size, size, 3), decoded as the endpoint does. Raises ValueError."""
    try:
        # A pipe without a writer is opened too, and at once.
        with open(file, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as stream:
            check_picture(file, os.fstat(stream.fileno()))
            return decode(stream.read(LARGEST), size)
    except ImageError as error:
        raise ValueError(f"{file}: {error.message}") from error
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error


def check_picture(file: Path, status: os.stat_result) -> None:
    """Raise ValueError for what is no plain file, or far larger than any picture."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file} is no plain file: remove it")
    if status.st_size > LARGEST:
        raise ValueError(
            f"{file} has {status.st_size / 1e6:.0f} MB, too many for a picture: remove it"
        )


def write_digits(folder: Path) -> dict[str, int]:
    """Write scikit-learn's digits (Alpaydin and Kaynak 1998), 32x32, as train, held, test.npz."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    gray = (bunch.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    large = [Image.fromarray(one).resize((32, 32)).convert("RGB") for one in gray]
    image = np.stack([np.asarray(one) for one in large])
    order = np.random.default_rng(0).permutation(len(image))
    parts = dict(zip(("train", "held", "test"), np.split(order, (1097, 1497)), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(name) for name in bunch.target_names]
    for part, rows in parts.items():
        label = bunch.target[rows]
        np.savez_compressed(folder / f"{part}.npz", image=image[rows], label=label, classes=names)
    return {part: len(rows) for part, rows in parts.items()}


def spread(images: Source, count: int | None) -> Images:
    """`count` images evenly spaced over all (an ImageFolder is sorted by class); all for None."""
    if count is not None and count < len(images):
        images = images[torch.arange(count) * len(images) // count]
    return images.whole()


def flip(x: Tensor, noise: Noise) -> Tensor:
    """Mirror each image of x (N, 3, H, W) with probability 1/2."""
    return torch.where(noise.uniform(1, 1, 1) < 0.5, x.flip(-1), x)


def crop(x: Tensor, noise: Noise, *, padding: int = 4) -> Tensor:
    """Shift each image of x (N, 3, H, W) by up to `padding` pixels, filling with reflections."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (padding,) * 4, mode="reflect")
    shift = (noise.uniform(2) * (2 * padding + 1)).long()  # (N, 2)
    rows = (shift[:, :1] + torch.arange(height, device=x.device))[:, :, None]  # (N, H, 1)
    columns = (shift[:, 1:] + torch.arange(width, device=x.device))[:, None, :]  # (N, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


class Batch(NamedTuple):
    """What a training step learns from; `noise` draws for each of its images."""

    x: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B,)
    noise: Noise
    soft: Tensor | None = None  # (B, K) what a teacher says of x, probabilities


def shuffled(
    images: Images | Folder,
    size: int,
    *,
    seed: int,
    epoch: int,
    skip: int = 0,
    mirrored: bool = True,
) -> Iterator[Batch]:
    """Yield the augmented batches of an epoch after the first `skip`; this process's part of each.
    Order and augmentation follow from `seed`, `epoch` and the image alone. `mirrored` flips half of
    the images: not for signs, letters and digits.
    """
    draws = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=draws)
    if isinstance(images, Images):
        order = order.to(images.label.device)  # once, and not at every step
    size = min(size, len(order))
    size -= size % distributed.place()[1]
    last = len(order) - len(order) % size
    whole = torch.split(order[:last], size)
    rows = [distributed.mine(index) for index in whole[skip:]]
    for index, (image, label) in zip(rows, images.read(rows), strict=True):
        key = images.send(index) if isinstance(images, Folder) else index
        noise = Noise(key, seed=seed, epoch=epoch)
        x = to_float(image)
        yield Batch(crop(flip(x, noise) if mirrored else x, noise), label, noise)
