"""A folder that is ours alone, for what no other user of the machine may read or change."""

import os
import stat
from pathlib import Path

REMEDY = "chmod 700 it if it is yours, or name another"


class NotOursError(ValueError):
    """Somebody else can change or read it; the message names it and the remedy."""


def claim(folder: Path, *files: str) -> None:
    """Make the folder, or check that it is ours alone; so must be those of `files` that exist.

    Raises NotOursError for what belongs to somebody else, for a link, which its owner can turn
    elsewhere, and for a folder that is open to others; OSError for what cannot be made or read.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotOursError(f"{folder} is a link: name the folder itself")
    check_owner(folder, status)
    if status.st_mode & 0o077:
        raise NotOursError(f"{folder} is open to others: {REMEDY}")
    for name in files:
        if os.path.lexists(folder / name):
            check_file(folder / name)


def check_file(file: Path) -> None:
    """Raise NotOursError for what is no plain file of ours: it was put there before us."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise NotOursError(f"{file} is no plain file: remove it, or name another folder")
    check_owner(file, status)


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raise NotOursError where `path` belongs to another user."""
    if status.st_uid != os.geteuid():
        raise NotOursError(f"{path} belongs to somebody else: {REMEDY}")
