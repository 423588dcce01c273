"""Figures with their uncertainty: shares of images, differences, and detection rates. Sources:
score intervals, Wilson 1927; robust accuracy with rejection and its stratified cost, Chen et al.
2023 (section 3).
"""

from typing import NamedTuple

import numpy as np

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.arrays import Bools, Floats
from rampart.hardening.model.card import Row, Subject


class Metric(NamedTuple):
    """One figure over `n` images, with an `interval` where it is a difference or an AUROC."""

    subject: Subject
    name: str
    value: float
    n: int
    threat: Threat | None = None
    attack: str = ""
    interval: tuple[float, float] | None = None


def wilson(value: float, n: int) -> tuple[float, float]:
    """95% interval of a share `value` of `n` images."""
    from scipy.stats import binomtest  # half a second, which a mistake need not wait for

    interval = binomtest(round(value * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def share(held: Bools) -> Row:
    """A share of images with its 95% interval, as cards have it."""
    value = float(held.mean())
    return rounded(value, wilson(value, len(held)))


def rounded(value: float, interval: tuple[float, float]) -> Row:
    """A figure with its interval, as cards have it."""
    return {"value": round(value, 4), "interval": [round(bound, 4) for bound in interval]}


def difference(first: Bools, second: Bools) -> tuple[float, tuple[float, float]]:
    """Share of `first` (N,) minus share of `second` (N,) on the same images; paired bootstrap 95%.
    The interval is at least 3/N to either side (the rule of three, Hanley and Lippman-Hand 1983).
    """
    n, gain, loss = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    shares = (gain / n, (n - gain - loss) / n, loss / n)
    draws = np.random.default_rng(0).multinomial(n, shares, size=9999)
    low, high = np.quantile((draws[:, 0] - draws[:, 2]) / n, (0.025, 0.975))
    gap = (gain - loss) / n
    low, high = min(low, gap - 3 / n), max(high, gap + 3 / n)
    return gap, (max(-1.0, float(low)), min(1.0, float(high)))


def detection(clean: Floats, attacked: Floats) -> dict[str, tuple[float, tuple[float, float]]]:
    """TPR@1%FPR, TPR@5%FPR and AUROC of suspicions (N,) and (M,) with bootstrap 95% intervals."""
    draw = np.random.default_rng(0).choice
    draws = [detection_rates(*(draw(s, len(s)) for s in (clean, attacked))) for _ in range(999)]
    value, least = detection_rates(clean, attacked), 3 / min(len(clean), len(attacked))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    low = np.minimum(low, value - least).clip(0)
    high = np.maximum(high, value + least).clip(max=1)
    names = ("tpr@1%fpr", "tpr@5%fpr", "auroc")
    every = zip(names, value.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: (figure, (least, most)) for name, figure, least, most in every}


def detection_rates(clean: Floats, attacked: Floats) -> Floats:
    """The three figures (3,) of `detection`, off one curve."""
    flagged, caught = roc(clean, attacked)
    rates = [tpr_at_fpr(flagged, caught, rate) for rate in (0.01, 0.05)]
    return np.array([*rates, np.trapezoid(caught, flagged)])


def tpr_at_fpr(flagged: Floats, caught: Floats, rate: float) -> float:
    """What a curve of `roc` catches with the least threshold that flags at most `rate`."""
    return float(caught[flagged <= rate + 1e-9].max())


def roc(clean: Floats, attacked: Floats) -> tuple[Floats, Floats]:
    """Shares of `clean` (N,) and `attacked` (M,) that each threshold flags, infinite ones too."""
    from scipy.stats import rankdata
    from sklearn.metrics import roc_curve  # training and export do without

    rank = rankdata(np.concatenate([clean, attacked]), "dense")
    wrong = np.repeat([0, 1], [len(clean), len(attacked)])
    flagged, caught, _ = roc_curve(wrong, rank, drop_intermediate=False)
    return flagged, caught
