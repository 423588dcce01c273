"""Reads TorchServe's requests in its worker, fast and within bounds.

TorchServe reads every header and part with socket calls of its own and keeps them all. A form of
4 MB can have two million parts, which takes its worker too long. This reads the same messages in
large pieces, keeps MAX_PARTS of a request's parts and skips the others.

The format is that of ts/protocol/otf_message_handler.py in TorchServe 0.12: numbers are 32-bit big
endian, a list ends with -1, and text follows its length.
"""

import re
import struct
import sys
import weakref
from typing import Any, Protocol

MAX_PARTS = 64  # of one request: images, query parameters, form fields; 32 images are allowed
TOO_MANY = "\0too many parts"  # the name of a part that stands for the skipped ones
PIECE = 1 << 20
NUMBER = struct.Struct(">i")
# Parts of three texts of up to 15 bytes each: one match skips millions of them.
SHORT = b"|".join(re.escape(bytes([n])) + b"." * n for n in range(16))
SHORT_PARTS = re.compile(b"(?:(?:\\0\\0\\0(?:" + SHORT + b")){3})++", re.DOTALL)
CODEC = "ts.protocol.otf_message_handler"  # the module whose functions this replaces


class Connection(Protocol):
    """The socket that TorchServe's front end writes to."""

    def recv(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


class Reader:
    """Buffers what has come from one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._data, self._at = connection, b"", 0

    def take(self, length: int) -> bytearray:
        """The next `length` bytes. Like TorchServe, ends the process when the front end is gone."""
        self._await(length)
        self._at += length
        return bytearray(memoryview(self._data)[self._at - length : self._at])

    def number(self) -> int:
        """The next number."""
        self._await(NUMBER.size)
        (value,) = NUMBER.unpack_from(self._data, self._at)
        self._at += NUMBER.size
        return int(value)

    def text(self) -> bytearray | None:
        """A length and that many bytes; None at the end of a list."""
        length = self.number()
        return None if length < 0 else self.take(length)

    def skip_parts(self) -> bool:
        """Skip the rest of a list of parts; whether there was one."""
        count = 0
        while True:
            run = SHORT_PARTS.match(self._data, self._at)
            if run:
                self._at = run.end()
            elif self.text() is None:
                return count > 0
            else:
                self.text(), self.text()
            count += 1

    def _await(self, length: int) -> None:
        missing = length - (len(self._data) - self._at)
        if missing <= 0:
            return
        pieces = [self._data[self._at :]]
        while missing > 0:
            piece = self._connection.recv(max(PIECE, missing))
            if not piece:
                sys.exit(0)
            pieces.append(piece)
            missing -= len(piece)
        self._data, self._at = b"".join(pieces), 0

    def batch(self) -> list[dict[str, Any]]:
        """The requests of one batch, as TorchServe's `Service.predict` takes them."""
        requests = []
        while (name := self.text()) is not None:
            headers = []
            while (header := self.text()) is not None:
                headers.append({"name": header, "value": self.text()})
            requests.append({"requestId": name, "headers": headers, "parameters": self._parts()})
        return requests

    def _parts(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        while len(parts) < MAX_PARTS:
            name = self.text()
            if name is None:
                return parts
            kind = (self.text() or b"").decode(errors="replace")
            value = self.text()
            parts.append(
                {"name": name.decode(errors="replace"), "contentType": kind, "value": value}
            )
        if self.skip_parts():
            parts.append({"name": TOO_MANY, "contentType": "", "value": b""})
        return parts


READERS: "weakref.WeakKeyDictionary[Connection, Reader]" = weakref.WeakKeyDictionary()


def reader(connection: Connection) -> Reader:
    """The reader of a connection, which may have read ahead."""
    return READERS.setdefault(connection, Reader(connection))


def install() -> bool:
    """Let the worker that runs this read so; False where it is none of TorchServe."""
    codec = sys.modules.get(CODEC)
    if codec is None:
        return False
    codec.__dict__["_retrieve_buffer"] = lambda connection, length: reader(connection).take(length)
    codec.__dict__["_retrieve_inference_msg"] = lambda connection: reader(connection).batch()
    return True
