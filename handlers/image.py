"""Bytes to pixels, bounded: the one image decoder, for serving and for training alike.

Everything that a header tells (format, frames, size) is judged before a pixel is decoded, so a
small file that claims a huge picture costs nothing.
"""

import base64
import binascii
from collections.abc import Callable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

MAX_PIXELS = 16_000_000  # of a picture, and of all that come in one request
MEGAPIXELS = f"{MAX_PIXELS // 1_000_000} megapixels"
MAX_ASPECT = 20
MAX_IMAGES = 32  # of one request
# Each scan of a progressive JPEG is a pass over the whole picture; encoders write about ten.
MAX_JPEG_SCANS = 100
FREE_SCANS = 12  # that one picture's pixels allow for
# EXIF orientation (CIPA DC-008, tag 0x0112) and what undoes it; 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """Why an image, or the request that should carry one, cannot be used.

    `code` is the HTTP status, `type` a short constant for programs, `message` says what is wrong
    and what to send instead; none of them quotes the request.
    """

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.type = type
        self.message = message

    def bare(self) -> "ImageError":
        """The same without its traceback, which holds the picture that it is about."""
        return ImageError(self.code, self.type, self.message)


class Allowance:
    """The pixels that the pictures of one request may still have: 40 bytes can hold 16 million."""

    def __init__(self) -> None:
        self._left = MAX_PIXELS

    def spend(self, pixels: int) -> None:
        """Take `pixels` off. Raises ImageError where less is left."""
        if pixels > self._left:
            raise ImageError(
                413,
                "too_many_pixels",
                f"the images of one request have more than {MEGAPIXELS} together: send fewer, or"
                " smaller ones",
            )
        self._left -= pixels


def decode(
    data: bytes, size: int | None = None, allowance: Allowance | None = None
) -> NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP picture to RGB pixels, uint8 (H, W, 3).

    With `size`, a picture of another size is scaled (bicubic, antialiased, shorter side to `size`)
    and centre-cropped to (size, size); one that has that size already is returned untouched.
    Raises ImageError for anything that is not one opaque still picture within the bounds, or more
    than what `allowance` has left for the request that it came with.
    """
    opener = _opener(data)
    # Pillow answers hostile bytes with a dozen exception types; here all of them mean one thing.
    try:
        image = opener(BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:  # the WebP reader looks at the size itself
        raise _too_large() from error
    except Exception as error:
        raise _corrupt() from error
    cost = _check_header(data, image.size, frames)
    if allowance:
        allowance.spend(cost)
    try:
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        hidden = _hides_colours(image, data)
        image = image if hidden else _to_rgb(image)
    except Exception as error:
        raise _corrupt() from error
    if hidden:
        raise ImageError(
            422, "transparent_image", "the image has transparent pixels: flatten it onto a colour"
        )
    image = image if turn is None else image.transpose(turn)
    return np.array(image if size is None else _fit(image, size))  # (H, W, 3)


def fit(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) as `decode` would bring a picture of them to (size, size, 3)."""
    return np.array(_fit(Image.fromarray(pixels), size))


def check_size(size: tuple[int, int]) -> None:
    """Raise ImageError for a picture of too many pixels, or of too extreme a shape."""
    short, long = sorted(size)
    if short < 1:
        raise _corrupt()
    if short * long > MAX_PIXELS:
        raise _too_large()
    if long > MAX_ASPECT * short:
        raise ImageError(
            422, "extreme_aspect", f"one side is more than {MAX_ASPECT} times the other: crop it"
        )


def check_count(count: int) -> None:
    """Raise ImageError where a request carries more images than it may."""
    if count > MAX_IMAGES:
        raise ImageError(
            413, "too_many_images", f"a request may carry {MAX_IMAGES} images: split it up"
        )


def from_base64(text: object) -> bytes | ImageError:
    """The bytes of an image that came as text, or what is wrong with it."""
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    return ImageError(
        422,
        "malformed_base64",
        "the image is not valid base64: encode it without line breaks or prefix",
    )


def _opener(data: bytes) -> Callable[[BytesIO], Image.Image]:
    """The reader for the format that the first bytes name.

    The readers are called directly because `Image.open` only warns about large pictures, or
    refuses them before their size can be told.
    """
    if not data:
        raise ImageError(422, "empty_body", "the body is empty: send a JPEG, PNG or WebP image")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if data[12:16] != b"IHDR":  # Pillow would read on, and we its colour key at a wrong depth
            raise _corrupt()
        return PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.jpeg_factory
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    raise ImageError(415, "unsupported_format", "not a JPEG, PNG or WebP image: send one of these")


def _check_header(data: bytes, size: tuple[int, int], frames: int) -> int:
    """Refuse by what the header tells: pixels, shape, frames, scans. What decoding costs, in pixels
    that are gone over no more than FREE_SCANS times."""
    check_size(size)
    if frames > 1:
        raise ImageError(
            422, "multiple_frames", "the file holds several frames: send one still image"
        )
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    cost = size[0] * size[1] * max(FREE_SCANS, scans) // FREE_SCANS
    if scans > MAX_JPEG_SCANS or cost > MAX_PIXELS:
        raise ImageError(422, "too_many_scans", "the JPEG has too many scans: save it anew")
    return cost


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; a picture with unreadable EXIF data counts as upright."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _hides_colours(image: Image.Image, data: bytes) -> bool:
    """Whether any pixel is less than opaque, by alpha channel, palette or colour key.

    Converting to RGB would reveal the colour beneath, which no viewer of the picture sees.
    """
    if not image.has_transparency_data:
        return False
    if image.mode in ("1", "L", "RGB", "I;16"):
        return _shows_key(image, data)
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return bool(lowest != 255)


def _shows_key(image: Image.Image, data: bytes) -> bool:
    """Whether a PNG's colour key (tRNS, given at the file's bit depth) occurs among its pixels."""
    key = np.atleast_1d(image.info["transparency"])
    depth = data[24]  # in the IHDR chunk, which comes first
    if depth == 16:
        key = key >> 8
    elif depth > 1:  # Pillow has scaled the key of a two-coloured picture
        key = key * 255 // (2**depth - 1)
    return bool((np.array(_to_rgb(image)) == key).all(axis=-1).any())


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a picture without hidden colours. 16-bit gray is scaled: Pillow would clip it."""
    if image.mode == "I;16":
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)
    # A palette keeps its alphas, and only the way over RGBA drops them without a warning.
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scale the largest centred square to (size, size)."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _too_large() -> ImageError:
    return ImageError(
        413, "too_many_pixels", f"the image has more than {MEGAPIXELS}: send a smaller one"
    )


def _corrupt() -> ImageError:
    return ImageError(
        422, "corrupt_image", "the image is truncated or corrupt: check the file and send it whole"
    )
