"""What every download has in common: a time limit, and nothing left behind that misleads."""

import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SILENCE = 30  # seconds without a word of a download
FAILURES = (OSError, RuntimeError, EOFError, tarfile.TarError, zipfile.BadZipFile)


@contextmanager
def fetching(folder: Path, name: str, remedy: str) -> Iterator[Path]:
    """A place inside `folder` to fetch into, gone afterwards. What is whole is moved out of it.

    Raises OSError that says how to fetch `name` by hand; a folder that was not there is gone then.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            yield Path(scratch)
    except FAILURES as error:
        if new:
            shutil.rmtree(folder)
        raise OSError(f"{name} cannot be fetched ({error}): {remedy}") from error
    finally:
        socket.setdefaulttimeout(before)
