"""Bodies of HTTP requests: read within bounds, and forms taken apart."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from rampart.handlers.errors import BUSY, ImageError
from rampart.handlers.protocols.content_encoding import MAX_BODY

# Its warnings are about what clients send, and could fill a disk.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

MAX_BUFFERED = 64 << 20  # bytes of all that are on their way
MAX_PARTS = 64  # of a form
BODY_SECONDS = 30.0  # in which all of one must come
PAUSE = 0.05  # seconds without growing that are nobody's fault

TOO_LARGE = ImageError(
    413, "body_too_large", f"a body may have {MAX_BODY} bytes: send fewer or smaller images"
)
TOO_SLOW = ImageError(
    408, "body_too_slow", f"a body must arrive within {BODY_SECONDS:.0f} s: send it faster"
)
ENCODED_FORM = ImageError(
    415,
    "encoded_form",
    "compressed forms are not supported: send the form uncompressed, or the picture itself",
)
BROKEN_FORM = ImageError(400, "broken_form", "the form cannot be read: send the file itself")
TOO_MANY_PARTS = ImageError(413, "too_many_parts", f"a form may have {MAX_PARTS} parts: send fewer")
FIELDS = ImageError(
    415, "form_fields", "form fields contain no image: send -F image=@FILE, or the file itself"
)


class Body:
    """One that is on its way; `deadline` ends the wait for it."""

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self.data = bytearray()
        self.grown = time.monotonic()  # when it did last
        self.deadline = deadline
        self.given_up = False  # to make room for others


class Bodies:
    """All bodies that are on their way, and the memory that they take together."""

    def __init__(self) -> None:
        self._bodies: set[Body] = set()
        self._buffered = 0

    async def read(self, headers: Mapping[str, str], pieces: AsyncIterator[bytes]) -> bytes:
        """One body, as it comes. Raises ImageError, as early as it can be known."""
        if int(headers.get("content-length", 0)) > MAX_BODY:  # the server has checked the number
            raise TOO_LARGE.bare()
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                body = Body(deadline)
                return await self._gather(body, pieces)
        except TimeoutError:
            raise (BUSY if body.given_up else TOO_SLOW).bare() from None

    async def _gather(self, body: Body, pieces: AsyncIterator[bytes]) -> bytes:
        self._bodies.add(body)
        try:
            async for piece in pieces:
                body.data += piece
                body.grown = time.monotonic()
                self._buffered += len(piece)
                if len(body.data) > MAX_BODY:
                    raise TOO_LARGE.bare()
                if self._buffered > MAX_BUFFERED:
                    self._make_room()
                if body.given_up:
                    raise BUSY.bare()
            return bytes(body.data)
        finally:
            self._forget(body)

    def _make_room(self) -> None:
        """Give up the one that holds most for longest without growing: who holds many must shut
        out neither small ones nor large ones that come.
        """
        now = time.monotonic()
        worst = max(self._bodies, key=lambda body: len(body.data) * (now - body.grown + PAUSE))
        worst.given_up = True
        self._forget(worst)
        worst.deadline.reschedule(0.0)

    def _forget(self, body: Body) -> None:
        if body in self._bodies:
            self._bodies.remove(body)
            self._buffered -= len(body.data)
            body.data = bytearray()


def parts(headers: Mapping[str, str], body: bytes) -> list[bytes]:
    """The body, or the files of a form. Raises ImageError."""
    kind, options = parse_options_header(headers.get("content-type"))
    encoded = headers.get("content-encoding", "identity").strip().lower() != "identity"
    if kind == b"multipart/form-data":
        if encoded:
            raise ENCODED_FORM.bare()
        return files(body, options.get(b"boundary", b""))
    # curl -d @FILE says that it sends a form, whatever the file is.
    fields = b"=" in body[:100] and body[:1].isalnum() and not encoded
    if kind == b"application/x-www-form-urlencoded" and fields:
        raise FIELDS.bare()
    return [body] if body else []


def files(form: bytes, boundary: bytes) -> list[bytes]:
    """The parts that have a content type, as browsers and curl give one to files, in order.

    Raises ImageError.
    """
    found: list[tuple[list[bytes], list[bytes]]] = []  # names of headers, pieces of the content
    ends: list[bool] = []

    def begin() -> None:
        if len(found) == MAX_PARTS:
            raise TOO_MANY_PARTS.bare()
        found.append(([], []))

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": lambda data, start, end: found[-1][0].append(data[start:end]),
                "on_end": lambda: ends.append(True),
                "on_part_data": lambda data, start, end: found[-1][1].append(data[start:end]),
            },
        )
        parser.write(form)
    except FormParserError:  # of the boundary too
        ends.clear()
    if not ends:
        raise BROKEN_FORM.bare()
    return [
        b"".join(pieces)
        for names, pieces in found
        if b"content-type" in {name.lower() for name in names}
    ]
