"""Images that a network learns in seconds, and a network that has learned them."""

from typing import NamedTuple

import numpy as np
import torch

from rampart.hardening.attack.objectives import Look, View
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train import cifar10


def blobs(count: int, *, size: int = 32, seed: int = 0) -> Images:
    """Smooth random images whose class is their dominant hue: learnable in seconds."""
    generator = np.random.default_rng(seed)
    label = torch.from_numpy(generator.integers(0, 10, count))
    coarse = torch.from_numpy(generator.random((count, 3, 4, 4), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    hue = torch.stack([torch.cos(2 * torch.pi * (label / 10 + shift / 3)) for shift in range(3)], 1)
    x = (0.5 + 0.25 * hue[:, :, None, None] + 0.4 * (smooth - 0.5)).clamp(0, 1)
    image = (x * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return Images(image, label, cifar10.CLASSES)


class Learned(NamedTuple):
    """A trained network and images that it labels right."""

    model: torch.nn.Module
    x: torch.Tensor  # (N, 3, 16, 16) in [0, 1]
    label: torch.Tensor  # (N,)
    threat: Threat

    @property
    def look(self) -> Look:
        return lambda x: View(self.model(x))


def learn_blobs() -> Learned:
    """A convolutional network that learned blobs of 16 pixels in a second, undefended."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    images = blobs(512, size=16)
    x, label = to_float(images.image), images.label
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    model.requires_grad_(False)
    right = (model(x).argmax(1) == label).nonzero().squeeze(1)[:32]
    return Learned(model, x[right], label[right], Threat("Linf", 12 / 255))
