"""The image nearest to a picture among those that the purifier's generator makes of a small latent.

As in Defense-GAN (Samangouei et al. 2018, eq. 3), by gradient descent; the latent is an image of a
quarter of the pixels. It is to look at and to compare with: no attack on it was run, and the
original fell (Athalye et al. 2018, section 5.4.2).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange


def project(
    generator: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    visible: Tensor | None = None,
    steps: int = 200,
    lr: float = 0.02,
    smoothness: float = 0.02,
) -> Tensor:
    """The generator's image (N, 3, H, W) nearest to x (N, 3, H, W) in [0, 1], H and W even. Where
    `visible` (H, W) is 0, `smoothness` alone decides. Raises ValueError where all of x is hidden.
    """
    weight = x.new_ones(x.shape[-2:]) if visible is None else visible.to(x)
    if not weight.any():
        raise ValueError("the whole picture is hidden: leave some of it visible")
    mean = (x * weight).sum((2, 3), keepdim=True) / weight.sum()
    latent = F.avg_pool2d(torch.where(weight > 0, x, mean), 2).requires_grad_(True)
    optimizer = torch.optim.Adam([latent], lr=lr)
    for _ in trange(steps, desc="project", leave=False):
        error = (decoded(generator, latent) - x).square() * weight  # (N, 3, H, W)
        distance = error.sum() / weight.sum()
        optimizer.zero_grad()
        (distance + smoothness * roughness(latent)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return decoded(generator, latent)


def decoded(generator: Callable[[Tensor], Tensor], latent: Tensor) -> Tensor:
    """The generator's image (N, 3, 2h, 2w) of a latent (N, 3, h, w)."""
    enlarged = F.interpolate(latent, scale_factor=2, mode="bilinear", align_corners=False)
    return generator(enlarged.clamp(0, 1))


def roughness(latent: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, summed over the images."""
    down, right = latent.diff(dim=2).abs(), latent.diff(dim=3).abs()
    return down.mean((1, 2, 3)).sum() + right.mean((1, 2, 3)).sum()
