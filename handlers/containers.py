"""Reads the structure of a JPEG, PNG or WebP file before a pixel is decoded.

A walk from marker to marker, or chunk to chunk, stays within bounds. The decoder gets only what the
pixels need: no EXIF, colour profile, text, preview or second picture. So metadata cost nothing,
however large they would unpack.

Sources: ITU T.81 (annex B), PNG (third edition, sections 5 and 11), RFC 9649 (WebP), CIPA DC-008
(EXIF).
"""

import math
import re
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
MAX_PARTS = 4096  # markers or chunks of one file; encoders write a few to a few hundred
MAX_TAGS = 256  # EXIF tags to search for the orientation
ORIENTATION = 0x0112
SHORT = 3  # EXIF's name for 16-bit numbers

# JPEG: fill bytes may precede a marker; coded data end at the first marker other than a restart.
MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
DATA_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
START_OF_SCAN, END_OF_IMAGE, EXIF_SEGMENT = 0xDA, 0xD9, 0xE1
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three others are tables
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
NO_LENGTH = {0x01, *range(0xD0, 0xD9)}  # markers without a length
# Comments and application data, but for JFIF's and Adobe's, which say how colours are coded.
METADATA = {*range(0xE0, 0xF0), 0xFE} - {0xE0, 0xEE}

CRITICAL = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PIXEL_CHUNKS = (b"VP8 ", b"VP8L")
ALPHA = 0x10  # the only flag in a WebP's extended header that concerns the pixels


class ContainerError(ValueError):
    """The file is cut, damaged or not of its kind."""


class FramesError(ValueError):
    """The file holds several pictures."""


class Still(NamedTuple):
    """One picture as its file describes it."""

    format: Literal["JPEG", "PNG", "WEBP"]
    size: tuple[int, int]  # width and height as stored, before the orientation is applied
    data: bytes  # a file of the picture alone
    orientation: int = 1  # EXIF's: 1 is upright, up to 8
    scans: int = 1  # passes that decoding makes over the whole picture
    progressive: bool = False  # a JPEG whose coefficients are all in memory at once
    depth: int = 8  # bits of a PNG's samples


def read_still(data: bytes) -> Still | None:
    """The picture in `data`, None for another format. Raises ContainerError or FramesError."""
    try:
        if data.startswith(PNG):
            return read_png(data)
        if data.startswith(JPEG):
            return read_jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return read_webp(data)
    except (struct.error, IndexError) as error:
        raise ContainerError("cut") from error
    return None


