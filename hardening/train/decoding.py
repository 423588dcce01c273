"""Pictures on disk to pixels, and processes that do so beside each other.

Nothing here imports torch, so a process starts in a fraction of a second. It is a command of its
own and no fork: forks of a process that uses a GPU fail, and those of `multiprocessing` run the
user's script again.
"""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import rampart
from rampart.handlers.containers import JPEG
from rampart.handlers.errors import ImageError
from rampart.handlers.image import Fitting, Picture, View, cropped, examine, view_of
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.presence import POINTER
from rampart.hardening.train.shards import Member
from rampart.hardening.train.store import Store

LARGEST = 256 * 2**20  # bytes of one picture's file
HEAD = 2**16  # bytes at either end of a JPEG that its structure is told by
JPEG_END = b"\xff\xd9"
DONE = "done"


def read_picture(file: Path | Member, size: int, fitting: Fitting = cropped) -> Pixels:
    """One plain file as uint8 (size, size, 3), decoded as the endpoint does. Raises ValueError."""
    return read_view(file, size, fitting).pixels


def read_view(file: Path | Member, size: int, fitting: Fitting) -> View:
    """What a model of `size` sees of a plain file at the endpoint. Raises ValueError."""
    try:
        view = view_of(open_picture(file, size), size, fitting)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    if isinstance(view, ImageError):
        raise ValueError(f"{file}: {view.message}")
    return view


def open_picture(file: Path | Member, size: int | None, *, whole: bool = True) -> Picture:
    """A picture whose structure was checked, and no pixel. Raises OSError or ValueError.

    Unless it is read `whole`, a large JPEG has pixels to its head alone: it is not to be decoded.
    """
    try:
        if isinstance(file, Member):
            check_bytes(file, file.size)
            return picture_in(file.read(), size)
        # A pipe without a writer is opened too, and at once.
        with open(file, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as stream:
            check_picture(file, os.fstat(stream.fileno()))
            return (None if whole else by_its_ends(stream, size)) or read_whole(stream, size)
    except ImageError as error:
        raise ValueError(f"{file}: {error.message}") from error


def read_whole(stream: BinaryIO, size: int | None) -> Picture:
    """The picture in a file. Raises ImageError."""
    stream.seek(0)
    # Within LARGEST, as was checked.
    return picture_in(stream.read(os.fstat(stream.fileno()).st_size), size)


def picture_in(data: bytes, size: int | None) -> Picture:
    """The picture that a file holds. Raises ImageError."""
    if data.startswith(POINTER):
        raise ImageError(
            415, "pointer", "this is only a Git LFS pointer: fetch the picture with `git lfs pull`"
        )
    return examine(data, size)


def by_its_ends(stream: BinaryIO, size: int | None) -> Picture | None:
    """A large JPEG in one scan, by its head and an end within its last bytes; None for others."""
    head = stream.read(HEAD)
    if not head.startswith(JPEG) or stream.seek(0, os.SEEK_END) < 2 * HEAD:
        return None
    stream.seek(-HEAD, os.SEEK_END)
    if JPEG_END not in stream.read():
        return None
    try:
        picture = examine(head + JPEG_END, size)
    except ImageError:
        return None
    return None if picture.still.progressive else picture


def decoded(file: Path | Member, picture: Picture) -> Pixels:
    """The pixels of the picture in `file`. Raises ValueError that names it."""
    try:
        return picture.pixels()
    except ImageError as error:
        raise ValueError(f"{file}: {error.message}") from error


def check_picture(file: Path, status: os.stat_result) -> None:
    """Raise ValueError for what is no plain file, or far larger than any picture."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file} is not a regular file: remove it")
    check_bytes(file, status.st_size)


def check_bytes(file: Path | Member, count: int) -> None:
    """Raise ValueError for far more bytes than any picture has."""
    if count > LARGEST:
        raise ValueError(f"{file} has {count / 1e6:.0f} MB, too many for a picture: remove it")


class Decoders:
    """Processes that decode pictures into a store, one for each thread that asks."""

    def __init__(self, store: Store, size: int) -> None:
        self.command = [sys.executable, "-m", __name__]
        self.command += [str(store.file), str(len(store.marks)), str(size)]
        self.own = threading.local()
        self.every: list[subprocess.Popen[str]] = []

    def decode(self, row: int, file: Path | Member) -> None:
        """Bring one picture into its row of the store. Raises ValueError as `read_picture` does."""
        process: subprocess.Popen[str] | None = getattr(self.own, "process", None)
        if process is None:
            process = self.own.process = self.started()
        assert process.stdin and process.stdout
        try:
            print(row, told(file), file=process.stdin, flush=True)
            answer = process.stdout.readline().rstrip()
        except OSError:
            answer = ""
        if answer != DONE:
            message = bytes.fromhex(answer).decode()
            raise ValueError(message or f"{file}: the process that decodes pictures has ended")

    def started(self) -> "subprocess.Popen[str]":
        """A new process. Ctrl-C does not reach it: it ends with its input."""
        environment = os.environ | {"PYTHONPATH": str(Path(rampart.__file__).parents[1])}
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.every.append(process)
        return process

    def close(self) -> None:
        """End the processes."""
        for process in self.every:
            process.communicate()


def told(file: Path | Member) -> str:
    """Where a picture lies, in a line of text, as `understood` reads it."""
    return json.dumps([str(part) if isinstance(part, Path) else part for part in as_parts(file)])


def as_parts(file: Path | Member) -> Sequence[Path | str | int]:
    """A file alone, or what tells a shard's member."""
    return file if isinstance(file, Member) else [file]


def understood(place: str) -> Path | Member:
    """The picture of a line."""
    shard, *rest = json.loads(place)
    return Member(Path(shard), *rest) if rest else Path(shard)


def main(file: str, count: str, size: str) -> None:
    """Decode into a store what each line of the input asks for; a line each answers."""
    store = Store(Path(file), int(count), int(size))
    for line in sys.stdin:
        row, place = line.split(maxsplit=1)
        try:
            store.keep(int(row), read_picture(understood(place), int(size)))
            answer = DONE
        except ValueError as error:
            answer = str(error).encode().hex()
        print(answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
