"""The p-value that some of a calibration's detectors would give.

All of them, and one alone, are in its tables. Those between are estimated, since it keeps no scores
of single images: Brown's method (Brown 1975, "A method for combining non-independent, one-sided
tests of significance") fits a gamma distribution to the sum of their surprises.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch

from rampart.handlers.verdict import Calibration, Floats


class Chosen(NamedTuple):
    """The p-value of some detectors, and whether it is estimated."""

    p_value: float
    estimated: bool


def p_value_of(calibration: Calibration, surprise: Floats, names: Collection[str]) -> Chosen:
    """The p-value of the detectors `names`, from the surprise (D,) of each detector there is."""
    on = np.isin(calibration.detectors, list(names))  # (D,)
    total, least = float(surprise[on].sum()), 1 / (calibration.images + 1)
    if on.all():
        below = int(np.searchsorted(calibration.combined, total, "left"))
        return Chosen((1 + calibration.images - below) * least, False)
    if on.sum() < 2:
        return Chosen(max(math.exp(-total), least), False)
    return Chosen(max(upper_tail(calibration, int(on.sum()), total), least), True)


def upper_tail(calibration: Calibration, count: int, total: float) -> float:
    """How often the surprises of `count` detectors would add up to `total` or more, if each pair
    of detectors agreed as much as all of them do on average.
    """
    every = len(calibration.detectors)
    mean = float(calibration.combined.mean()) / every
    spread = float(calibration.combined.var()) / mean**2 - every
    agreement = min(max(spread / (every * (every - 1)), 0.0), 1.0)
    variance = mean**2 * (count + count * (count - 1) * agreement)
    shape, scale = (count * mean) ** 2 / variance, variance / (count * mean)
    pair = torch.tensor([shape, total / scale], dtype=torch.float64)
    return float(torch.special.gammaincc(pair[0], pair[1]))
