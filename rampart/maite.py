"""A model for MAITE's tools (MIT Lincoln Laboratory), which test whatever keeps its protocols."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rampart.hardening.model.pipeline import Variant
from rampart.model import Model


class ImageClassifier:
    """A model as MAITE's `image_classification.Model`, which needs no package of MAITE's.

    MAITE has no word for a rejected image: the detectors are left out, and `rampart evaluate`
    measures them. Raises ValueError for a variant that the model lacks.
    """

    def __init__(self, model: Model, variant: Variant | None = None) -> None:
        chosen = model.chosen_variant(variant)
        self._model, self._pipeline = model, model.pipeline(chosen)
        labels = dict(enumerate(model.classes))
        self.metadata = {"id": f"{model.card['model']} {chosen}", "index2label": labels}

    def __call__(self, batch: Sequence[Any], /) -> list[NDArray[np.float32]]:
        """Probabilities (K,) for each picture (3, H, W), uint8 or floats in [0, 1], of any size."""
        if not len(batch):
            return []
        pixels = torch.cat([self._model.pixels(in_bytes(np.asarray(one))) for one in batch])
        with torch.no_grad():
            parts = [self._pipeline(part).logits.softmax(1) for part in torch.split(pixels, 128)]
        return list(torch.cat(parts).numpy())


def in_bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (3, H, W) as uint8 (1, H, W, 3). Raises ValueError for what is none."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a picture has shape {image.shape}: pass (3, H, W) in RGB")
    if image.dtype != np.uint8:
        if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):  # NaN neither
            raise ValueError(f"a picture holds {image.dtype}: pass uint8, or floats in [0, 1]")
        image = (image * 255).round().astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)[None])
