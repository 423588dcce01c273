"""A store of pictures as shards: tar files of WebDataset, Parquet files, a thousand files a piece.

Any address that fsspec knows is one; what has no scheme is a path of this machine.
"""

import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rampart.handlers.errors import ImageError
from rampart.hardening.train.shards import spelled_out

PIECE = 1000  # files of a folder or a list that make a shard
AT_ONCE = 32  # files that are fetched together
LARGEST = 2**26  # bytes of a picture that is read into memory
TARS = (".tar", ".tar.gz", ".tgz")
LISTS = (".txt", ".list", ".lst")
# Files with another ending, and those that hide, are no pictures; an unsupported one gets an error.
PICTURES = (
    "", ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif",
    ".avif", ".jxl", ".jp2", ".ppm",
)  # fmt: skip
# What a column of Parquet may be called that names files.
NAMING = ("path", "file", "filename", "file_name", "file_path", "url", "image", "image_path")
Kind = Literal["files", "tar", "parquet"]


class Item(NamedTuple):
    """A picture by its name in its shard, or why it cannot be read."""

    name: str
    data: bytes | ImageError


class File(NamedTuple):
    """A file as a store lists it; `version` changes with its contents, as far as that is told."""

    address: str
    size: int
    version: str


class Shard(NamedTuple):
    """A part of a store that is screened as one; `files` are what it is made of.

    `weight` is its share of all work, in bytes or files.
    """

    address: str
    kind: Kind
    files: tuple[str, ...]
    digest: str
    weight: int
    column: str | None = None

    @property
    def part(self) -> str:
        """The name of the file with its verdicts, the same in each run."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", self.address.rpartition("/")[2]).strip("-")[:80]
        return f"{stem}-{hashlib.sha256(self.address.encode()).hexdigest()[:8]}.parquet"


class Store(NamedTuple):
    """The shards of a source, and how many files were left out since they hold no picture."""

    shards: list[Shard]
    left_out: int


def unreadable(reason: object) -> ImageError:
    """Why a picture or a shard cannot be read; the next run tries it again."""
    words = " ".join(str(reason).split()) or type(reason).__name__
    return ImageError(
        422, "unreadable", f"it cannot be read ({words}): repair or remove it, and screen again"
    )


def find(source: str, column: str | None = None) -> Store:
    """The shards of a folder, a file, a pattern, or a list of addresses (a text file, one a line).

    `column` holds the pictures of Parquet files, as bytes or as addresses. Raises ValueError where
    there is nothing to screen, or a package is missing that reads such an address.
    """
    if "://" not in source:
        source = str(Path(source).absolute())
    try:
        files = list(_listed(source) if source.endswith(LISTS) else _files(source))
    except ImportError as error:
        raise ValueError(f"{source} {_missing(source, error)}") from error
    except Exception as error:  # of any store: one without credentials raises one of its own
        reason = str(error) or type(error).__name__
        raise ValueError(f"{source} cannot be listed: {reason}") from error
    tars = [file for file in files if file.address.endswith(TARS)]
    tables = [file for file in files if file.address.endswith(".parquet")]
    pictures = [file for file in files if _suffix(file.address) in PICTURES]
    shards = [_shard(source, "tar", [file]) for file in tars]
    shards += [_shard(source, "parquet", [file], column=column) for file in tables]
    for number, first in enumerate(range(0, len(pictures), PIECE)):
        piece = pictures[first : first + PIECE]
        shards.append(_shard(source, "files", piece, address=f"{source}/{number:06d}"))
    if not shards:
        raise ValueError(
            f"{source} holds nothing to screen: pass a folder of pictures, a list of addresses"
            f" ({', '.join(LISTS)}), tar or Parquet files, or a pattern of them"
        )
    return Store(shards, len(files) - len(tars) - len(tables) - len(pictures))


def _missing(source: str, error: ImportError) -> str:
    if source.startswith("s3"):
        return 'needs s3fs: `pip install "rampart-endpoint[s3]"`'
    return f"cannot be listed: {error}"


def _shard(
    source: str,
    kind: Kind,
    files: Sequence[File],
    *,
    address: str = "",
    column: str | None = None,
) -> Shard:
    names = tuple(file.address for file in files)
    digest = hashlib.sha256(json.dumps([files, column]).encode()).hexdigest()
    weight = len(files) if kind == "files" else max(1, files[0].size)
    return Shard(address or names[0], kind, names, digest, weight, column)


def _suffix(address: str) -> str:
    """The ending of a name, in lower case; of one that hides, what no picture has."""
    name = address.rpartition("/")[2]
    return "." if name.startswith(".") else Path(name).suffix.lower()


def _listed(source: str) -> Iterator[File]:
    """The files that a list names: as addresses, or as paths from the folder of the list."""
    with _open(source) as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    home = source.rpartition("/")[0]
    for line in filter(None, map(str.strip, lines)):
        yield File(_beside(home, line), 0, "")


def _beside(home: str, address: str) -> str:
    """An address that may be a path from the folder `home`."""
    return address if "://" in address or address.startswith("/") else f"{home}/{address}"


def _files(source: str) -> Iterator[File]:
    """The files at an address, in order of their names."""
    from fsspec.core import url_to_fs

    for address in spelled_out(source):
        system, path = url_to_fs(address)
        if set("*?[") & set(path):
            found = system.glob(path, detail=True)
        else:
            about = _about(system, path)
            is_file = about["type"] == "file"
            found = {path: about} if is_file else system.find(path, detail=True)
        for name, about in sorted(found.items()):
            if about.get("type") == "file":
                address = name if "://" not in source else str(system.unstrip_protocol(name))
                yield File(address, about.get("size") or 0, _version(about))


def _about(system: Any, path: str) -> dict[str, Any]:
    """What a store tells of a path. `exists` would say no of a store that does not answer."""
    try:
        about: dict[str, Any] = system.info(path)
    except FileNotFoundError as error:
        raise FileNotFoundError("there is no such file or folder") from error
    return about


def _version(about: dict[str, Any]) -> str:
    """What changes where a file is written anew."""
    known = [about.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "last_modified")]
    return str(next(filter(None, known), ""))


def _open(address: str) -> Any:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(address)
    return system.open(path, "rb")


def read(shard: Shard) -> Iterator[Item]:
    """The pictures of a shard; one that is cut gives those before the cut, then an error.

    Only a batch of them is in memory.
    """
    readers = {"files": _read_files, "tar": _read_tar, "parquet": _read_parquet}
    try:
        yield from readers[shard.kind](shard)
    except Exception as error:  # of any store, and any file
        yield Item(shard.address, unreadable(error))


def _read_files(shard: Shard) -> Iterator[Item]:
    return fetch(zip(shard.files, shard.files, strict=True))


def fetch(named: Iterable[tuple[str, str]]) -> Iterator[Item]:
    """(name, address) as pictures, fetched together from where that is quicker."""
    from fsspec.core import url_to_fs

    pairs = iter(named)
    while batch := list(itertools.islice(pairs, AT_ONCE)):
        places = [url_to_fs(address) for _, address in batch]
        systems = {id(system): system for system, _ in places}
        found: dict[tuple[int, str], Any] = {}
        for key, system in systems.items():
            paths = [path for other, path in places if other is system]
            contents = system.cat(paths, on_error="return") if paths else {}
            found |= {(key, path): data for path, data in contents.items()}
        for (name, _), (system, path) in zip(batch, places, strict=True):
            yield Item(name, _checked(found[id(system), path]))


def _checked(data: Any) -> bytes | ImageError:
    if isinstance(data, BaseException):
        return unreadable(data)
    return data if len(data) <= LARGEST else _too_large()


def _too_large() -> ImageError:
    return ImageError(
        413, "file_too_large", f"the file has more than {LARGEST / 1e6:.0f} MB: scale it down"
    )


def _read_tar(shard: Shard) -> Iterator[Item]:
    with _open(shard.files[0]) as file, tarfile.open(fileobj=file, mode="r|*") as packed:
        for member in packed:
            packed.members = []  # type: ignore[attr-defined]  # or it remembers all of them
            if member.isfile() and _suffix(member.name) in PICTURES:
                content = packed.extractfile(member)
                large = member.size > LARGEST
                data = _too_large() if content is None or large else content.read()
                yield Item(member.name, data)


def _read_parquet(shard: Shard) -> Iterator[Item]:
    from pyarrow import parquet

    with _open(shard.files[0]) as file:
        table = parquet.ParquetFile(file)
        column = shard.column or _column(table.schema_arrow, shard.address)
        rows = itertools.count()
        home = shard.address.rpartition("/")[0]
        for batch in table.iter_batches(AT_ONCE, columns=[column]):
            cells = batch.column(0).to_pylist()
            yield from _cells([(str(next(rows)), cell) for cell in cells], home)


def _column(schema: Any, address: str) -> str:
    """The column with the pictures: the first of bytes, else one whose name says it names files."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        fields = [field.name for field in kind] if types.is_struct(kind) else []
        return types.is_binary(kind) or types.is_large_binary(kind) or "bytes" in fields

    holding = [field.name for field in schema if is_bytes(field.type)]
    naming = [field.name for field in schema if field.name.lower() in NAMING]
    if not (found := [*holding, *naming]):
        raise ValueError(f"{address} has no column of pictures: name it with --column")
    return str(found[0])


def _cells(cells: Sequence[tuple[str, Any]], home: str) -> Iterator[Item]:
    """(row, what stands there): bytes, an address, or both as `datasets` write them."""
    contents = [(row, _content(cell)) for row, cell in cells]
    addresses = [(row, _beside(home, cell)) for row, cell in contents if isinstance(cell, str)]
    fetched = {item.name: item for item in fetch(addresses)}
    for row, cell in contents:
        if isinstance(cell, bytes):
            yield Item(row, _checked(cell))
        else:
            yield fetched.get(row) or Item(row, unreadable("the row is empty"))


def _content(cell: Any) -> Any:
    return (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell


def as_file(name: str) -> str:
    """A picture's name as that of a file, in no other folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.rpartition("/")[2]).lstrip(".")[-120:] or "picture"
