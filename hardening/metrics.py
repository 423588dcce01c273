"""Figures with their uncertainty: shares of images, differences, and detection rates.

Sources: score intervals, Wilson 1927; robust accuracy with rejection and its stratified cost, Chen
et al. 2023 (section 3).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, mannwhitneyu

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

    The interval is at least 3/N to either side: what was not seen in N images may still be as
    frequent as that (the rule of three, Hanley and Lippman-Hand 1983).
    """
    n, gain, loss = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    shares = (gain / n, (n - gain - loss) / n, loss / n)
    draws = np.random.default_rng(0).multinomial(n, shares, size=9999)
    low, high = np.quantile((draws[:, 0] - draws[:, 2]) / n, (0.025, 0.975))
    gap = (gain - loss) / n
    low, high = min(low, gap - 3 / n), max(high, gap + 3 / n)
    return gap, (max(-1.0, float(low)), min(1.0, float(high)))


def detection(clean: Floats, attacked: Floats) -> dict[str, tuple[float, tuple[float, float]]]:
    """TPR@1%FPR, TPR@5%FPR and AUROC of suspicions (N,) and (M,), each with its 95% interval.

    Both sets are resampled, since the threshold comes from the clean one.
    """
    figures: dict[str, Callable[[Floats, Floats], float]] = {
        "tpr@1%fpr": lambda c, a: tpr_at_fpr(c, a, 0.01),
        "tpr@5%fpr": lambda c, a: tpr_at_fpr(c, a, 0.05),
        "auroc": auroc,
    }
    return {name: (f(clean, attacked), interval(f, clean, attacked)) for name, f in figures.items()}


def interval(
    figure: Callable[[Floats, Floats], float], clean: Floats, attacked: Floats
) -> tuple[float, float]:
    """95% bootstrap interval of a figure of two samples; as in `difference`, at least 3 divided by
    the smaller one's size to either side."""
    generator = np.random.default_rng(0)
    values = [
        figure(generator.choice(clean, len(clean)), generator.choice(attacked, len(attacked)))
        for _ in range(999)
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    value, least = figure(clean, attacked), 3 / min(len(clean), len(attacked))
    low, high = min(low, value - least), max(high, value + least)
    return max(0.0, float(low)), min(1.0, float(high))


def tpr_at_fpr(clean: Floats, attacked: Floats, rate: float) -> float:
    """Share of `attacked` (M,) above the least threshold that flags at most `rate` of `clean`."""
    allowed = int(rate * len(clean) + 1e-9)
    threshold = np.sort(clean)[len(clean) - 1 - allowed]
    return float((attacked > threshold).mean())


def auroc(clean: Floats, attacked: Floats) -> float:
    """Area under the ROC curve of suspicions that tell `attacked` (M,) from `clean` (N,)."""
    wins = mannwhitneyu(attacked, clean).statistic  # pairs in the right order
    return float(wins / (len(clean) * len(attacked)))
