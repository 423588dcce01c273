"""Pictures with the objects in them: on disk, and letterboxed in memory; and their batches."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rampart.handlers.image import Placement, framed, letterbox
from rampart.hardening.attack.noise import Noise
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.images import least_held
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.jitter import jitter
from rampart.hardening.objects.layouts import Scene, checked, read_layout
from rampart.hardening.train import distributed
from rampart.hardening.train.data import AHEAD, threads
from rampart.hardening.train.decoding import decoded, open_picture, read_view


@dataclass(frozen=True)
class Scenes:
    """Pictures on disk, decoded when they are needed, with the objects in each."""

    scenes: tuple[Scene, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, rows: Sequence[int]) -> "Scenes":
        return Scenes(tuple(self.scenes[row] for row in rows), self.classes)

    def spread(self, count: int) -> "Scenes":
        """`count` of them, evenly spaced; all where there are no more."""
        return self[evenly(len(self), count)]

    def picture(self, row: int) -> tuple[Pixels, Truth]:
        """Pixels (H, W, 3) of one picture, and its objects in them. Raises ValueError."""
        scene = self.scenes[row]
        pixels = decoded(scene.picture, open_picture(scene.picture, None))
        return pixels, truth_of(scene.boxes, scene.labels)

    def seen(self, row: int, size: int) -> tuple[Pixels, Truth, Placement]:
        """One picture as an endpoint sees it, with its objects there. Raises ValueError."""
        scene = self.scenes[row]
        view = read_view(scene.picture, size, framed)
        assert view.frame
        place = view.frame.placement
        return view.pixels, within(truth_of(scene.boxes, scene.labels), place, size), place

    def read(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[tuple[Pixels, Truth]]]]:
        """Each index tensor of `rows` with its pictures, decoded ahead; past the end they begin
        anew.
        """
        waiting: deque[tuple[Tensor, list[Future[tuple[Pixels, Truth]]]]] = deque()
        pool = ThreadPoolExecutor(threads())
        try:
            for index in rows:
                parts = [pool.submit(self.picture, row % len(self)) for row in index.tolist()]
                waiting.append((index, parts))
                if len(waiting) > AHEAD:
                    yield collected(*waiting.popleft())
            while waiting:
                yield collected(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def boxed(self, size: int) -> "Boxed":
        """All of them in memory, letterboxed to `size`, as an endpoint sees them."""
        with ThreadPoolExecutor(threads()) as pool:
            every = list(pool.map(lambda row: self.seen(row, size), range(len(self))))
        image = torch.from_numpy(np.stack([one[0] for one in every]))
        names = tuple(scene.picture.name for scene in self.scenes)
        truth, places = tuple(one[1] for one in every), tuple(one[2] for one in every)
        return Boxed(image, truth, self.classes, names, places)

    def digest(self) -> str:
        """Stands for names and sizes of the files, and for the boxes."""
        total = hashlib.sha256(repr(self.classes).encode())
        for scene in self.scenes:
            size = scene.picture.stat().st_size
            total.update(repr((scene.picture.name, size, scene.boxes, scene.labels)).encode())
        return total.hexdigest()

    def line(self) -> str:
        """How many pictures, and objects of each class, for people."""
        counts = Counter(label for scene in self.scenes for label in scene.labels)
        objects = ", ".join(f"{name} {counts[i]:,}" for i, name in enumerate(self.classes))
        empty = sum(not scene.labels for scene in self.scenes)
        return f"{len(self):,} pictures, {empty} of them empty; objects: {objects}"


@dataclass(frozen=True)
class Boxed:
    """Letterboxed pictures in memory, with objects in pixels of the square."""

    image: Tensor  # uint8 (N, S, S, 3)
    truth: tuple[Truth, ...]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[Placement, ...]

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, rows: Sequence[int]) -> "Boxed":
        return Boxed(
            self.image[list(rows)],
            tuple(self.truth[row] for row in rows),
            self.classes,
            tuple(self.names[row] for row in rows),
            tuple(self.places[row] for row in rows),
        )

    def spread(self, count: int) -> "Boxed":
        """`count` of them, evenly spaced; all where there are no more."""
        return self[evenly(len(self), count)]

    def to(self, device: torch.device) -> "Boxed":
        """The same on another device."""
        truth = tuple(Truth(*(part.to(device) for part in one)) for one in self.truth)
        return Boxed(self.image.to(device), truth, self.classes, self.names, self.places)

    def digest(self) -> str:
        """Stands for pixels and boxes."""
        total = hashlib.sha256(self.image.cpu().numpy().tobytes())
        for one in self.truth:
            total.update(repr((one.boxes.tolist(), one.labels.tolist())).encode())
        return total.hexdigest()


class SceneBatch(NamedTuple):
    """What a training step learns from; `noise` draws for each of its images."""

    x: Tensor  # (B, 3, S, S) in [0, 1]
    truth: list[Truth]
    noise: Noise


@dataclass(frozen=True)
class Lessons:
    """Scenes as a training meets them: `passes` times an epoch, each time otherwise."""

    scenes: Scenes
    size: int
    passes: int
    device: torch.device

    def __len__(self) -> int:
        return self.passes * len(self.scenes)

    def digest(self) -> str:
        """That of the scenes."""
        return self.scenes.digest()

    def shuffled(
        self, size: int, *, seed: int, epoch: int, skip: int, augmentations: Sequence[str]
    ) -> Iterator[SceneBatch]:
        """Yield the batches of an epoch after the first `skip`; this process's part of each.
        Order and augmentation follow from `seed`, `epoch` and the picture alone.
        """
        draws = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=draws)
        for index, every in self.scenes.read(distributed.portions(order, size, skip=skip)):
            keys = [hash((seed, epoch, row)) % 2**63 for row in index.tolist()]
            jittered = [
                jitter(*one, augmentations, key) for one, key in zip(every, keys, strict=True)
            ]
            squares, places = zip(*(letterbox(one[0], self.size) for one in jittered), strict=True)
            image = torch.from_numpy(np.stack(squares)).to(self.device)
            boxed = [
                within(one[1], place, self.size)
                for one, place in zip(jittered, places, strict=True)
            ]
            truth = [Truth(*(part.to(self.device) for part in one)) for one in boxed]
            noise = Noise(index.to(self.device), seed=seed, epoch=epoch)
            yield SceneBatch(to_float(image), truth, noise)


def evenly(every: int, count: int) -> list[int]:
    """The rows of `count` of so many, evenly spaced; all where there are no more."""
    count = min(count, every)
    return [row * every // count for row in range(count)]


def collected(
    index: Tensor, parts: list[Future[tuple[Pixels, Truth]]]
) -> tuple[Tensor, list[tuple[Pixels, Truth]]]:
    """What was waited for."""
    return index, [part.result() for part in parts]


def truth_of(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> Truth:
    """Lists as tensors."""
    return Truth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
    )


def within(truth: Truth, place: Placement, size: int) -> Truth:
    """The objects of a picture in pixels of the square of `size` that it is in."""
    boxes = torch.from_numpy(place.inside(truth.boxes.numpy())).clamp(0, size)
    return Truth(boxes, truth.labels)


class Divided(NamedTuple):
    """The pictures of a data set by what they are for."""

    train: Scenes
    validation: Scenes  # on which a checkpoint is chosen
    test: Scenes | None  # where the layout has one
    left_out: list[str]

    def parts(self) -> dict[str, Scenes]:
        """Those that there are, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in every.items() if part is not None}


