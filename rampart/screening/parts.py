"""The verdicts of one shard as a Parquet file, whole or not there, with what it counted."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pyarrow import parquet

ROWS = 1024  # of a row group, which is in memory until it is written
KEY = b"rampart"  # of a file's metadata, under which its tally is
Row = Mapping[str, Any]


@dataclass
class Tally:
    """What is known of a shard that was screened, or of several."""

    images: int = 0
    detected: int = 0
    left_out: int = 0  # files in tars that hold no picture
    decisions: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    # How many images have each p-value, by its rank among those of the calibration: 1 is the least.
    ranks: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Count what another counted as well."""
        self.images += other.images
        self.detected += other.detected
        self.left_out += other.left_out
        for name in ("decisions", "labels", "errors", "ranks"):
            getattr(self, name).update(getattr(other, name))

    @property
    def judged(self) -> int:
        """The images that have a verdict."""
        return self.images - self.errors.total()


def schema(detectors: Sequence[str], *, fingerprints: bool) -> pa.Schema:
    """The columns of all parts of a run."""
    scores = pa.struct([(name, pa.float64()) for name in detectors])
    columns = [
        ("shard", pa.string()), ("name", pa.string()), ("decision", pa.string()),
        ("detected", pa.bool_()), ("label", pa.string()), ("index", pa.int32()),
        ("confidence", pa.float64()), ("p_value", pa.float64()), ("scores", scores),
        ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()),
        ("error", pa.string()), ("message", pa.string()),
    ]  # fmt: skip
    return pa.schema(columns + [("fingerprint", pa.list_(pa.uint64()))] * fingerprints)


class Part:
    """A file in the making: a context that moves it to its place only where all went well."""

    def __init__(self, path: Path, columns: pa.Schema, digest: str) -> None:
        self._path, self._columns, self._digest = path, columns, digest
        self._unfinished = _hidden(path)
        self._rows: list[Row] = []
        self.tally = Tally()

    def __enter__(self) -> Self:
        self._file = parquet.ParquetWriter(self._unfinished, self._columns, compression="zstd")
        return self

    def write(self, row: Row) -> None:
        """Add a row."""
        self._rows.append(row)
        if len(self._rows) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._columns))
            self._rows = []

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
            content = {"digest": self._digest, "tally": vars(self.tally)}
            self._file.add_key_value_metadata({KEY.decode(): json.dumps(content)})
        self._file.close()
        if kind is None:
            _finish(self._unfinished, self._path)
        else:
            self._unfinished.unlink()


def _hidden(path: Path) -> Path:
    """Where a part is made: Parquet's readers of a whole folder leave out what hides."""
    return path.with_name(f".{path.stem}.unfinished")


def place(path: Path, content: bytes) -> None:
    """Write a part that was made elsewhere, whole or not at all."""
    unfinished = _hidden(path)
    unfinished.write_bytes(content)
    _finish(unfinished, path)


def _finish(unfinished: Path, path: Path) -> None:
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def read(path: Path, digest: str) -> Tally | None:
    """What a finished part counted; None where there is none of that digest."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # of no file, and of another's
        metadata = parquet.read_metadata(path).metadata
        content = json.loads(metadata[KEY])
        if content["digest"] == digest:
            return _tally(content["tally"])
    return None


def _tally(content: Mapping[str, Any]) -> Tally:
    ranks = Counter({int(rank): count for rank, count in content["ranks"].items()})
    counters = {name: Counter(content[name]) for name in ("decisions", "labels", "errors")}
    images, detected, left_out = (content[name] for name in ("images", "detected", "left_out"))
    return Tally(images, detected, left_out, **counters, ranks=ranks)