def read_jpeg(data: bytes) -> Still:
    """The primary picture of a JPEG: cameras append previews, films and other pictures to it."""
    parts, scans, orientation = [data[:2]], 0, 0
    frame: tuple[int, tuple[int, int]] | None = None
    for kind, start, end in segments(data):
        if kind in FRAMES and frame is None:
            frame = kind, struct.unpack_from(">HH", data, start + 5)
        if kind == START_OF_SCAN:
            scans += 1
        if kind == EXIF_SEGMENT and data[start + 4 : start + 10] == b"Exif\0\0" and not orientation:
            orientation = exif_orientation(data[start + 10 : end])
        if kind not in METADATA:
            parts.append(data[start:end])
    if frame is None or not scans:
        raise ContainerError("no frame")
    kind, (height, width) = frame
    picture = b"".join(parts)
    progressive = kind in PROGRESSIVE
    return Still("JPEG", (width, height), picture, orientation or 1, scans, progressive)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, start, end) of each marker with its data, up to the end of the picture.

    The coded data of a scan belong to its marker. Raises ContainerError.
    """
    at = 2
    for _ in range(MAX_PARTS):
        marker = MARKER.match(data, at)
        if not marker:
            raise ContainerError("no marker")
        kind, start = marker[1][0], marker.end() - 2
        if kind == END_OF_IMAGE:
            yield kind, start, marker.end()
            return
        length = 0 if kind in NO_LENGTH else struct.unpack_from(">H", data, marker.end())[0]
        at = marker.end() + length
        if at > len(data) or (length < 2 and kind not in NO_LENGTH):
            raise ContainerError("cut")
        if kind == START_OF_SCAN:
            data_end = DATA_END.search(data, at)
            if not data_end:
                raise ContainerError("no end")
            at = data_end.start()
        yield kind, start, at
    raise ContainerError("too many markers")


def read_png(data: bytes) -> Still:
    """A PNG, and no animation."""
    if data[12:16] != b"IHDR":
        raise ContainerError("no header")
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    parts, orientation = [data[:8]], 1
    for kind, start, end in png_chunks(data):
        if kind == b"acTL" and struct.unpack_from(">I", data, start + 8)[0] > 1:
            raise FramesError
        if kind == b"eXIf":
            orientation = exif_orientation(data[start + 8 : end - 4])
        if kind in CRITICAL:
            parts.append(data[start:end])
    return Still("PNG", (width, height), b"".join(parts), orientation, depth=depth)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk up to IEND. Raises ContainerError."""
    at = len(PNG)
    for _ in range(MAX_PARTS):
        (length,) = struct.unpack_from(">I", data, at)
        kind, start, at = data[at + 4 : at + 8], at, at + 12 + length
        if at > len(data):
            raise ContainerError("cut")
        yield kind, start, at
        if kind == b"IEND":
            return
    raise ContainerError("too many chunks")


def read_webp(data: bytes) -> Still:
    """A WebP, and no animation."""
    parts: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    orientation = 1
    for kind, start, end in webp_chunks(data):
        content = start + 8
        if kind == b"ANMF":
            raise FramesError
        if kind == b"VP8X":
            sides = (data[content + 4 : content + 7], data[content + 7 : content + 10])
            width, height = (1 + int.from_bytes(side, "little") for side in sides)
            sizes.append((width, height))
            flags = data[content] & ALPHA
            parts.append(data[start:content] + bytes([flags, 0, 0, 0]) + data[content + 4 : end])
        elif kind == b"EXIF":
            orientation = exif_orientation(data[content:end])
        elif kind in PIXEL_CHUNKS:
            sizes.append(webp_size(kind, data[content:end]))
            parts.append(data[start:end])
        elif kind == b"ALPH":
            parts.append(data[start:end])
    if not sizes:
        raise ContainerError("no picture")
    # Where canvas and picture differ, the decoder refuses the file, by the size of the canvas.
    size = max(sizes, key=math.prod)
    body = b"WEBP" + b"".join(parts)
    return Still("WEBP", size, b"RIFF" + struct.pack("<I", len(body)) + body, orientation)


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk, padding included. Raises ContainerError."""
    last = 8 + struct.unpack_from("<I", data, 4)[0]
    if last > len(data) + 1:  # the last chunk may lack its padding
        raise ContainerError("cut")
    at = 12
    for _ in range(MAX_PARTS):
        if at + 8 > min(last, len(data)):
            return
        (length,) = struct.unpack_from("<I", data, at + 4)
        kind, start, at = data[at : at + 4], at, at + 8 + length
        if at > len(data):
            raise ContainerError("cut")
        at += length % 2
        yield kind, start, min(at, len(data))
    raise ContainerError("too many chunks")


def webp_size(kind: bytes, content: bytes) -> tuple[int, int]:
    """Width and height that coded pixels begin with."""
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", content, 6)
    return width & 0x3FFF, height & 0x3FFF


def exif_orientation(tiff: bytes) -> int:
    """The orientation among the first tags of EXIF data; 1, upright, where it cannot be read."""
    tiff = tiff.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for number in range(min(count, MAX_TAGS)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at + 2 + 12 * number)
            if tag == ORIENTATION:
                return value if kind == SHORT and 1 <= value <= 8 else 1
    except struct.error:  # cut
        pass
    return 1
