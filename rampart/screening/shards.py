"""A store of pictures as shards: tar files of WebDataset, Parquet files, a thousand files a piece.

Any address that fsspec knows is one; what has no scheme is a path of this machine.
"""

import asyncio
import hashlib
import itertools
import json
import os
import posixpath
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
TOGETHER = 2 * LARGEST  # of files that are in memory at once, as far as it is known before
HEADER = 2**20  # bytes of a header in a tar: one may say that it has gigabytes
HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
TARS = (".tar", ".tar.gz", ".tgz")
LISTS = (".txt", ".list", ".lst")
# Files with another ending, and those that hide, are no pictures; an unsupported one gets an error.
PICTURES = (
    "", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".webp", ".gif", ".bmp", ".tif",
    ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jpeg2", ".ppm",
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
    size: int  # 0 where it is not known
    version: str


class LeftOut(NamedTuple):
    """What stands in a shard and holds no picture."""

    name: str


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
    sizes: tuple[int, ...] = ()
    # Whether addresses in a table may lie elsewhere than below its own folder.
    elsewhere: bool = False

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


ELSEWHERE = ImageError(
    422,
    "elsewhere",
    "the row names a file outside the folder of its table: pass --elsewhere if you trust who wrote"
    " it",
)


def find(source: str, column: str | None = None, *, elsewhere: bool = False) -> Store:
    """The shards of a folder, a file, a pattern, or a list of addresses (a text file, one a line).

    `column` holds the pictures of Parquet files, as bytes or as addresses, of what lies below the
    file's own folder, or `elsewhere` too. Raises ValueError where there is nothing to screen, or a
    package is missing that reads such an address.
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
    shards = [_shard("tar", [file]) for file in tars]
    shards += [_shard("parquet", [file], column=column, elsewhere=elsewhere) for file in tables]
    for number, first in enumerate(range(0, len(pictures), PIECE)):
        piece = pictures[first : first + PIECE]
        shards.append(_shard("files", piece, address=f"{source}/{number:06d}"))
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
    kind: Kind,
    files: Sequence[File],
    *,
    address: str = "",
    column: str | None = None,
    elsewhere: bool = False,
) -> Shard:
    names, sizes = tuple(file.address for file in files), tuple(file.size for file in files)
    what = [files, column, elsewhere] if elsewhere else [files, column]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    weight = len(files) if kind == "files" else max(1, files[0].size)
    return Shard(address or names[0], kind, names, digest, weight, column, sizes, elsewhere)


def _suffix(address: str) -> str:
    """The ending of a name, in lower case; of one that hides, what no picture has."""
    path = address.partition("?")[0] if "://" in address else address  # of a signed one
    name = path.rpartition("/")[2]
    return "." if name.startswith(".") else Path(name).suffix.lower()


def _listed(source: str) -> Iterator[File]:
    """The files that a list names: as addresses, or as paths from the folder of the list."""
    with _open(source) as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    home = source.rpartition("/")[0]
    for line in filter(None, map(str.strip, lines)):
        yield _known(_beside(home, line))


def _known(address: str) -> File:
    """A file that a list names. Of those of a store nothing is asked: there may be millions."""
    try:
        about = None if "://" in address else Path(address).stat()
    except OSError:
        about = None
    return File(address, about.st_size, str(about.st_mtime)) if about else File(address, 0, "")


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


def read(shard: Shard) -> Iterator[Item | LeftOut]:
    """The pictures of a shard; one that is cut gives those before the cut, then an error.

    Only a batch of them is in memory.
    """
    readers = {"files": _read_files, "tar": _read_tar, "parquet": _read_parquet}
    try:
        yield from readers[shard.kind](shard)
    except Exception as error:  # of any store, and any file
        yield Item(shard.address, unreadable(error))


def _read_files(shard: Shard) -> Iterator[Item]:
    return fetch(zip(shard.files, shard.files, shard.sizes, strict=True))


def fetch(named: Iterable[tuple[str, str, int]]) -> Iterator[Item]:
    """(name, address, size or 0) as pictures, fetched together from where that is quicker."""
    for batch in _batches(named):
        found = _contents([address for _, address, size in batch if size <= LARGEST])
        for name, address, size in batch:
            yield Item(name, _checked(found[address]) if size <= LARGEST else _too_large())


def _batches(named: Iterable[tuple[str, str, int]]) -> Iterator[list[tuple[str, str, int]]]:
    """As many at once as there is room for."""
    batch: list[tuple[str, str, int]] = []
    for one in named:
        if len(batch) == AT_ONCE or sum(size for *_, size in [*batch, one]) > TOGETHER:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _contents(addresses: Sequence[str]) -> dict[str, Any]:
    """The first bytes of files, one more than a picture may have, or the error of each."""
    from fsspec.asyn import sync
    from fsspec.core import url_to_fs

    found: dict[str, Any] = {}
    together: dict[Any, list[tuple[str, str]]] = {}
    for address in addresses:
        try:
            system, path = url_to_fs(address)
            if system.async_impl:
                together.setdefault(system, []).append((address, path))
            else:
                found[address] = _content_of(system, path)
        except Exception as error:  # of any store
            found[address] = error
    for system, places in together.items():
        contents = sync(system.loop, _gathered, system, [path for _, path in places])
        found |= {address: data for (address, _), data in zip(places, contents, strict=True)}
    return found


async def _gathered(system: Any, paths: Sequence[str]) -> list[Any]:
    # Not `cat`, which takes a name with brackets for a pattern.
    return await asyncio.gather(*map(system._cat_file, paths), return_exceptions=True)


def _content_of(system: Any, path: str) -> bytes:
    if "file" in system.protocol and not Path(path).is_file():
        raise OSError("it is no regular file")
    with system.open(path, "rb") as file:
        data: bytes = file.read(LARGEST + 1)
    return data


def _checked(data: Any) -> bytes | ImageError:
    if isinstance(data, BaseException):
        return unreadable(data)
    return data if len(data) <= LARGEST else _too_large()


def _too_large() -> ImageError:
    return ImageError(
        413, "file_too_large", f"the file has more than {LARGEST / 1e6:.0f} MB: scale it down"
    )


class Member(tarfile.TarInfo):
    """What stands in a tar. tarfile takes a damaged header for the end, and reads any before it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """As tarfile calls it."""
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # its true end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the tar is cut or damaged: {error}") from None
        if member.type in HEADERS and member.size > HEADER:
            raise tarfile.ReadError(f"the tar has a header of {member.size:,} bytes")
        return member


def _read_tar(shard: Shard) -> Iterator[Item | LeftOut]:
    kind = Member
    with (
        _open(shard.files[0]) as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=kind) as packed,
    ):
        for member in packed:
            packed.members = []  # type: ignore[attr-defined]  # or it remembers all of them
            if not member.isfile():
                continue
            if _suffix(member.name) not in PICTURES:
                yield LeftOut(member.name)
                continue
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
        for batch in table.iter_batches(AT_ONCE, columns=[column]):
            cells = batch.column(0).to_pylist()
            yield from _cells([(str(next(rows)), cell) for cell in cells], shard)


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


