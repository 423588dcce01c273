"""What a calibration on so many images can promise, and whether other images keep it.

A rate flags the k most suspicious of n + 1 ranks. On average over calibration sets this is at most
the rate; for one set it is Beta(k, n + 1 - k), and the count among m more images is beta-binomial
(Vovk 2012, section 2).
"""

import math
from typing import Any, NamedTuple

RATES = (0.01, 0.02, 0.05)  # of false alarms: the first that a calibration can rank is promised
FEWEST = 20  # calibration images, for the last of them
RARE = 0.01  # below this probability, what was counted is no chance


def finest_rate(images: int) -> float:
    """The lowest usual false-alarm rate that so many calibration images can tell."""
    return next((rate for rate in RATES if rate > 1 / (images + 1)), RATES[-1])


def least_images(rate: float) -> int:
    """How many calibration images a false-alarm rate needs."""
    return max(FEWEST, math.floor(1 / rate + 1e-9)) if rate else FEWEST


def flagged_ranks(rate: float, images: int) -> int:
    """How many of the images + 1 ranks are flagged at `rate`: those with p < `rate`."""
    return max(0, math.ceil(rate * (images + 1) - 1e-9) - 1)


def spread(rate: float, images: int) -> tuple[float, float]:
    """Middle 95% of the true false-alarm rate of a calibration on so many images."""
    from scipy.stats import beta  # what packs and serves does without

    ranks = flagged_ranks(rate, images)
    if not ranks:
        return 0.0, 0.0
    low, high = beta(ranks, images + 1 - ranks).interval(0.95)
    return float(low), float(high)


def bound(rate: float, images: int) -> float:
    """The true false-alarm rate of a calibration on so many images is below, 95 times in 100."""
    from scipy.stats import beta

    ranks = flagged_ranks(rate, images)
    return float(beta(ranks, images + 1 - ranks).ppf(0.95)) if ranks else 0.0


def in_words(rate: float, images: int) -> str:
    """The promise and its 95% bound."""
    return (
        f"at most {rate:.1%} of clean images flagged on average over calibration sets; for this one"
        f" of {images:,} images up to {bound(rate, images):.1%} with 95% confidence"
    )


def check_enough(held: int, ranked: int) -> None:
    """Raise ValueError where `held` images leave too few to calibrate on: `ranked`."""
    if ranked < FEWEST:
        raise ValueError(
            f"{held} held-out images leave {ranked} to calibrate on: even a false-alarm rate of"
            f" {RATES[-1]:.0%} needs at least {FEWEST}, so hold out {held_for(FEWEST)} or more"
            f" ({held_for(100)} or more for {RATES[0]:.0%})"
        )


def held_for(ranked: int) -> int:
    """How many held-out images leave so many to calibrate on, in a round number above."""
    from rampart.hardening.model.images import PARTS, SPLITS  # what packs has no torch

    first, last = SPLITS["calibration"]
    return 10 * math.ceil(ranked * PARTS / (last - first) / 10)


class PromiseCheck(NamedTuple):
    """How a promise fared on images that ranked nothing."""

    rate: float  # promised
    ranked: int  # calibration images
    flagged: int
    images: int
    interval: tuple[float, float]  # 95%, of the share flagged
    chance: float  # probability of so many or more, where the promise holds

    @classmethod
    def on(cls, flagged: int, images: int, *, rate: float, ranked: int) -> "PromiseCheck":
        """Of so many clean `images` so many are flagged, with a calibration on `ranked` others."""
        from scipy.stats import betabinom, binomtest

        interval = binomtest(flagged, images).proportion_ci(method="wilson")
        ranks, chance = flagged_ranks(rate, ranked), 1.0
        if ranks:
            chance = float(betabinom(images, ranks, ranked + 1 - ranks).sf(flagged - 1))
        bounds = float(interval.low), float(interval.high)
        return cls(rate, ranked, flagged, images, bounds, chance)

    @property
    def broken(self) -> bool:
        """Whether more are flagged than chance explains."""
        return self.chance < RARE

    def in_words(self) -> str:
        """The figures, and where the promise is broken a warning."""
        low, high = self.interval
        text = (
            f"{self.flagged} of {self.images:,} validation images flagged,"
            f" {self.flagged / self.images:.1%} ({low:.1%} to {high:.1%}), where {self.rate:.1%}"
            " is promised"
        )
        if not self.broken:
            return text
        return (
            f"{text}. Warning: if calibration and validation images were alike, this would happen"
            f" once in {min(1e6, 1 / max(self.chance, 1e-9)):,.0f} times. The promise does not hold"
            " for images like these. Check that both come from the same source"
        )

    def row(self) -> dict[str, Any]:
        """As a card lists it."""
        low, high = self.interval
        return {
            "rate": self.rate,
            "calibration_images": self.ranked,
            "bound": round(bound(self.rate, self.ranked), 4),
            "flagged": self.flagged,
            "n": self.images,
            "interval": [round(low, 4), round(high, 4)],
            "chance": round(self.chance, 6),
        }
