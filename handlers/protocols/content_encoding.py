"""Bodies that come compressed: Content-Encoding gzip or deflate, unpacked within bounds.

Sources: RFC 9110, section 8.4.1; RFC 1950 to 1952.
"""

import zlib

from rampart.handlers.errors import ImageError
from rampart.handlers.types import Incoming

MAX_BODY = 6_553_500  # bytes unpacked, as many as config.properties allows a plain body
GZIP, ZLIB, RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
NAMES = ("gzip", "x-gzip", "deflate")


def encoding(incoming: Incoming) -> str:
    """The Content-Encoding of a request's body, "" for a plain one or for the files of a form."""
    name = incoming.headers.get("content-encoding", "").strip().lower()
    return "" if name == "identity" or len(incoming.parts) != 1 else name


def unpacking_cost(incoming: Incoming) -> int:
    """The cost of `unpacked`, in decoded pixels: one a byte of the compressed body."""
    return len(incoming.parts[0]) if encoding(incoming) else 0


def unpacked(incoming: Incoming) -> Incoming:
    """The request with its body as it was before compression. Raises ImageError."""
    name = encoding(incoming)
    if not name:
        return incoming
    if name not in NAMES:
        raise ImageError(
            415,
            "unsupported_encoding",
            "the Content-Encoding of the body is not supported: send it uncompressed, or with gzip"
            " or deflate",
        )
    return incoming._replace(parts=[unpack(incoming.parts[0], name)])


def unpack(data: bytes, name: str) -> bytes:
    """`data` before it was compressed by the encoding `name`. Raises ImageError."""
    # Some clients send deflate without zlib's two bytes: a method, 8, and a multiple of 31.
    head = int.from_bytes(data[:2], "big")
    bare = head >> 8 & 15 != zlib.DEFLATED or head % 31
    stream = zlib.decompressobj(GZIP if name != "deflate" else RAW if bare else ZLIB)
    try:
        body = stream.decompress(data, MAX_BODY + 1)
    except zlib.error as error:
        raise malformed(name) from error
    if len(body) > MAX_BODY:
        raise ImageError(
            413,
            "body_too_large",
            f"the body has more than {MAX_BODY / 1e6:.1f} MB unpacked: send fewer or smaller"
            " images",
        )
    if not stream.eof or stream.unused_data:
        raise malformed(name)
    return body


def malformed(name: str) -> ImageError:
    """A 400 for what is not compressed as its header says."""
    return ImageError(
        400,
        "malformed_encoding",
        f"the Content-Encoding says {name}, but the body is not one complete {name} stream:"
        " compress it again, or send it uncompressed, without this header",
    )