def divided(path: Path, *, classes: Sequence[str] | None = None, skip_bad: bool = False) -> Divided:
    """The pictures at `path`, in the layout of VOC or COCO: as it divides them, else by digest.

    Raises FileNotFoundError or ValueError with the remedy; an error lists all bad boxes.
    """
    layout = read_layout(path)
    parts, left_out = checked(layout, classes=classes, skip_bad=skip_bad)
    names = tuple(classes or layout.classes)
    every = {part: Scenes(tuple(some), names) for part, some in parts.items()}
    train = every.get("train", every.get(""))
    if train is None or not len(train):
        raise ValueError(f"{path} has no pictures to train on: list some as its part `train`")
    if "validation" in every:
        return Divided(train, every["validation"], every.get("test"), left_out)
    return Divided(*by_digest(train), every.get("test"), left_out)


def by_digest(scenes: Scenes) -> tuple[Scenes, Scenes]:
    """(to train on, held out): a tenth, of small sets up to half, by a hash of names.

    So a picture stays on its side when others are added beside it.
    """
    count = max(-(-len(scenes) // 10), least_held(len(scenes)))
    names = [scene.picture.name.encode() for scene in scenes.scenes]
    order = sorted(range(len(scenes)), key=lambda row: hashlib.sha256(names[row]).digest())
    return scenes[sorted(order[count:])], scenes[sorted(order[:count])]
