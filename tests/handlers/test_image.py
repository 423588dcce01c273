"""The decoder, row by row of what an image may be."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps
from servers import forget_peak, peak_memory

from rampart.handlers.errors import ImageError
from rampart.handlers.image import (
    FREE_SCANS,
    GREY,
    MAX_JPEG_SCANS,
    MAX_PIXELS,
    Allowance,
    decode,
    default_pixels,
    fit,
    letterbox,
    pictures_of,
    view_of,
)

Encode = Callable[..., bytes]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int) -> bytes:
    """A valid RGB PNG of side x side black pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compressobj(9)
    row = bytes(3 * side + 1)
    data = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def noise(width: int, height: int) -> Image.Image:
    return Image.frombytes("L", (width, height), np.random.default_rng(0).bytes(width * height))


def huge_webp(small: bytes, width: int, height: int) -> bytes:
    """A small WebP whose extended header claims another size."""
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + small[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def refusal(data: bytes) -> tuple[int, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, 32)
    return caught.value.code, caught.value.type


def test_png_pixels_come_back_untouched(encode: Encode, pixels: np.ndarray) -> None:
    image = decode(encode(pixels), 32)
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_come_back_close(encode: Encode, pixels: np.ndarray, format: str) -> None:
    image = decode(encode(pixels, format, quality=95)).astype(int)
    assert np.abs(image - pixels).mean() < 3


def test_an_empty_body_is_422() -> None:
    assert refusal(b"") == (422, "empty_body")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_415(encode: Encode, pixels: np.ndarray, format: str) -> None:
    assert refusal(encode(pixels, format)) == (415, "unsupported_format")


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"\x00" * 100, b"RIFF\0\0\0\0WAVE"])
def test_what_is_no_image_is_415(data: bytes) -> None:
    assert refusal(data) == (415, "unsupported_format")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.75])
def test_truncated_images_are_422(
    encode: Encode, pixels: np.ndarray, format: str, share: float
) -> None:
    data = encode(pixels, format)
    kept = max(12, int(share * len(data)))
    assert refusal(data[:kept]) == (422, "corrupt_image")


def test_corrupt_pixel_data_is_422(encode: Encode, pixels: np.ndarray) -> None:
    data = encode(pixels)
    assert refusal(data[:60] + b"rampart!" * 8 + data[124:]) == (422, "corrupt_image")


def test_2_to_the_24_pixels_pass_and_one_row_more_is_413(encode: Encode) -> None:
    assert decode(encode(Image.new("L", (4096, 4096))), 32).shape == (32, 32, 3)
    assert refusal(encode(Image.new("L", (4096, 4097)))) == (413, "too_many_pixels")


def test_a_photograph_of_a_16_megapixel_phone_passes(encode: Encode) -> None:
    photograph = encode(Image.new("RGB", (4624, 3468)), "JPEG")
    assert decode(photograph, 32, Allowance(default_pixels(32))).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("size", "pixels"), [(32, 2**22), (224, 2**22), (299, (8 * 299) ** 2), (1024, 2**24)]
)
def test_the_default_limit_fits_the_model(size: int, pixels: int) -> None:
    assert default_pixels(size) == pixels


def test_a_reduced_jpeg_shows_what_a_whole_one_does(encode: Encode) -> None:
    gradient = Image.radial_gradient("L").resize((900, 700)).convert("RGB")
    data = encode(gradient, "JPEG", quality=95)
    reduced, whole = decode(data, 32), fit(decode(data), 32)
    assert np.abs(reduced.astype(int) - whole).max() <= 4


def test_a_png_of_144_megapixels_costs_nothing() -> None:
    data = huge_png(12_000)
    assert len(data) < 1_000_000
    before = forget_peak(os.getpid())
    assert refusal(data) == (413, "too_many_pixels")
    assert peak_memory(os.getpid()) - before < 4_000  # KiB


@pytest.mark.parametrize("size", [(16_383, 16_383), (60_000, 60_000)])
def test_a_webp_that_claims_a_huge_canvas_costs_nothing(
    encode: Encode, pixels: np.ndarray, size: tuple[int, int]
) -> None:
    data = huge_webp(encode(pixels, "WEBP", lossless=True), *size)
    before = forget_peak(os.getpid())
    assert refusal(data) == (413, "too_many_pixels")
    assert peak_memory(os.getpid()) - before < 4_000  # KiB


def test_the_pictures_of_one_request_share_an_allowance(encode: Encode) -> None:
    half, allowance = noise(2000, 1000), Allowance(2**22)
    for _ in range(2):
        decode(encode(half), 32, allowance)
    with pytest.raises(ImageError, match="together have too many pixels") as caught:
        decode(encode(Image.new("L", (600, 600))), 32, allowance)
    assert (caught.value.code, caught.value.type) == (413, "too_many_pixels")


