"""Pixels as models take them, and as files carry them."""

from io import BytesIO

from PIL import Image
from torch import Tensor


def as_file(picture: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """The picture as the bytes of a file."""
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def to_float(image: Tensor) -> Tensor:
    """Uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [0, 1]; TensorRT needs the cast first."""
    return image.float().permute(0, 3, 1, 2).contiguous() / 255


def to_uint8(x: Tensor) -> Tensor:
    """Float (N, 3, H, W) in [0, 1] to the nearest uint8 (N, H, W, 3)."""
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
