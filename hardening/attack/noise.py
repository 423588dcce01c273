"""Random numbers that belong to a sample: the same in any batch and on any number of processes.
Each is a hash (SplitMix64, Steele et al. 2014, figure 14) of a key, a count and the element.
"""

import math

import torch
from torch import Tensor

# SplitMix64's constants as the signed 64-bit integers that tensors hold.
GOLDEN, FIRST, SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def mix(x: Tensor) -> Tensor:
    """Int64 whose bits all depend on all bits of x; overflow wraps, as it does in SplitMix64."""
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """x moved right with zeros coming in, where `>>` would bring copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Noise:
    """Draws for N samples, each from its own key: `index` int64 (N,), `seed` and `epoch`."""

    def __init__(self, index: Tensor, *, seed: int = 0, epoch: int = 0) -> None:
        # A number, not a tensor: nothing has to go to the device.
        run = int(mix(torch.tensor(seed) * GOLDEN + epoch + 1))
        self.keys = mix(index * GOLDEN + run)
        self.drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """Float32 (N, *shape) in [0, 1); each call draws anew."""
        self.drawn += 1
        start = mix(self.keys + self.drawn)[:, None]  # (N, 1)
        element = torch.arange(math.prod(shape), device=start.device) * GOLDEN
        bits = shifted(mix(start + element), 40)  # 24 of them, as many as float32 is exact for
        return (bits.float() / 2**24).view(len(start), *shape)

    def normal(self, *shape: int) -> Tensor:
        """Float32 (N, *shape), standard normal (Box and Muller 1958)."""
        radius = (-2 * torch.log1p(-self.uniform(*shape))).sqrt()
        return radius * torch.cos(2 * math.pi * self.uniform(*shape))
