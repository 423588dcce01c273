"""What is told from a file's structure, and that telling it is cheap."""

import contextlib
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from test_image import chunk

from rampart.handlers.containers import MAX_PARTS, ContainerError, exif_orientation, read_still

Encode = Callable[..., bytes]
TAG = struct.pack("<HHI", 0x0112, 3, 1)


def tiff(tags: int, orientation: int = 6) -> bytes:
    """EXIF data of so many tags before the orientation."""
    entries = b"".join(struct.pack("<HHII", 0x0100, 4, 1, 0) for _ in range(tags))
    entries += TAG + struct.pack("<HH", orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", tags + 1) + entries + bytes(4)


def seconds(data: bytes) -> float:
    began = time.process_time()
    with contextlib.suppress(ContainerError):
        read_still(data)
    return time.process_time() - began


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_size_and_pixels_are_those_that_pillow_reads(
    encode: Encode, pixels: np.ndarray, format: str, mode: str
) -> None:
    data = encode(Image.fromarray(pixels[:20]).convert(mode), format, exif=tiff(0))
    still = read_still(data)
    assert still and (still.format, still.size, still.orientation) == (format, (32, 20), 6)
    whole, alone = (np.array(Image.open(BytesIO(file))) for file in (data, still.data))
    np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_metadata_do_not_reach_the_decoder(encode: Encode, pixels: np.ndarray, format: str) -> None:
    secret = b"rampart-secret"
    options: dict[str, bytes] = {"exif": tiff(1) + secret, "icc_profile": secret * 99}
    if format != "PNG":
        options["xmp"] = secret
    if format == "JPEG":
        options["comment"] = secret
    data = encode(pixels, format, **options)
    if format == "PNG":
        data = data[:33] + chunk(b"tEXt", b"a\0" + secret) + data[33:]
    still = read_still(data)
    assert secret in data and still and secret not in still.data
    assert len(still.data) < len(encode(pixels, format)) + 40


def test_a_pillow_file_of_every_kind_is_passed_on_whole(encode: Encode, pixels: np.ndarray) -> None:
    """Adobe's segment says that CMYK is inverted, a palette and a colour key are needed too."""
    colour = Image.fromarray(pixels)
    for data in (
        encode(colour.convert("CMYK"), "JPEG"),
        encode(colour.quantize(8), "PNG", transparency=3),
        encode(colour.convert("RGBA"), "WEBP", lossless=True),
        encode(colour, "JPEG", progressive=True, restart_marker_blocks=2),
    ):
        still = read_still(data)
        assert still
        np.testing.assert_array_equal(
            np.array(Image.open(BytesIO(data)).convert("RGBA")),
            np.array(Image.open(BytesIO(still.data)).convert("RGBA")),
        )


@pytest.mark.parametrize("orientation", range(10))
def test_only_orientations_that_there_are_count(orientation: int) -> None:
    wanted = orientation if 1 <= orientation <= 8 else 1
    assert exif_orientation(tiff(3, orientation)) == wanted
    little = tiff(0, orientation)
    big = b"MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    assert exif_orientation(little) == exif_orientation(big) == wanted


def test_an_orientation_behind_thousands_of_tags_is_not_sought() -> None:
    assert exif_orientation(tiff(255)) == 6
    assert exif_orientation(tiff(40_000)) == 1


def test_hostile_structure_costs_little_time(encode: Encode, pixels: np.ndarray) -> None:
    """Each of megabytes; what is quadratic would take minutes."""
    jpeg, png, webp = (encode(pixels, format) for format in ("JPEG", "PNG", "WEBP"))
    start = jpeg.index(b"\xff\xda")
    tags = zlib.compress(b"II*\0" + b"\0" * 500_000)
    for name, data in {
        "fill bytes": jpeg[:2] + b"\xff" * 6_000_000 + jpeg[2:],
        "fill bytes in a scan": jpeg[: start + 20] + b"\xff" * 6_000_000 + b"\0",
        "fill bytes between markers": jpeg[:2] + (b"\xff" * 1000 + b"\xfe\0\2") * 4000 + jpeg[2:],
        "stuffed bytes": jpeg[: start + 20] + b"\xff\0" * 3_000_000 + jpeg[-2:],
        "tiny markers": jpeg[:2] + b"\xff\xfe\0\2" * 1_500_000 + jpeg[2:],
        "scans": jpeg[:start] + (jpeg[start:-2]) * 6000 + jpeg[-2:],
        "tiny chunks": png[:33] + chunk(b"tEXt", b"") * 500_000 + png[33:],
        "unpacked text": png[:33] + chunk(b"zTXt", b"Raw profile type exif\0\0" + tags) + png[33:],
        "webp chunks": webp[:12] + b"EXIF\0\0\0\0" * 700_000 + webp[12:],
        "tags": encode(pixels, "PNG", exif=tiff(60_000)),
    }.items():
        assert seconds(data) < 0.2, name


def test_more_parts_than_any_encoder_writes_are_refused(encode: Encode, pixels: np.ndarray) -> None:
    png = encode(pixels)
    few, many = (png[:33] + chunk(b"tEXt", b"") * n + png[33:] for n in (100, MAX_PARTS))
    assert read_still(few)
    with pytest.raises(ContainerError):
        read_still(many)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_anywhere_raises_nothing_but_container_errors(
    encode: Encode, pixels: np.ndarray, format: str
) -> None:
    data = encode(pixels, format, exif=tiff(1))
    for length in range(12, len(data)):
        with contextlib.suppress(ContainerError):
            read_still(data[:length])
