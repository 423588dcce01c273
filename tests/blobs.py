"""Images that a network learns in seconds, for tests that need a data set."""

import numpy as np
import torch

from hardening.data import CIFAR10_CLASSES, Images


def blobs(count: int, *, size: int = 32, seed: int = 0) -> Images:
    """Smooth random images whose class is their dominant hue: learnable in seconds."""
    generator = np.random.default_rng(seed)
    label = torch.from_numpy(generator.integers(0, 10, count))
    coarse = torch.from_numpy(generator.random((count, 3, 4, 4), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    hue = torch.stack([torch.cos(2 * torch.pi * (label / 10 + shift / 3)) for shift in range(3)], 1)
    x = (0.5 + 0.25 * hue[:, :, None, None] + 0.4 * (smooth - 0.5)).clamp(0, 1)
    image = (x * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return Images(image, label, CIFAR10_CLASSES)
