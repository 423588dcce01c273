"""Labelled images from CIFAR-10, an ImageFolder, tar shards or an .npz file, and their batches."""

import hashlib
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rampart.hardening.attack.noise import Noise
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.images import Held, Images, Source, hold_out, least_held
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.presence import check_file
from rampart.hardening.model.provenance import fingerprints
from rampart.hardening.train import cifar10, distributed
from rampart.hardening.train.augmentation import augment
from rampart.hardening.train.convergence import Convergence
from rampart.hardening.train.decoding import Decoders, decoded, open_picture, read_picture
from rampart.hardening.train.listing import list_classes
from rampart.hardening.train.shards import (
    Member,
    class_names,
    is_sharded,
    list_samples,
    numbered,
    shards_of,
    size_of,
)
from rampart.hardening.train.store import Store, fits
from rampart.hardening.train.survey import Size, Survey

ARRAYS = ("image", "label", "classes", "jpeg_path")  # of an .npz file
MOST_CLASSES = 100_000  # that labels alone, without names, may make
# Decoded training images up to this size are kept in memory; beyond, files are read as needed.
MEMORY = 4 * 2**30
AHEAD = 2  # batches decoded before they are asked for
SOON = 256 * 2**20  # bytes of pictures that are decoded in seconds
# Threads that decode side by side: of more, each would wait while others run Python.
ENOUGH = 4
PIECE = 1024  # pictures that wait for a thread at most
FEW = 128  # pictures that are decoded together to be looked at once
LISTED = 100  # bad pictures that an error names


