"""What an image may be, by which status it gets."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

Encode = Callable[..., bytes]


def frames(encode: Encode, pixels: np.ndarray, format: str) -> bytes:
    return encode(pixels, format, save_all=True, append_images=[Image.fromarray(255 - pixels)])


def rows(encode: Encode, pixels: np.ndarray) -> Iterator[tuple[str, bytes, int]]:
    """What an image may be: (row, body, status)."""
    colour = Image.fromarray(pixels)
    hidden = colour.convert("RGBA")
    hidden.putalpha(254)
    turned = Image.Exif()
    turned[0x0112] = 6
    gray16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    yield "empty body", b"", 422
    for format in ("PNG", "JPEG", "WEBP"):
        whole = encode(pixels, format)
        yield f"plain {format}", whole, 200
        yield f"truncated {format}", whole[: len(whole) // 2], 422
        yield f"oriented {format}", encode(pixels, format, exif=turned), 200
    yield "corrupt", encode(pixels)[:60] + b"rampart!" * 8, 422
    yield "text", b"hello", 415
    for format in ("GIF", "BMP", "TIFF"):
        yield format, encode(pixels, format), 415
    yield "above 16 million pixels", encode(Image.new("L", (4097, 4096))), 413
    yield "16 million pixels as a PNG", encode(Image.new("L", (4096, 4096))), 413
    yield "16 million pixels as a JPEG", encode(Image.new("L", (4096, 4096)), "JPEG"), 200
    yield "aspect above 20", encode(Image.new("RGB", (210, 10))), 422
    yield "animated PNG", frames(encode, pixels, "PNG"), 422
    yield "animated WebP", frames(encode, pixels, "WEBP"), 422
    yield "JPEG with a preview", frames(encode, pixels, "MPO"), 200
    yield "alpha below 255", encode(hidden), 422
    yield "transparent palette", encode(colour.quantize(16), transparency=3), 422
    yield "opaque alpha", encode(colour.convert("RGBA")), 200
    yield "grayscale", encode(colour.convert("L")), 200
    yield "palette", encode(colour.quantize(16)), 200
    yield "CMYK", encode(colour.convert("CMYK"), "JPEG"), 200
    yield "16-bit", encode(gray16), 200
    yield "larger", encode(colour.resize((300, 200))), 200
    yield "smaller", encode(colour.resize((7, 9))), 200
