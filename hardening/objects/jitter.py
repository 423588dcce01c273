"""What is done to training pictures and their boxes at random, by torchvision's transforms."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import v2

from rampart.handlers.image import GREY
from rampart.hardening.objects.boxes import Truth

SMALLEST = 2.0  # pixels a side of a box that a crop leaves


def quarters(*sample: Any) -> Any:
    """Turned by a random number of quarters."""
    turn = 90 * int(torch.randint(4, ()))
    return tuple(v2.functional.rotate(part, turn, expand=True) for part in sample)


JITTERS: dict[str, Callable[..., Any]] = {
    "flip": v2.RandomHorizontalFlip(),
    # Of what has no up, as seen through a microscope or from above.
    "turn": quarters,
    # Keeps objects whose middle stays inside; half of the pictures stay whole.
    "crop": v2.RandomApply(
        [v2.RandomIoUCrop(min_scale=0.5, min_aspect_ratio=0.6, max_aspect_ratio=1.6)]
    ),
    "shrink": v2.RandomZoomOut(fill=GREY, side_range=(1.0, 1.6), p=0.3),
    "light": v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
}
CLEAN = v2.SanitizeBoundingBoxes(min_size=SMALLEST, labels_getter=lambda sample: sample[2])


def check_jitters(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is none."""
    if unknown := sorted(set(names) - set(JITTERS)):
        known = ", ".join(JITTERS)
        raise ValueError(f"unknown augmentation {unknown[0]!r}: choose among {known}, or none")


def jitter(
    pixels: NDArray[np.uint8], truth: Truth, names: Sequence[str], key: int
) -> tuple[NDArray[np.uint8], Truth]:
    """Pixels (H, W, 3) and objects after the augmentations `names`; draws follow from `key`."""
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    boxes = tv_tensors.BoundingBoxes(
        truth.boxes.clone(),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=pixels.shape[:2],
    )
    labels = truth.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        for name in names:
            image, boxes = JITTERS[name](image, boxes)
        image, boxes, labels = CLEAN(image, boxes, labels)
    moved = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return moved, Truth(boxes.as_subclass(torch.Tensor).contiguous(), labels)
