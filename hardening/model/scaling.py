"""How networks of whatever origin want their pixels: in which range, and in which order."""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rampart.hardening.model.arrays import Pixels

Name = Literal["unit", "bytes", "signed", "imagenet"]
Layout = Literal["nchw", "nhwc"]
NAMES: tuple[Name, ...] = get_args(Name)
RGB = tuple[float, float, float]
NONE, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class Scaling(NamedTuple):
    """A network takes (x / 255 * factor - mean) / std of pixels x."""

    factor: float = 1.0
    mean: RGB = NONE
    std: RGB = ONE

    def of(self, images: Pixels, layout: Layout) -> NDArray[np.float32]:
        """What it takes of uint8 (N, H, W, 3)."""
        mean, std = (np.array(of_channels, np.float32) for of_channels in (self.mean, self.std))
        x = (images.astype(np.float32) * np.float32(self.factor / 255) - mean) / std  # (N, H, W, 3)
        scaled = x.transpose(0, 3, 1, 2) if layout == "nchw" else x
        return np.ascontiguousarray(scaled, dtype=np.float32)


SCALINGS: dict[Name, Scaling] = {
    "unit": Scaling(),
    "bytes": Scaling(factor=255.0),
    "signed": Scaling(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # As torchvision's weights want it.
    "imagenet": Scaling(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
