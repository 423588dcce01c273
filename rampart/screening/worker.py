"""One process of a run: it opens the archive, and screens shard after shard."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rampart.handlers.errors import ImageError
from rampart.handlers.image import MAX_IMAGES, Picture
from rampart.handlers.queries.watch import Fingerprints
from rampart.handlers.service import AnyVerdict, Service
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Pixels
from rampart.handlers.verdict import Verdict
from rampart.launch.opening import open_archive
from rampart.screening import shards
from rampart.screening.parts import Part, Row, Tally, schema
from rampart.screening.shards import Item, LeftOut, Shard

# A table is the operator's own, and nobody's query: it shows scores, and touches no endpoint's
# store or quarantine.
CHANGES = {"detail": "full", "query_store": None, "quarantine": None}
SECRET = bytes(32)  # of fingerprints: who reads a table could compute them anyway
TURNED = 5  # EXIF orientations from here on swap width and height
Progress = Callable[[int], None]  # is told of each so many images


class Setup(NamedTuple):
    """What all processes of a run are told."""

    archive: Path
    out: Path  # folder of the parts
    workers: int
    device: str = "auto"
    only_flagged: bool = False
    copies: Path | None = None
    fingerprints: bool = False

    def open(self) -> Service:
        """The service that answers. Raises ValueError on one line."""
        changes = CHANGES | {"device": self.device}
        opened = open_archive(self.archive, Metrics(), workers=self.workers, changes=changes)
        if "boxes" in opened.service.outputs:
            raise ValueError(
                f"{self.archive} is an object detector: screen takes archives of classifiers"
            )
        return opened.service


class Screener:
    """Screens shards by one loaded graph."""

    def __init__(self, setup: Setup, service: Service) -> None:
        self._setup, self._service = setup, service
        self._ranked = self._service.calibration.images + 1
        detectors = self._service.calibration.detectors
        self._columns = schema(detectors, fingerprints=setup.fingerprints)
        self._fingerprints = Fingerprints(SECRET) if setup.fingerprints else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def screen(self, shard: Shard, progress: Progress) -> Tally:
        """Write the part of a shard; what it counted."""
        if self._setup.copies:  # of the shard as it was
            shutil.rmtree(self._setup.copies / Path(shard.part).stem, ignore_errors=True)
        with Part(self._setup.out / shard.part, self._columns, shard.digest) as part:
            items = self._pictures(shards.read(shard), part.tally)
            for batch in self._batches(items):
                for item, row in zip(batch, self._rows(batch), strict=True):
                    self._count(part.tally, row)
                    if row["detected"] or row["error"] or not self._setup.only_flagged:
                        part.write({"shard": shard.address, **row})
                    if row["detected"] and self._setup.copies:
                        self._copy(self._setup.copies, shard, item, part.tally.images)
                progress(len(batch))
        return part.tally

    def _pictures(self, items: Iterator[Item | LeftOut], tally: Tally) -> Iterator[Item]:
        """Those that there are; what holds none is counted."""
        for item in items:
            if isinstance(item, Item):
                yield item
            else:
                tally.left_out += 1

    def _batches(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        """Batches of items; the next one is read while one is judged."""

        def read() -> list[Item]:
            batch: list[Item] = []
            held = 0
            while len(batch) < MAX_IMAGES and held < shards.TOGETHER and (one := next(items, None)):
                batch.append(one)
                held += len(one.data) if isinstance(one.data, bytes) else 0
            return batch

        following = self._reader.submit(read)
        while batch := following.result():
            following = self._reader.submit(read)
            yield batch

    def _rows(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        pictures = [
            self._service.examine(item.data) if isinstance(item.data, bytes) else item.data
            for item in items
        ]
        judged = self._service.judge(pictures)
        columns = zip(items, pictures, judged, self._prints([p for p, _ in judged]), strict=True)
        return [
            named(item) | sized(picture) | told(verdict) | digests
            for item, picture, (_, verdict), digests in columns
        ]

    def _prints(self, images: Sequence[Pixels | ImageError]) -> list[dict[str, Any]]:
        """The fingerprint of each image, where they are wanted."""
        if self._fingerprints is None:
            return [{}] * len(images)
        pixels = [image for image in images if not isinstance(image, ImageError)]
        found = iter(self._fingerprints.digests(pixels, [""] * len(pixels)) if pixels else [])
        return [
            {} if isinstance(image, ImageError) else {"fingerprint": next(found).tolist()}
            for image in images
        ]

    def _count(self, tally: Tally, row: Row) -> None:
        tally.images += 1
        if row["error"]:
            tally.errors[row["error"]] += 1
            return
        tally.decisions[row["decision"]] += 1
        tally.detected += row["detected"]
        tally.labels[row["label"] or ""] += 1
        if row["p_value"] is not None:
            tally.ranks[round(row["p_value"] * self._ranked)] += 1

    def _copy(self, folder: Path, shard: Shard, item: Item, number: int) -> None:
        """The file of a picture, under the name of its part and its number there."""
        assert isinstance(item.data, bytes)
        home = folder / Path(shard.part).stem
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number:06d}-{shards.as_file(item.name)}").write_bytes(item.data)


def named(item: Item) -> dict[str, Any]:
    """A picture's name and hash."""
    is_read = isinstance(item.data, bytes)
    digest = hashlib.sha256(item.data).hexdigest() if is_read else None  # type: ignore[arg-type]
    return {"name": item.name, "sha256": digest}


def sized(picture: Picture | ImageError) -> dict[str, Any]:
    """Width and height of an upright picture, before it is scaled."""
    if isinstance(picture, ImageError):
        return {}
    width, height = picture.still.size
    turned = picture.still.orientation >= TURNED
    return {"width": height if turned else width, "height": width if turned else height}


def told(verdict: AnyVerdict | ImageError) -> dict[str, Any]:
    """A verdict's columns, or what is wrong with the picture."""
    if isinstance(verdict, ImageError):
        return {"detected": None, "error": verdict.type, "message": verdict.message}
    assert isinstance(verdict, Verdict) and verdict.detail is not None
    columns = ("decision", "detected", "label", "index", "confidence")
    row = {name: getattr(verdict, name) for name in columns}
    p_value = None if verdict.failed else verdict.p_value
    return row | {"p_value": p_value, "scores": verdict.detail["scores"], "error": None}