def _cells(cells: Sequence[tuple[str, Any]], shard: Shard) -> Iterator[Item]:
    """(row, what stands there): bytes, an address, or both as `datasets` write them."""
    contents = [(row, _content(cell)) for row, cell in cells]
    home = shard.address.rpartition("/")[0]
    named = [(row, _beside(home, cell)) for row, cell in contents if isinstance(cell, str)]
    inside = [(row, at, 0) for row, at in named if shard.elsewhere or _lies_below(home, at)]
    fetched = {item.name: item for item in fetch(inside)}
    strangers = {row for row, _ in named} - set(fetched)
    for row, cell in contents:
        if isinstance(cell, bytes):
            yield Item(row, _checked(cell))
        else:
            error = ELSEWHERE if row in strangers else unreadable("the row is empty")
            yield fetched.get(row) or Item(row, error)


def _lies_below(home: str, address: str) -> bool:
    """Whether an address is of something in a folder, or below it; links are followed."""
    if "://" not in home:
        home, address = os.path.realpath(home), os.path.realpath(address)
    return posixpath.normpath(address).startswith(f"{posixpath.normpath(home)}/")


def _content(cell: Any) -> Any:
    return (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell


def as_file(name: str) -> str:
    """A picture's name as that of a file, in no other folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.rpartition("/")[2]).lstrip(".")[-120:] or "picture"