@dataclass(frozen=True)
class Folder:
    """Pictures on disk, decoded to `size` when they are needed; `device` is where batches go. A
    `store` keeps what was decoded.
    """

    files: tuple[Path | Member, ...]
    label: Tensor  # (N,) int64
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    size: int
    device: torch.device
    store: Store | None = None

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> "Folder":
        """The same pictures, read for `device`."""
        return replace(self, device=device)

    def __getitem__(self, index: Tensor) -> "Folder":
        rows = index.tolist()
        files, paths = tuple(self.files[i] for i in rows), tuple(self.paths[i] for i in rows)
        return replace(self, files=files, label=self.label[index], paths=paths, store=None)

    def stored(self, folder: Path) -> "Folder":
        """The same pictures, kept in a file of `folder` once decoded, where its disk has room."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"pixels-{self.digest()[:16]}"
        if self.store or not (file.is_file() or fits(folder, len(self), self.size)):
            return self
        for other in set(folder.glob("pixels-*")) - {file}:  # of a run before
            other.unlink(missing_ok=True)
        return replace(self, store=Store(file, len(self), self.size))

    def read(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (image, label) for each index tensor of `rows`, decoded ahead by threads."""
        pool = ThreadPoolExecutor(threads())
        decoders = self.decoders()
        waiting: deque[tuple[Tensor, list[Future[Pixels]]]] = deque()
        try:
            for index in rows:
                own = index.cpu().numpy()
                if self.store and self.store.has(own):
                    parts = [pool.submit(self.store.read, own)]
                else:
                    parts = [pool.submit(self.picture, row, decoders) for row in own.tolist()]
                waiting.append((index, parts))
                if len(waiting) > AHEAD:
                    yield self.collect(*waiting.popleft())
            while waiting:
                yield self.collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
            if decoders:
                decoders.close()

    def decoders(self) -> Decoders | None:
        """Processes that decode into the store, where threads would wait for each other."""
        return Decoders(self.store, self.size) if self.store and threads() > ENOUGH else None

    def picture(self, row: int, decoders: Decoders | None = None) -> Pixels:
        """One picture as (1, size, size, 3), decoded, and stored where there is a store."""
        if decoders and self.store:
            decoders.decode(row, self.files[row])
            return self.store.read(np.array([row]))
        pixels = read_picture(self.files[row], self.size)
        if self.store:
            self.store.keep(row, pixels)
        return pixels[None]

    def collect(self, index: Tensor, parts: list[Future[Pixels]]) -> tuple[Tensor, Tensor]:
        """(image, label) of a batch on the device, of its parts (B, size, size, 3)."""
        image = torch.from_numpy(np.concatenate([part.result() for part in parts]))
        return self.send(image), self.send(self.label[index])

    def send(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, without waiting for the way there."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def whole(self) -> Images:
        """All pictures, decoded. Raises ValueError that names each that cannot be read."""
        image, found = self.examined(keep=True)
        check_readable(found)
        return Images(image, self.label, self.classes, self.paths)

    def examined(self, *, keep: bool) -> tuple[Tensor, list[Size | str]]:
        """Pixels uint8 (N, H, W, 3) where they are to `keep`, and of each picture the size that it
        is stored in or what is wrong with it. Without pixels only its structure is checked, of a
        large JPEG by its ends.
        """
        count = len(self) if keep else 0
        image = torch.zeros((count, self.size, self.size, 3), dtype=torch.uint8)
        found: list[Size | str] = []

        def look(row: int) -> Size | str:
            try:
                picture = open_picture(self.files[row], self.size, whole=keep)
                if keep:
                    image[row] = torch.from_numpy(decoded(self.files[row], picture))
                return picture.still.size
            except OSError as error:
                return f"{self.files[row]}: {error.strerror}: remove it"
            except ValueError as error:
                return str(error)

        title = "reading pictures" if keep else "looking at pictures"
        with ThreadPoolExecutor(threads()) as pool:
            starts = range(0, len(self), PIECE)
            pieces = (range(start, min(len(self), start + PIECE)) for start in starts)
            each = chain.from_iterable(pool.map(look, piece) for piece in pieces)
            found += tqdm(each, title, len(self), leave=False)
        return image, found

    def hold_out(self, held: Images | None = None, *, seed: int = 0) -> "tuple[Folder, Held]":
        """(training images, those held out), as the function `hold_out` divides them; of a small
        set half.
        """
        train, rest = hold_out(self, held, seed=seed, least=least_held(len(self)))
        return train, Held(rest, train)

    def unlike(self, held: Images) -> Tensor:
        """Which pictures (N,) have other pixels than all of `held`, each decoded once for it."""
        others = fingerprints(held.image)
        rows = torch.split(torch.arange(len(self)), FEW)
        read = replace(self, device=torch.device("cpu")).read(rows)
        each = tqdm(read, "looking for held-out pictures", len(rows), leave=False)
        parts = [~np.isin(fingerprints(image), others) for image, _ in each]
        return torch.from_numpy(np.concatenate([np.ones(0, bool), *parts]))

    def digest(self) -> str:
        """Stands for the files by names, sizes and labels; times would differ between copies."""
        sizes = [size_of(file) for file in self.files]
        listing = list(zip(self.paths, sizes, self.label.tolist(), strict=True))
        return hashlib.sha256(repr((listing, self.classes, self.size)).encode()).hexdigest()


def load(path: Path, *, train: bool = True, size: int = 32, skip_bad: bool = False) -> Images:
    """Read the images under `path`: an .npz file, CIFAR-10's official batches, an ImageFolder, or
    tar shards in WebDataset's layout. An .npz file holds `image` uint8 (N, H, W, 3) and `label`
    (N,), optionally `classes`. `train` picks the half of CIFAR-10; `skip_bad` leaves out the
    pictures of a folder or of shards that cannot be read. Raises FileNotFoundError or ValueError
    with the remedy.
    """
    return survey(path, size=size, train=train, skip_bad=skip_bad)[0].whole()


def survey(
    path: Path,
    *,
    size: int,
    train: bool = True,
    stream: bool = False,
    skip_bad: bool = False,
) -> tuple[Images | Folder, Survey]:
    """As `load`, with what was found; with `stream` pictures that would fill memory stay on disk.

    Of such a folder the structure of each picture is checked, and not its pixels.
    """
    if is_sharded(path):
        return survey_shards(path, size=size, stream=stream, skip_bad=skip_bad)
    if path.is_dir() and not cifar10.lies_in(path):
        return survey_folder(path, size=size, stream=stream, skip_bad=skip_bad)
    if path.suffix == ".npz" and path.is_file():
        images = load_npz(path)
    elif path.is_dir():
        images = cifar10.load(path, train=train)
    else:
        raise FileNotFoundError(
            f"no data at {path}: pass an .npz file, a folder of class folders, tar shards, or the"
            " folder that holds cifar-10-batches-py (`rampart download cifar10 PATH` fetches it)"
        )
    height, width = images.image.shape[1:3]
    if (height, width) != (size, size):
        raise ValueError(
            f"{path} holds {height}x{width} images, but the model takes {size}x{size}: save them at"
            " that size, or pass a folder of pictures, which are brought to it"
        )
    return images, Survey(path.name, counted(images), [(width, height)])


def survey_folder(
    path: Path, *, size: int, stream: bool, skip_bad: bool
) -> tuple[Images | Folder, Survey]:
    """As `survey`, of an ImageFolder directory."""
    listing = list_classes(path)
    folder = folder_of(path, listing.classes, size)
    found, report = survey_files(folder, [], listing.lines(), stream=stream, skip_bad=skip_bad)
    if empty := [name for name, count in report.counts.items() if not count]:
        raise ValueError(f"{path / empty[0]} has no readable picture: add some")
    return found, report._replace(name=path.name)


def survey_shards(
    path: Path, *, size: int, stream: bool, skip_bad: bool
) -> tuple[Images | Folder, Survey]:
    """As `survey`, of tar shards."""
    shards = shards_of(path)
    listed = list_samples(shards)
    if not listed.members:
        why = f" ({listed.bad[0]})" if listed.bad else ""
        raise ValueError(
            f"{path} has no labelled picture{why}: a WebDataset shard has NAME.cls or NAME.json"
            " beside each NAME.jpg. Unpack a tar that holds class folders"
        )
    classes = class_names(shards, listed.labels, MOST_CLASSES)
    listed = numbered(listed, classes)
    label = torch.tensor(listed.labels, dtype=torch.int64)
    names = tuple(f"{member.shard.name}/{member.name}" for member in listed.members)
    device = torch.device("cpu")
    folder = Folder(tuple(listed.members), label, classes, names, size, device)
    lines = [f"{count} {reason}" for reason, count in sorted(listed.left_out.items())]
    found, report = survey_files(folder, listed.bad, lines, stream=stream, skip_bad=skip_bad)
    return found, report._replace(name=path.name)


def survey_files(
    folder: Folder, bad: list[str], left_out: list[str], *, stream: bool, skip_bad: bool
) -> tuple[Images | Folder, Survey]:
    """As `survey`, of pictures on disk; `bad` tells of others that have no place in `folder`."""
    size = folder.size
    # Whatever the number of processes, or a run could not go on with another one.
    keep = not stream or len(folder) * size * size * 3 <= MEMORY
    # What is cut or no picture is told in seconds, where to decode all takes minutes.
    if not keep or sum(bytes_in(file) for file in folder.files) > SOON:
        image, found = folder.examined(keep=False)
        if not skip_bad:
            check_readable([*bad, *found])
    if keep:
        image, found = folder.examined(keep=True)
    good = torch.tensor([not isinstance(entry, str) for entry in found])
    if not skip_bad:
        check_readable([*bad, *found])
    elif bad or not good.all():
        left_out = [*left_out, f"{len(bad) + int((~good).sum())} that cannot be read"]
        rows = good.nonzero().flatten()
        folder, image = folder[rows], image[rows] if keep else image
    sizes = [entry for entry in found if not isinstance(entry, str)]
    report = Survey("", counted(folder), sizes, left_out)
    if not keep:
        return folder, report
    return Images(image, folder.label, folder.classes, folder.paths), report


def counted(images: Images | Folder) -> dict[str, int]:
    """How many images each class has."""
    counts = torch.bincount(images.label, minlength=len(images.classes)).tolist()
    return dict(zip(images.classes, counts, strict=True))


def bytes_in(file: Path | Member) -> int:
    """The size of a picture's file; 0 of one that is gone, which is told when it is opened."""
    try:
        return size_of(file)
    except OSError:
        return 0


def check_readable(found: Sequence[Size | str]) -> None:
    """Raise ValueError that names each picture of those `found` that cannot be read, and why."""
    bad = [entry for entry in found if isinstance(entry, str)]
    if not bad:
        return
    raise ValueError(
        f"{len(bad):,} of {len(found):,} pictures cannot be read (train, harden and calibrate leave"
        f" them out with --skip-bad):\n  {fault_lines(bad)}"
    )


def fault_lines(faults: Sequence[str]) -> str:
    """The first LISTED faults, a line each, and how many more there are."""
    more = [f"and {len(faults) - LISTED:,} more"] if len(faults) > LISTED else []
    return ";\n  ".join([*faults[:LISTED], *more])


def load_npz(path: Path) -> Images:
    """Read `image`, `label` and, where present, `classes` and `jpeg_path` from an .npz file."""
    check_file(path, "data", "pass an .npz file")
    try:  # numpy would leave the file open where it fails
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}): copy or save it again"
        ) from error
    if missing := {"image", "label"} - set(arrays):
        raise ValueError(f"{path} lacks {sorted(missing)}: save image (N, H, W, 3) and label")
    image, label = arrays["image"], whole_numbers(path, arrays["label"])
    paths = tuple(map(str, arrays.get("jpeg_path", ())))
    # Only the CIFAR-10 files of this layout name their JPEG twins.
    highest = int(label.max(initial=-1))
    if "classes" not in arrays and highest >= MOST_CLASSES:
        raise ValueError(
            f"{path}: a label is {highest}, so there would be that many classes: number classes"
            " from 0 without gaps, or save their names as `classes`"
        )
    usual = cifar10.CLASSES if paths else range(highest + 1)
    classes = tuple(map(str, arrays.get("classes", usual)))
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(
            f"{path}: image must be uint8 (N, H, W, 3), found {image.dtype} {image.shape}"
        )
    if label.shape != image.shape[:1]:
        raise ValueError(
            f"{path}: {len(image)} images but labels of shape {label.shape}: save one label for"
            " each image"
        )
    if len(label) and not 0 <= label.min() <= label.max() < len(classes):
        raise ValueError(
            f"{path}: a label lies outside the {len(classes)} classes: number them from 0, and save"
            " the names of all as `classes`"
        )
    return Images(torch.from_numpy(image), torch.from_numpy(label), classes, paths)


