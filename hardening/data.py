"""Labelled images as one uint8 tensor, from CIFAR-10, an ImageFolder directory or an .npz file.

Small images fit in memory whole (CIFAR-10: 150 MB), so a data set is one tensor and a batch is one
index operation; augmentation is two tensor functions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from handlers.image import ImageError, decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Shares of the held-out images: (split, first, last) in parts of 5,170. Checkpoints are chosen on
# validation, detectors combined on tuning, thresholds set on calibration.
PARTS = 5170
SPLITS = {"validation": (0, 1500), "tuning": (1500, 2500), "calibration": (2500, 5170)}


@dataclass(frozen=True)
class Images:
    """Labelled images: `image` uint8 (N, H, W, 3) RGB, `label` int64 (N,), `classes` by index.

    `paths` names each image within its source ("" where the source has no names).
    """

    image: Tensor
    label: Tensor
    classes: tuple[str, ...]
    paths: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> "Images":
        """The same images with both tensors on `device`."""
        return Images(self.image.to(device), self.label.to(device), self.classes, self.paths)

    def __getitem__(self, index: slice | Tensor) -> "Images":
        chosen = torch.arange(len(self))[index]
        paths = tuple(self.paths[i] for i in chosen.tolist()) if self.paths else ()
        return Images(self.image[chosen], self.label[chosen], self.classes, paths)


def load(path: Path, *, train: bool = True, size: int = 32) -> Images:
    """Read the images under `path`: an .npz file, CIFAR-10's official batches, or an ImageFolder.

    An .npz file holds `image` uint8 (N, H, W, 3) and `label` (N,), optionally `classes`. A folder
    with (or destined for) `cifar-10-batches-py` is read by torchvision; `train` picks its half.
    Any other folder has one sub-folder a class; its pictures are brought to `size`.
    Raises FileNotFoundError or ValueError that name the input and the remedy.
    """
    if path.suffix == ".npz" and path.is_file():
        images = load_npz(path)
    elif (path / "cifar-10-batches-py").is_dir():
        images = load_cifar10(path, train=train)
    elif path.is_dir():
        images = load_folder(path, size=size)
    else:
        raise FileNotFoundError(
            f"no data at {path}: pass an .npz file, a folder of class folders, or the folder that"
            " holds cifar-10-batches-py (`rampart download PATH` fetches it)"
        )
    if images.image.shape[1:3] != (size, size):
        found = "x".join(map(str, images.image.shape[1:3]))
        raise ValueError(f"{path} holds {found} images where the model takes {size}x{size}")
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
    with np.load(path, allow_pickle=False) as file:
        missing = {"image", "label"} - set(file.files)
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}: save image (N, H, W, 3) and label")
        image, label = file["image"], file["label"].astype(np.int64)
        paths = tuple(str(p) for p in file["jpeg_path"]) if "jpeg_path" in file.files else ()
        if "classes" in file.files:
            classes = tuple(str(name) for name in file["classes"])
        else:
            many = int(label.max()) + 1 if len(label) else 0
            # Only the CIFAR-10 files of this layout name their JPEG twins.
            classes = CIFAR10_CLASSES if paths else tuple(str(i) for i in range(many))
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(
            f"{path}: image must be uint8 (N, H, W, 3), found {image.dtype} {image.shape}"
        )
    if label.shape != image.shape[:1]:
        raise ValueError(f"{path}: {len(image)} images but labels of shape {label.shape}")
    if len(label) and not 0 <= label.min() <= label.max() < len(classes):
        raise ValueError(f"{path}: a label lies outside the {len(classes)} classes")
    return Images(torch.from_numpy(image), torch.from_numpy(label), classes, paths)


def load_folder(path: Path, *, size: int) -> Images:
    """Read every picture of an ImageFolder directory, with the decoder that serves."""
    found = {
        entry.name: sorted(f for f in entry.rglob("*") if f.suffix.lower() in SUFFIXES)
        for entry in sorted(path.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    classes = tuple(name for name, pictures in found.items() if pictures)
    files = [(file, index) for index, name in enumerate(classes) for file in found[name]]
    if not files:
        raise ValueError(f"{path} has no pictures: expected {path}/CLASS/NAME.{{jpg,png,webp}}")
    if set(classes) <= {"train", "test", "val", "valid", "validation"}:
        raise ValueError(f"{path} holds splits and not classes: pass one, as {path / classes[0]}")
    image = np.empty((len(files), size, size, 3), np.uint8)
    for row, (file, _) in enumerate(tqdm(files, desc=f"reading {path.name}", leave=False)):
        try:
            image[row] = decode(file.read_bytes(), size)
        except ImageError as error:
            raise ValueError(f"{file}: {error.message}") from error
    label = torch.tensor([index for _, index in files])
    root = path.resolve().name
    names = tuple(f"{root}/{file.relative_to(path)}" for file, _ in files)
    return Images(torch.from_numpy(image), label, classes, names)


def split(held: Images, name: str) -> Images:
    """The images of split `name` ("validation", "tuning" or "calibration") in `held`, in order."""
    first, last = SPLITS[name]
    return held[slice(len(held) * first // PARTS, len(held) * last // PARTS)]


def hold_out(images: Images, held: Images | None, *, seed: int = 0) -> tuple[Images, Images]:
    """Divide into (training images, held-out images).

    With `held`, its images are left out of training where its `paths` name them (the lossless
    twins of JPEG training images) or their pixels are the same. Without it a tenth, at most 5,170,
    is drawn with `seed`. Raises ValueError where both name classes differently, or where `held`
    names twins and none is found.
    """
    if held is not None:
        if held.classes != images.classes:
            raise ValueError(f"classes differ: {images.classes} in training, {held.classes} held")
        twins, pixels = set(held.paths), {image.tobytes() for image in held.image.numpy()}
        paths = images.paths or ("",) * len(images)
        rows = zip(paths, images.image.numpy(), strict=True)
        keep = torch.tensor([p not in twins and i.tobytes() not in pixels for p, i in rows])
        if twins and keep.all():
            raise ValueError(
                f"the held-out images have twins (as {held.paths[0]}) that must leave training,"
                " and none of them is in the training data: pass the folder that the paths name"
            )
        return images[keep.nonzero().flatten()], held
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = min(PARTS, math.ceil(len(images) / 10))
    return images[order[count:]], images[order[:count]]


def spread(images: Images, count: int | None) -> Images:
    """`count` images evenly spaced over all (an ImageFolder is sorted by class); all for None."""
    if count is None or count >= len(images):
        return images
    return images[torch.arange(count) * len(images) // count]


def to_float(image: Tensor) -> Tensor:
    """Uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [0, 1]."""
    return image.permute(0, 3, 1, 2).float() / 255


def to_uint8(x: Tensor) -> Tensor:
    """Float (N, 3, H, W) in [0, 1] to the nearest uint8 (N, H, W, 3)."""
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of x (N, 3, H, W) with probability 1/2."""
    coin = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(coin, x.flip(-1), x)


def crop(x: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Shift each image of x (N, 3, H, W) by up to `padding` pixels, filling with reflections."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (padding,) * 4, mode="reflect")
    shift = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=x.device)
    rows = (shift[0] + torch.arange(height, device=x.device))[:, :, None]  # (N, H, 1)
    columns = (shift[1] + torch.arange(width, device=x.device))[:, None, :]  # (N, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def batches(
    images: Images, size: int, *, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x float (B, 3, H, W), label (B,)); with a generator shuffled and augmented.

    The generator must live on the images' device.
    """
    count, device = len(images), images.image.device
    if generator is None:
        order, last = torch.arange(count, device=device), count
    else:
        order = torch.randperm(count, generator=generator, device=device)
        # A short last batch would unbalance BatchNorm's statistics, so training drops it.
        last = max(count - count % size, min(count, size))
    for start in range(0, last, size):
        chosen = order[start : start + size]
        x = to_float(images.image[chosen])
        if generator:
            x = crop(flip(x, generator), generator)
        yield x, images.label[chosen]
