"""A folder that is ours alone, for what no other user of the machine may read or change."""

import os
import stat
from pathlib import Path

REMEDY = "chmod 700 it if it is yours, or name another"


class ForeignFolderError(ValueError):
    """Somebody else can read or change it; the message names it and the remedy."""


def claim(folder: Path, *files: str) -> None:
    """Make the folder, or check that it is ours alone; so must be those of `files` that exist.

    Raises ForeignFolderError for what another user owns, for a link, which its owner can redirect,
    and for a folder that is open to others; OSError for what cannot be made or read.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ForeignFolderError(f"{folder} is a link: name the folder itself")
    check_owner(folder, status)
    if status.st_mode & 0o077:
        raise ForeignFolderError(f"{folder} is open to others: {REMEDY}")
    for file in (folder / name for name in files):
        if os.path.lexists(file):
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise ForeignFolderError(
                    f"{file} is not a regular file: remove it, or name another folder"
                )
            check_owner(file, status)


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raise ForeignFolderError where `path` belongs to another user."""
    if status.st_uid != os.geteuid():
        raise ForeignFolderError(f"{path} belongs to somebody else: {REMEDY}")
