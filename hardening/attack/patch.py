"""A square of any colours on a picture, as a sticker would be (Brown et al. 2017, section 2)."""

import torch
from torch import Tensor

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import Look, as_loss, mislead, untargeted
from rampart.hardening.attack.pgd import Loss, Threat, better, pgd

# Its share of the side, the places that are tried out, and the steps at each.
STICKER, PLACES, STEPS = 3 / 16, 4, 40
ANY_COLOUR = Threat("Linf", 1.0)


def patch(look: Look, x: Tensor, label: Tensor, *, share: float = STICKER) -> Tensor:
    """x (N, 3, H, W) with the `sticker` that makes it wrong about `label` (N,), and accepted."""
    return sticker(as_loss(mislead(look, untargeted(label), label), len(x)), x, share=share)


def sticker(rank: Loss, x: Tensor, *, share: float = STICKER, places: int = PLACES) -> Tensor:
    """A square on x (N, 3, H, W), at the best of the `places` where gray hurts most.

    `rank` (N,) is what the attacker wants more of.
    """
    grid = squares(x, share)  # (P, 1, H, W)
    with torch.no_grad():
        damage = torch.stack([rank(torch.where(mask, 0.5, x)) for mask in grid], 1)  # (N, P)
    where = damage.topk(min(places, len(grid)), dim=1).indices
    best, best_rank = x, torch.full((len(x),), -torch.inf, device=x.device)
    for place in range(where.shape[1]):
        pasted = paste(rank, x, grid[where[:, place]], seed=place)
        with torch.no_grad():
            best, best_rank = better(best, best_rank, pasted, rank(pasted))
    return best


def paste(rank: Loss, x: Tensor, mask: Tensor, *, seed: int) -> Tensor:
    """x with what `rank` likes best where `mask` (N, 1, H, W) is: PGD within all colours."""
    noise = Noise(torch.arange(len(x), device=x.device), seed=seed)
    start = noise.uniform(*x.shape[1:]) - x

    def composite(z: Tensor) -> Tensor:
        return torch.where(mask, z, x)

    z = pgd(lambda z: rank(composite(z)), x, ANY_COLOUR, steps=STEPS, step_size=0.1, start=start)
    return composite(z)


def squares(x: Tensor, share: float) -> Tensor:
    """Masks (P, 1, H, W) of squares of this share of the height, half a side apart."""
    height, width = x.shape[2:]
    side = round(share * height)
    tops, lefts = (range(0, length - side + 1, max(1, side // 2)) for length in (height, width))
    masks = torch.zeros((len(tops), len(lefts), 1, height, width), dtype=torch.bool)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            masks[row, column, 0, top : top + side, left : left + side] = True
    return masks.flatten(0, 1).to(x.device)
