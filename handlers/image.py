"""Bytes to pixels, within bounds: the one image decoder, for serving and for training.

It checks a file's structure (format, frames, size) before it decodes a pixel, so a small file that
claims a huge picture costs nothing.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from rampart.handlers.containers import ContainerError, FramesError, Still, read_still
from rampart.handlers.errors import ImageError, outcome
from rampart.handlers.types import Pixels

MAX_PIXELS = 2**24  # of any picture, and of any request whatever the settings
MIN_DEFAULT = 2**22  # pixels that a request may hold by default, however small the model
MAX_ASPECT = 20
MAX_IMAGES = 32  # of one request
GREY = 128  # of the border that `letterbox` leaves
# Each scan of a progressive JPEG is a pass over the whole picture; encoders write about ten.
MAX_JPEG_SCANS = 100
FREE_SCANS = 12  # included in the cost of a picture's pixels
# A few bytes can claim millions of pixels of one colour: above FREE_PIXELS, pixels need bytes.
FREE_PIXELS, PIXELS_A_BYTE = 2**20, 2048
# `Image.open` would warn about large pictures and try other formats.
READERS: dict[str, Callable[[BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
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
TURNED = 5  # from here on width and height change places


class Allowance:
    """The remaining cost that one request's pictures may have, in pixels of a PNG."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self.pixels = pixels
        self._left, self._earned = pixels, FREE_PIXELS

    def spend(self, cost: int, length: int) -> None:
        """Pay for a picture of `length` bytes. Raises ImageError where it costs too much."""
        if cost > self._left:
            which = "image has" if cost > self.pixels else "images of one request together have"
            raise ImageError(
                413,
                "too_many_pixels",
                f"the {which} too many pixels: this endpoint takes {self.pixels / 1e6:.1f} million"
                f" per request ({4 * self.pixels / 1e6:.1f} million as JPEG). Scale down before you"
                " send",
            )
        self._left -= cost
        self._earned += length * PIXELS_A_BYTE - cost
        if self._earned < 0:
            raise ImageError(
                413,
                "implausible_size",
                f"the file is too small for so many pixels: above {FREE_PIXELS / 1e6:.1f} million,"
                f" each byte allows {PIXELS_A_BYTE} pixels. Scale the image down, or send it as a"
                " JPEG",
            )


def default_pixels(size: int) -> int:
    """Pixels that a request may hold by default: a square of eight times the model's side."""
    return min(MAX_PIXELS, max(MIN_DEFAULT, (8 * size) ** 2))


class Picture(NamedTuple):
    """A picture that passed all checks of its structure; decoding costs `cost` pixels of a PNG."""

    still: Still
    size: int | None
    cost: int

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height, upright."""
        width, height = self.still.size
        return (height, width) if self.still.orientation >= TURNED else (width, height)

    def pixels(self) -> NDArray[np.uint8]:
        """RGB pixels, uint8 (H, W, 3), as `decode` returns them. Raises ImageError."""
        image = self.upright()
        return np.array(image if self.size is None else _fit(image, self.size))  # (H, W, 3)

    def upright(self) -> Image.Image:
        """The whole picture in RGB; a large JPEG reduced, to no less than twice `size`."""
        # Pillow raises a dozen exception types on hostile bytes; all mean the same.
        try:
            image = self._open()
            image.load()
            hidden = _hides_colours(image, self.still.depth)
            image = image if hidden else _to_rgb(image)
        except Exception as error:
            raise _corrupt() from error
        if hidden:
            raise ImageError(
                422,
                "transparent_image",
                "the image has transparent pixels: flatten it onto a colour",
            )
        turn = UPRIGHT.get(self.still.orientation)
        return image if turn is None else image.transpose(turn)

    def check_opaque(self) -> None:
        """Raise ImageError for transparent pixels; what has no alpha is not decoded for it."""
        try:
            doubtful = self._open().has_transparency_data
        except Exception as error:
            raise _corrupt() from error
        if doubtful:
            self.upright()

    def _open(self) -> Image.Image:
        image = READERS[self.still.format](BytesIO(self.still.data))
        if image.size != self.still.size:
            raise _corrupt()
        if self.size is not None:
            # JPEGs only: the inverse transform can give a half, a quarter or an eighth.
            image.draft(None, (2 * self.size, 2 * self.size))
        return image


def examine(data: bytes, size: int | None = None, allowance: Allowance | None = None) -> Picture:
    """Check a file's structure, as `decode` does first. Raises ImageError."""
    if not data:
        raise ImageError(422, "empty_body", "the body is empty: send a JPEG, PNG or WebP image")
    try:
        still = read_still(data)
    except FramesError as error:
        raise ImageError(
            422, "multiple_frames", "the file holds several frames: send one still image"
        ) from error
    except ContainerError as error:
        raise _corrupt() from error
    if still is None:
        raise ImageError(
            415, "unsupported_format", "not a JPEG, PNG or WebP image: send one of these"
        )
    check_size(still.size)
    if still.scans > MAX_JPEG_SCANS:
        raise ImageError(422, "too_many_scans", "the JPEG has too many scans: save it again")
    picture = Picture(still, size, _cost(still, size))
    (allowance or Allowance()).spend(picture.cost, len(data))
    return picture


