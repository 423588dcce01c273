"""Figures with their uncertainty: shares of images, differences, and detection rates.

Sources: score intervals, Wilson 1927; robust accuracy with rejection and its stratified cost, Chen
et al. 2023 (section 3).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, mannwhitneyu

from hardening.attacks import Threat

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Metric(NamedTuple):
    """One figure in [0, 1] over `n` images.

    `threat` is None for clean figures; `attack` says what made it, with its budget. `interval` is
    given where the figure is no share of images (a difference, an AUROC).
    """

    subject: str
    variant: str
    name: str
    value: float
    n: int
    threat: Threat | None = None
    attack: str = ""
    interval: tuple[float, float] | None = None


def wilson(value: float, n: int) -> tuple[float, float]:
    """95% interval of a share `value` of `n` images."""
    interval = binomtest(round(value * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def difference(first: Bools, second: Bools) -> tuple[float, tuple[float, float]]:
    """Share of `first` (N,) minus share of `second` (N,) on the same images; paired bootstrap 95%.

    Where the two never differ the interval is a single point, which a bootstrap cannot widen.
    """
    gaps = first.astype(float) - second.astype(float)
    gap = float(gaps.mean())
    if not gaps.any():
        return gap, (gap, gap)
    generator = np.random.default_rng(0)
    result = bootstrap((gaps,), np.mean, method="percentile", rng=generator)
    interval = result.confidence_interval
    return gap, (float(interval.low), float(interval.high))


def tpr_at_fpr(clean: Floats, attacked: Floats, rate: float) -> float:
    """Share of `attacked` (M,) above the least threshold that flags at most `rate` of `clean`."""
    allowed = int(rate * len(clean) + 1e-9)
    threshold = np.sort(clean)[len(clean) - 1 - allowed]
    return float((attacked > threshold).mean())


def auroc(clean: Floats, attacked: Floats) -> tuple[float, tuple[float, float]]:
    """Area under the ROC curve of suspicions that tell `attacked` (M,) from `clean` (N,), with 95%
    interval by bootstrap.
    """

    def area(clean: Floats, attacked: Floats) -> float:
        wins = mannwhitneyu(attacked, clean).statistic  # pairs in the right order
        return float(wins / (len(clean) * len(attacked)))

    if len(attacked) < 2:
        return area(clean, attacked), (0.0, 1.0)
    generator = np.random.default_rng(0)
    resampled = bootstrap(
        (clean, attacked),
        area,
        vectorized=False,
        method="percentile",
        n_resamples=999,
        rng=generator,
    )
    interval = resampled.confidence_interval
    return area(clean, attacked), (float(interval.low), float(interval.high))
