"""Scores of suspicion from what an object detector says of a whole picture; higher is more
suspicious. They compare anchors before any suppression, so they have one size and gradients.

Sources: energy, Liu et al. 2020; squeezed views, Xu et al. 2018 (section 3); reconstruction, Meng
and Chen 2017; aims of attacks on object detectors, Chow et al. 2020 ("TOG": vanish, fabricate,
mislabel).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.hardening.model.detectors import rms
from rampart.hardening.objects.boxes import Candidates, Dense

TINY = 1e-6


class Sight(NamedTuple):
    """A batch as the detectors of attacks see it."""

    dense: Dense  # of each picture; behind a purifier, of what that makes of it
    candidates: Candidates
    smoothed: Candidates | None = None  # of its median
    raw: Candidates | None = None  # of it as sent, where there is a purifier
    change: Tensor | None = None  # (N, 3, S, S) that the purifier makes
    probed: Candidates | None = None  # after a small step towards objects


def emptiness(sight: Sight) -> Tensor:
    """How little looks like an object (N,), free energy of the odds against background: an attack
    that makes objects vanish raises it.
    """
    logits = sight.dense.logits  # (N, A, K + 1)
    return -(logits[:, :, 1:] - logits[:, :, :1]).flatten(1).logsumexp(1)


def crowd(sight: Sight) -> Tensor:
    """How many candidates pass for objects (N,): an attack that fabricates some raises it."""
    return sight.candidates.scores.sum(1)


def doubt(sight: Sight) -> Tensor:
    """How far what looks like an object is of no class alone (N,) in [0, 1]: an attack that changes
    labels raises it.
    """
    shares = sight.dense.logits.softmax(2)[:, :, 1:]  # (N, A, K)
    objects = shares.sum(2)
    doubtful = objects - shares.amax(2)
    return doubtful.sum(1) / (objects.sum(1) + TINY)


def disagreement(sight: Sight) -> Tensor:
    """How much a median filter changes the strongest scores of each class (N,), as a share of
    their sum. They are sorted, so it does not matter which anchor gave them.
    """
    assert sight.smoothed is not None
    return apart(sight.raw or sight.candidates, sight.smoothed)


def purification(sight: Sight) -> Tensor:
    """How much the purifier changes the picture (N,), root mean square."""
    assert sight.change is not None
    return rms(sight.change)


def purified(sight: Sight) -> Tensor:
    """How much the purifier changes the strongest scores of each class (N,), as a share of their
    sum.
    """
    assert sight.raw is not None
    return apart(sight.raw, sight.candidates)


def apart(one: Candidates, other: Candidates) -> Tensor:
    """How much the sorted scores of two views differ (N,), as a share of their sum."""
    before, after = one.scores, other.scores  # (N, C)
    return (before - after).abs().sum(1) / ((before + after).sum(1) + TINY)


def consistency(sight: Sight) -> Tensor:
    """How much the strongest scores rise by a small step towards objects (N,), as a share of their
    sum: where an attack made some vanish they come back, and where it made some, more appear.
    """
    assert sight.probed is not None
    before, after = sight.candidates.scores, sight.probed.scores  # (N, C)
    return (after - before).sum(1) / (before.sum(1) + TINY)


SUSPICIONS: dict[str, Callable[[Sight], Tensor]] = {
    "emptiness": emptiness,
    "crowd": crowd,
    "doubt": doubt,
    "disagreement": disagreement,
    "purification": purification,
    "purified": purified,
    "consistency": consistency,
}
SMOOTHED = frozenset({"disagreement"})  # need a second pass
PROBED = frozenset({"consistency"})  # need a gradient and another pass
LEAN = ("emptiness", "crowd", "doubt")
FULL = (*LEAN, "disagreement")
PURIFIED = ("purification", "purified")  # need a purifier: `full` has them where there is one
GUARDED = (*LEAN, "consistency")


class Suspicions:
    """The named scores, in order. Raises ValueError for an unknown one."""

    def __init__(self, names: tuple[str, ...]) -> None:
        if unknown := sorted(set(names) - set(SUSPICIONS)):
            raise ValueError(f"unknown detectors {unknown}: choose among {', '.join(SUSPICIONS)}")
        self.names, self.smooths = names, bool(SMOOTHED & {*names})
        self.purifies = bool({*PURIFIED} & {*names})
        self.probes = bool(PROBED & {*names})

    def __call__(self, sight: Sight) -> Tensor:
        """Scores (N, D)."""
        return torch.stack([SUSPICIONS[name](sight) for name in self.names], dim=1)