def _cost(still: Still, size: int | None) -> int:
    """What decoding costs, in pixels of a PNG, as measured by `benchmarks/decoding.py`."""
    pixels = still.size[0] * still.size[1]
    if still.format != "JPEG":
        return pixels
    reduction = min(still.size) // (2 * size) if size else 1  # by the decoder itself
    if still.progressive:
        return pixels * max(FREE_SCANS, still.scans) // FREE_SCANS // max(1, min(reduction, 2))
    # Up to four channels may have a scan each; more scans are useless passes.
    return pixels * max(4, still.scans) // 4 // max(1, min(reduction, 4))


def decode(
    data: bytes, size: int | None = None, allowance: Allowance | None = None
) -> NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP picture to RGB pixels, uint8 (H, W, 3).

    `size` scales it (bicubic, antialiased, shorter side to `size`; a JPEG of at least four times
    that side within its decoder first) and crops the centre to (size, size); a picture of that size
    stays as it is. Of a file with previews it takes the primary picture. Raises ImageError for
    anything but one opaque still picture within the bounds and the request's `allowance`.
    """
    return examine(data, size, allowance).pixels()


def pictures_of(
    images: Sequence[bytes | Pixels | ImageError], size: int, max_pixels: int
) -> list[Picture | Pixels | ImageError]:
    """The images of one request, examined and not yet decoded, or what is wrong with them."""
    allowance = Allowance(max_pixels)
    return [
        outcome(examine, image, size, allowance) if isinstance(image, bytes) else image
        for image in images
    ]


class Placement(NamedTuple):
    """Where `letterbox` put a picture: its pixel x lies at `left` + `scale` x, y likewise."""

    scale: float
    left: int
    top: int

    def inside(self, boxes: NDArray[np.floating]) -> NDArray[np.float32]:
        """Boxes (..., 4) x1, y1, x2, y2 of the picture, in pixels of the square."""
        return (np.asarray(boxes) * self.scale + self._corner()).astype(np.float32)

    def outside(self, boxes: NDArray[np.floating], width: int, height: int) -> NDArray[np.float32]:
        """Boxes (..., 4) of the square, in pixels of the picture and cut at its borders."""
        own = (np.asarray(boxes) - self._corner()) / self.scale
        return np.clip(own, 0, (width, height, width, height)).astype(np.float32)

    def _corner(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left, self.top


class Frame(NamedTuple):
    """A picture within what the model sees of it; its sides are those of the picture as sent."""

    placement: Placement
    width: int
    height: int

    def outside(self, boxes: NDArray[np.floating]) -> NDArray[np.float32]:
        """Boxes (..., 4) that the model found, in pixels of the picture and cut at its borders."""
        return self.placement.outside(boxes, self.width, self.height)


class View(NamedTuple):
    """What the model sees of a picture; `frame` where that is the picture as a whole."""

    pixels: Pixels  # (S, S, 3)
    frame: Frame | None = None


# From an upright picture, the model's side, and width and height of the picture as sent.
Fitting = Callable[[Image.Image, int, tuple[int, int]], View]


def cropped(image: Image.Image, size: int, sides: tuple[int, int]) -> View:
    """The largest centred square, as classifiers see it."""
    return View(np.array(_fit(image, size)))


def framed(image: Image.Image, size: int, sides: tuple[int, int]) -> View:
    """The whole picture in a grey border, as object detectors see it."""
    pixels, placement = letterbox(np.asarray(image), size)
    # The decoder may have reduced a JPEG, and boxes are of the picture as sent.
    return View(pixels, Frame(placement._replace(scale=size / max(sides)), *sides))


def view_of(
    image: Picture | Pixels | ImageError, size: int, fitting: Fitting = cropped
) -> View | ImageError:
    """What the model sees of one of `pictures_of`, or what is wrong with it."""
    if isinstance(image, ImageError):
        return image
    return outcome(_view, image, size, fitting)


def _view(image: Picture | Pixels, size: int, fitting: Fitting) -> View:
    if isinstance(image, Picture):
        return fitting(image.upright(), size, image.sides)
    return fitting(Image.fromarray(image), size, (image.shape[1], image.shape[0]))


def fit(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) as `decode` would bring a picture of them to (size, size, 3)."""
    return np.array(_fit(Image.fromarray(pixels), size))


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 3) as a picture, to be brought to size as one is."""
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def letterbox(pixels: NDArray[np.uint8], size: int) -> tuple[NDArray[np.uint8], Placement]:
    """Pixels (H, W, 3) as a whole, centred in a grey square (size, size, 3), and where they lie.

    The longer side fills the square (bicubic, antialiased); the other one is rounded to pixels.
    """
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    inner_width, inner_height = (max(1, round(length * scale)) for length in (width, height))
    left, top = (size - inner_width) // 2, (size - inner_height) // 2
    square = np.full((size, size, 3), GREY, np.uint8)
    image = Image.fromarray(pixels)
    if image.size != (inner_width, inner_height):
        image = image.resize((inner_width, inner_height), Image.Resampling.BICUBIC)
    square[top : top + inner_height, left : left + inner_width] = np.asarray(image)
    return square, Placement(scale, left, top)


def check_size(size: tuple[int, int]) -> None:
    """Raise ImageError for a picture of more than MAX_PIXELS, or of too extreme a shape."""
    short, long = sorted(size)
    if short < 1:
        raise _corrupt()
    if short * long > MAX_PIXELS:
        raise ImageError(
            413,
            "too_many_pixels",
            f"the image has more than {MAX_PIXELS / 1e6:.1f} million pixels: send a smaller one",
        )
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


def _hides_colours(image: Image.Image, depth: int) -> bool:
    """Whether alpha channel, palette or colour key make any pixel less than opaque.

    RGB would reveal the colour beneath, which no viewer shows. `depth` is in bits a sample.
    """
    if not image.has_transparency_data:
        return False
    if image.mode in ("1", "L", "RGB", "I;16"):
        return _shows_key(image, depth)
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return bool(lowest != 255)


def _shows_key(image: Image.Image, depth: int) -> bool:
    """Whether a PNG's colour key (tRNS, given at the file's bit depth) occurs among its pixels."""
    key = np.atleast_1d(image.info["transparency"])
    if depth == 16:
        key = key >> 8
    elif depth > 1:  # Pillow has scaled the key of a two-coloured picture
        key = key * 255 // (2**depth - 1)
    plain = image if image.mode == "RGB" else _to_rgb(image).getchannel(0)
    plain.info["transparency"] = tuple(key.tolist()) if image.mode == "RGB" else int(key[0])
    return bool(plain.convert("RGBA").getchannel("A").getextrema()[0] != 255)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a picture without hidden colours; scales 16-bit gray, which Pillow would clip."""
    if image.mode == "I;16":
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)
    # A palette has alphas, and only the way through RGBA drops them without a warning.
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scale the largest centred square to (size, size)."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _corrupt() -> ImageError:
    return ImageError(
        422, "corrupt_image", "the image is truncated or corrupt: check the file and send it whole"
    )
