"""What is done to training images at random, so that a network meets more than there are.

Each image's draws follow from its own noise, so a run that goes on draws what it would have drawn.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from rampart.hardening.attack.noise import Noise

TURN, ZOOM, LIGHT = math.radians(12), 0.12, 0.35  # the most that `warp` changes, either way

# Words in the names of classes that differ from their mirror images.
SIDED = ("left", "right", "sign", "letter", "digit", "number", "arrow", "turn", "text")


def flip(x: Tensor, noise: Noise) -> Tensor:
    """Mirror each image of x (N, 3, H, W) with probability 1/2."""
    return torch.where(noise.uniform(1, 1, 1) < 0.5, x.flip(-1), x)


def crop(x: Tensor, noise: Noise, *, padding: int = 4) -> Tensor:
    """Shift each image of x (N, 3, H, W) by up to `padding` pixels, filling with reflections."""
    n, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4, mode="reflect")
    shift = (noise.uniform(2) * (2 * padding + 1)).long()  # (N, 2)
    rows = (shift[:, :1] + torch.arange(height, device=x.device))[:, :, None]  # (N, H, 1)
    columns = (shift[:, 1:] + torch.arange(width, device=x.device))[:, None, :]  # (N, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def warp(x: Tensor, noise: Noise) -> Tensor:
    """Turn, zoom, brighten and sharpen the contrast of each image of x (N, 3, H, W) a little."""
    turn, zoom, stretch, light, contrast = (2 * noise.uniform(5) - 1).unbind(1)  # (N,) each
    angle = turn * TURN
    rows, columns = 1 + zoom * ZOOM, 1 + (zoom + stretch / 2) * ZOOM
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    top = torch.stack([columns * cos, -columns * sin, zero], 1)
    theta = torch.stack([top, torch.stack([rows * sin, rows * cos, zero], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * torch.exp(contrast * LIGHT)[:, None, None, None]
    return (x * torch.exp(light * LIGHT)[:, None, None, None]).clamp(0, 1)


def cutout(x: Tensor, noise: Noise) -> Tensor:
    """Paint a gray square of half the side somewhere on each image of x (N, 3, H, W), as far as it
    lies inside (DeVries and Taylor 2017, section 3.2).
    """
    middle = noise.uniform(2)[:, :, None]  # (N, 2, 1)
    rows, columns = (
        ((torch.arange(side, device=x.device) + 0.5) / side - middle[:, axis]).abs() < 0.25
        for axis, side in enumerate(x.shape[2:])
    )  # (N, H), (N, W)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], 0.5, x)


AUGMENTATIONS: dict[str, Callable[[Tensor, Noise], Tensor]] = {
    "flip": flip,
    "crop": crop,
    "warp": warp,
    "cutout": cutout,
}


# Of several images together; their labels become shares of classes.
MIXTURES = ("cutmix",)


def cutmix(x: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A rectangle of each image of x (N, 3, H, W) from its neighbour, and labels (N, classes) by
    area (Yun et al. 2019, section 3.1). In adversarial training it gains where weights are averaged
    (Rebuffi et al. 2021, "Data augmentation can improve robustness"). Draws from torch's numbers.
    """
    if len(x) < 2:
        return x, F.one_hot(label, classes).float()
    mixed: tuple[Tensor, Tensor] = v2.CutMix(num_classes=classes)(x, label)
    return mixed


def augment(x: Tensor, noise: Noise, names: Sequence[str]) -> Tensor:
    """x (N, 3, H, W) after the augmentations of these names, in their order; no image is mixed."""
    for name in of_one_image(names):
        x = AUGMENTATIONS[name](x, noise)
    return x


def of_one_image(names: Sequence[str]) -> tuple[str, ...]:
    """Those of these augmentations that leave an image its label."""
    return tuple(name for name in names if name not in MIXTURES)


def check_augmentations(names: Sequence[str], *, mixtures: bool = False) -> None:
    """Raise ValueError for a name that is none, of images alone or of `mixtures` too."""
    every = (*AUGMENTATIONS, *(MIXTURES if mixtures else ()))
    if unknown := sorted(set(names) - set(every)):
        known = ", ".join(every)
        raise ValueError(f"unknown augmentation {unknown[0]!r}: choose among {known}, or none")


def suited(classes: Sequence[str]) -> tuple[str, ...]:
    """The augmentations that images of these classes bear, by their names."""
    return ("flip", "crop") if mirroring(classes)[0] else ("crop",)


def mirroring(classes: Sequence[str]) -> tuple[bool, str]:
    """Whether images may be flipped, and why: not where a mirrored one is of another class."""
    words = [name.lower() for name in classes]
    plain = bool(words) and all(len(word) == 1 or word.isdigit() for word in words)
    sided = [name for name in words if any(part in SIDED for part in split_words(name))]
    if plain:
        return False, f"classes {', '.join(classes[:3])} ... may be digits, letters or signs"
    if sided:
        return False, f"class {sided[0]} may differ from its mirror image"
    return True, "flip mirrors half of the images: leave it out if that changes the class"


def split_words(name: str) -> list[str]:
    """The words of a class name, also one of their plurals."""
    parts = "".join(c if c.isalnum() else " " for c in name).split()
    return [word for part in parts for word in (part, part.removesuffix("s"))]