def whole_numbers(path: Path, label: NDArray[np.generic]) -> NDArray[np.int64]:
    """Labels as int64. Raises ValueError for other than whole numbers."""
    if label.dtype.kind not in "iuf" or not (np.mod(label, 1) == 0).all():
        raise ValueError(
            f"{path}: label holds {label.dtype} where classes are numbered: save the index of each"
            " image's class, and their names as `classes`"
        )
    return label.astype(np.int64)


def load_training(path: Path, *, size: int) -> Images | Folder:
    """As `load`, but a folder whose pictures would fill memory is left on disk."""
    return survey(path, size=size, stream=True)[0]


def find_pictures(path: Path, *, size: int) -> Folder:
    """The pictures of an ImageFolder directory, each class in a folder of its own; none is read.
    Raises ValueError for no pictures, and for folders that are no classes.
    """
    return folder_of(path, list_classes(path).classes, size)


def folder_of(path: Path, classes: Mapping[str, Sequence[Path]], size: int) -> Folder:
    """The files of `classes` as they lie under `path`."""
    files = tuple(file for some in classes.values() for file in some)
    label = torch.tensor([index for index, some in enumerate(classes.values()) for _ in some])
    root = path.resolve().name
    names = tuple(f"{root}/{file.relative_to(path)}" for file in files)
    return Folder(files, label, tuple(classes), names, size, torch.device("cpu"))