def test_more_scans_than_encoders_write_use_up_the_allowance(encode: Encode) -> None:
    data = encode(noise(1500, 1000), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    allowance = Allowance(2**21)
    decode(data, None, allowance)
    allowance = Allowance(2**21)
    with pytest.raises(ImageError, match="too many pixels"):
        decode(data[:-2] + scan * FREE_SCANS + data[-2:], None, allowance)


@pytest.mark.parametrize("format", ["WEBP", "PNG"])
def test_a_picture_of_one_colour_passes_up_to_a_million_pixels(encode: Encode, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    assert decode(encode(Image.new("1", (1024, 1024)), format, **options), 32).shape
    big = encode(Image.new("1", (2048, 2000)), format, **options)
    assert refusal(big) == (413, "implausible_size")


def test_thirty_two_tiny_files_are_no_way_around_the_allowance(encode: Encode) -> None:
    data = encode(Image.new("RGB", (1000, 1000)), "WEBP", lossless=True)
    allowance = Allowance(2**22)
    decode(data, 32, allowance)
    with pytest.raises(ImageError) as caught:
        decode(data, 32, allowance)
    assert caught.value.type == "implausible_size"


def test_an_aspect_of_20_passes_and_beyond_is_422(encode: Encode) -> None:
    assert decode(encode(Image.new("RGB", (200, 10))), 32).shape == (32, 32, 3)
    assert refusal(encode(Image.new("RGB", (201, 10)))) == (422, "extreme_aspect")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_several_frames_are_422(encode: Encode, pixels: np.ndarray, format: str) -> None:
    data = encode(pixels, format, save_all=True, append_images=[Image.fromarray(255 - pixels)])
    assert refusal(data) == (422, "multiple_frames")


def test_of_a_camera_file_with_previews_the_primary_picture_is_taken(
    encode: Encode, pixels: np.ndarray
) -> None:
    film = b"\0\0\0\x18ftypmp42" + bytes(100)
    several = encode(pixels, "MPO", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    alone = decode(encode(pixels, "JPEG"))
    np.testing.assert_array_equal(decode(several), alone)
    np.testing.assert_array_equal(decode(encode(pixels, "JPEG") + film), alone)


def test_what_a_phone_appends_to_a_picture_is_not_looked_at(
    encode: Encode, pixels: np.ndarray
) -> None:
    """A motion photo's film, a gain map, a depth map: bytes that look like frames and scans."""
    own = encode(pixels, "JPEG")
    alone = decode(own)
    progressive = encode(Image.fromarray(255 - pixels).resize((64, 64)), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    film = b"\0\0\0\x18ftypmp42" + scan * 2 * MAX_JPEG_SCANS
    for more in (film, progressive, bytes(999) + progressive + film, b"\xff\xd8\xff\xc0cut"):
        np.testing.assert_array_equal(decode(own + more), alone)


def test_a_preview_inside_the_metadata_is_no_second_frame(
    encode: Encode, pixels: np.ndarray
) -> None:
    own, preview = encode(pixels, "JPEG"), encode(255 - pixels, "JPEG")
    length = struct.pack(">H", 2 + 4 + len(preview))
    data = own[:2] + b"\xff\xe2" + length + b"MPF\0" + preview + own[2:]
    np.testing.assert_array_equal(decode(data), decode(own))


def test_endless_jpeg_scans_are_422(encode: Encode, pixels: np.ndarray) -> None:
    data = encode(pixels, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    bomb = data[:-2] + scan * MAX_JPEG_SCANS + data[-2:]
    assert refusal(bomb) == (422, "too_many_scans")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_one_pixel_below_full_alpha_is_422(encode: Encode, pixels: np.ndarray, format: str) -> None:
    image = Image.fromarray(pixels).convert("RGBA")
    np.testing.assert_array_equal(decode(encode(image, format, lossless=True)), pixels)
    image.putpixel((3, 3), (*image.getpixel((3, 3))[:3], 254))
    assert refusal(encode(image, format, lossless=True)) == (422, "transparent_image")


@pytest.mark.parametrize("transparency", [3, bytes([255] * 9 + [254] + [255] * 6)])
def test_a_transparent_palette_colour_in_use_is_422(
    encode: Encode, pixels: np.ndarray, transparency: int | bytes
) -> None:
    palette = Image.fromarray(pixels).quantize(16)
    assert refusal(encode(palette, transparency=transparency)) == (422, "transparent_image")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_a_colour_key_is_422_only_where_it_shows(
    encode: Encode, pixels: np.ndarray, mode: str
) -> None:
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    present = {"1": 1, "L": image.getpixel((5, 5)), "I;16": image.getpixel((5, 5))}
    key = present.get(mode, image.getpixel((5, 5)))
    assert refusal(encode(image, transparency=key)) == (422, "transparent_image")
    if mode != "1":
        absent = (0, 0, 0) if mode == "RGB" else 0
        assert decode(encode(image, transparency=absent)).shape == (32, 32, 3)


def test_a_png_that_does_not_begin_with_its_header_is_422(
    encode: Encode, pixels: np.ndarray
) -> None:
    data = encode(pixels)
    assert refusal(data[:8] + chunk(b"tEXt", b"a\0b") + data[8:]) == (422, "corrupt_image")


def test_opaque_alpha_of_every_kind_is_dropped(encode: Encode, pixels: np.ndarray) -> None:
    gray = Image.fromarray(pixels).convert("L")
    expected = np.array(gray.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(gray.convert("LA"))), expected)
    palette = Image.fromarray(pixels).quantize(16)
    opaque = decode(encode(palette, transparency=bytes([255] * 16)))
    np.testing.assert_array_equal(opaque, np.array(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_without_colour_channels_become_rgb(
    encode: Encode, pixels: np.ndarray, mode: str
) -> None:
    image = Image.fromarray(pixels).convert(mode)
    np.testing.assert_array_equal(decode(encode(image)), np.array(image.convert("RGB")))


def test_cmyk_becomes_rgb(encode: Encode, pixels: np.ndarray) -> None:
    image = decode(encode(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(image.astype(int) - pixels).mean() < 4


def test_sixteen_bit_gray_is_scaled_and_not_clipped(encode: Encode) -> None:
    gray = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    image = decode(encode(Image.fromarray(gray)))
    np.testing.assert_array_equal(image, np.repeat((gray >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(
    encode: Encode, pixels: np.ndarray, format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(pixels[:, :20], format, exif=exif)
    plain = decode(encode(pixels[:, :20], format))
    tagged = Image.fromarray(plain)
    tagged.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(tagged)
    np.testing.assert_array_equal(decode(data), np.array(expected))


def test_unreadable_exif_counts_as_upright(encode: Encode, pixels: np.ndarray) -> None:
    data = encode(pixels, exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish")
    np.testing.assert_array_equal(decode(data), pixels)


def test_another_size_is_antialiased(encode: Encode) -> None:
    """Every second column white: without a filter, one colour would win."""
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    image = decode(encode(stripes), 32)
    assert image.shape == (32, 32, 3)
    assert np.abs(image.astype(int) - 127).max() <= 12


@pytest.mark.parametrize("axis", [0, 1])
def test_the_centre_is_kept(encode: Encode, axis: int) -> None:
    """Black, white, black thirds: the square in the middle is the white one."""
    thirds = np.zeros((192, 64, 3), dtype=np.uint8)
    thirds[64:128] = 255
    image = decode(encode(thirds if axis == 0 else thirds.transpose(1, 0, 2)), 32)
    assert image.shape == (32, 32, 3) and image[1:-1, 1:-1].min() == 255


def test_mutated_files_raise_nothing_but_image_errors(encode: Encode, pixels: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    files = [encode(pixels, format) for format in ("PNG", "JPEG", "WEBP")]
    files.append(encode(Image.fromarray(pixels).quantize(16), transparency=3))
    for turn in range(1_000):
        data = np.frombuffer(files[turn % len(files)], dtype=np.uint8).copy()
        places = generator.integers(0, len(data), 1 + turn % 5)
        data[places] = generator.integers(0, 256, len(places))
        try:
            assert decode(data.tobytes(), 32).shape == (32, 32, 3)
        except ImageError as error:
            assert error.code in (413, 415, 422)


def test_an_error_does_not_hold_the_picture_it_is_about() -> None:
    image = Image.new("RGBA", (32, 32), (1, 2, 3, 7))
    out = BytesIO()
    image.save(out, "PNG")
    (picture,) = pictures_of([out.getvalue()], 32, MAX_PIXELS)
    error = view_of(picture, 32)
    assert isinstance(error, ImageError) and error.type == "transparent_image"
    assert error.__traceback__ is error.__context__ is error.__cause__ is None


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (480, 640), (7, 100), (32, 32)])
def test_a_letterbox_holds_the_whole_picture_on_grey(height: int, width: int) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    square, place = letterbox(white, 32)
    assert square.shape == (32, 32, 3)
    left, top = place.left, place.top
    inner = square[top : 32 - top or None, left : 32 - left or None]
    assert (inner[1:-1] == 255).all() if min(inner.shape[:2]) > 2 else inner.any()
    assert (square[:top] == GREY).all() and (square[:, :left] == GREY).all()
    assert place.scale == 32 / max(height, width)


def test_a_box_lies_in_the_letterbox_where_its_object_does_and_comes_back() -> None:
    picture = np.zeros((300, 400, 3), np.uint8)
    box = np.array([100, 40, 200, 240], np.float32)
    picture[40:240, 100:200] = 255
    square, place = letterbox(picture, 128)
    rows, columns = np.nonzero(square[16:112].mean(2) > 127)
    seen = [columns.min(), rows.min() + 16, columns.max() + 1, rows.max() + 17]
    assert np.abs(place.inside(box) - seen).max() <= 1
    assert np.allclose(place.outside(place.inside(box), 400, 300), box, atol=1e-4)
    assert place.outside(np.array([-9.0, 0, 128, 128]), 400, 300).tolist() == [0, 0, 400, 300]


def test_a_letterbox_leaves_a_picture_of_its_size_as_it_is(pixels: np.ndarray) -> None:
    square, place = letterbox(pixels, 32)
    assert (square == pixels).all()
    assert place == (1, 0, 0)
