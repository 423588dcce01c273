"""An archive that others may have made, unpacked within bounds and checked against its hashes."""

import json
import zipfile
import zlib
from pathlib import Path

from rampart.export.archive import HANDLER
from rampart.handlers.contents import HASHES, verify

LARGEST = 8_000_000_000  # bytes of an archive's files, unpacked
TEXT = 64_000_000  # bytes of one that is read as JSON, YAML or code


def unpack(archive: Path, work: Path) -> list[str]:
    """The files of an archive in `work`, checked; returns their names in order."""
    if not archive.is_file():
        raise FileNotFoundError(f"no archive at {archive}: make one with `rampart archive`")
    try:
        with zipfile.ZipFile(archive) as packed:
            check_entries(archive, packed.infolist())
            packed.extractall(work)
            names = [name for name in packed.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{archive} is not an archive of TorchServe: {error}") from error
    try:
        check_listed(work, names)
        verify(work)
    except ValueError as error:
        raise ValueError(f"{archive}: {error}") from error
    # TorchServe runs the handler at the root, which has no hash of its own in older archives.
    if (work / "defended.py").read_bytes() != (work / HANDLER).read_bytes():
        raise ValueError(f"{archive}: its defended.py is not the one that was packed")
    return names


def check_entries(archive: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise ValueError for names that lead out of the archive, and for sizes that fill a disk."""
    names = [entry.filename for entry in entries]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"{archive} holds a file named {name!r}: do not trust it")
    if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > LARGEST:
        raise ValueError(f"{archive} holds a file twice, or more than 8 GB: do not trust it")
    for entry in entries:
        if entry.file_size > TEXT and entry.filename.endswith((".json", ".yaml", ".py")):
            raise ValueError(
                f"{archive} holds {entry.filename!r} of more than 64 MB: do not trust it"
            )


def check_listed(work: Path, names: list[str]) -> None:
    """Raise ValueError where sha256.json lists what is no file of the archive."""
    try:
        listed = json.loads((work / HASHES).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{HASHES} is missing or unreadable: build the archive anew") from error
    if not isinstance(listed, dict):
        raise ValueError(f"{HASHES} is no table of files: build the archive anew")
    if missing := sorted(set(listed) - set(names)):
        raise ValueError(f"{missing[0]} is missing from the archive: build the archive anew")