def threads() -> int:
    """How many threads of this process read pictures."""
    return max(1, len(os.sched_getaffinity(0)) // distributed.beside())


def spread(images: Source, count: int | None) -> Images:
    """`count` images evenly spaced over all (an ImageFolder is sorted by class); all for None.

    Raises ValueError where those of a folder would fill memory.
    """
    if count is not None and count < len(images):
        images = images[torch.arange(count) * len(images) // count]
    if isinstance(images, Folder) and len(images) > (most := MEMORY // (images.size**2 * 3)):
        raise ValueError(
            f"attacks keep images in memory ({MEMORY / 2**30:g} GiB at most), and {len(images):,}"
            f" images from {images.paths[0]} on do not fit: pass --limit {most} or less"
        )
    return images.whole()


class Batch(NamedTuple):
    """What a training step learns from; `noise` draws for each of its images."""

    x: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B,)
    noise: Noise
    soft: Tensor | None = None  # (B, K) what a teacher says of x, probabilities
    convergence: Convergence | None = None  # what the loss was in past epochs


def shuffled(
    images: Images | Folder,
    size: int,
    *,
    seed: int,
    epoch: int,
    skip: int = 0,
    augmentations: Sequence[str] = (),
    balance: float = 0.0,
) -> Iterator[Batch]:
    """Yield the augmented batches of an epoch after the first `skip`; this process's part of each.
    Order and augmentation follow from `seed`, `epoch` and the image alone.
    """
    draws = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if balance:
        order, keys = balanced(images.label.cpu(), len(images.classes), balance, draws)
    else:
        order = keys = torch.randperm(len(images), generator=draws)
    if isinstance(images, Images):
        # Once, and not at every step.
        order, keys = (index.to(images.label.device) for index in (order, keys))
    rows, own_keys = (distributed.portions(index, size, skip=skip) for index in (order, keys))
    for key, (image, label) in zip(own_keys, images.read(rows), strict=True):
        own = images.send(key) if isinstance(images, Folder) else key
        noise = Noise(own, seed=seed, epoch=epoch)
        yield Batch(augment(to_float(image), noise, augmentations), label, noise)


def balanced(
    label: Tensor, classes: int, balance: float, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As many images as there are labels (N,), in random order, and keys (N,) for their noise.

    A class of n images is drawn in proportion to n ** (1 - balance): 1 draws all classes equally
    often, 1/2 by the square root (Kang et al. 2020, section 4.1). Each image comes as often as its
    share says, rounded up or down, and with other noise each time.
    """
    count = len(label)
    weight = torch.bincount(label, minlength=classes).double().pow(-balance)[label]
    mixed = torch.randperm(count, generator=draws)
    mixed = mixed[label[mixed].argsort(stable=True)]  # by class, so that each gets its share
    ends = weight[mixed].cumsum(0)
    offset = torch.rand((), generator=draws, dtype=torch.float64)
    at = (torch.arange(count) + offset) / count * ends[-1]
    place = torch.searchsorted(ends, at, right=True).clamp(max=count - 1)
    again = torch.arange(count) - torch.searchsorted(place, place)  # which time it is
    order = torch.randperm(count, generator=draws)
    return mixed[place][order], (mixed[place] + count * again)[order]
