"""Scores of suspicion from what an object detector says of a whole picture; higher is more
suspicious. They compare anchors before any suppression, so they have one size and gradients.

Sources: energy, Liu et al. 2020; squeezed views, Xu et al. 2018 (section 3); aims of attacks on
object detectors, Chow et al. 2020 ("TOG": vanish, fabricate, mislabel).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.hardening.objects.boxes import Candidates, Dense

TINY = 1e-6


class Sight(NamedTuple):
    """A batch as the detectors of attacks see it."""

    dense: Dense  # of each picture
    candidates: Candidates
    smoothed: Candidates | None = None  # of its median
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
    before, after = sight.candidates.scores, sight.smoothed.scores  # (N, C)
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
    "consistency": consistency,
}
SMOOTHED = frozenset({"disagreement"})  # need a second pass
PROBED = frozenset({"consistency"})  # need a gradient and another pass
LEAN = ("emptiness", "crowd", "doubt")
FULL = (*LEAN, "disagreement")
GUARDED = (*LEAN, "consistency")


class Suspicions:
    """The named scores, in order. Raises ValueError for an unknown one."""

    def __init__(self, names: tuple[str, ...]) -> None:
        if unknown := sorted(set(names) - set(SUSPICIONS)):
            raise ValueError(f"unknown detectors {unknown}: choose among {', '.join(SUSPICIONS)}")
        self.names, self.smooths = names, bool(SMOOTHED & {*names})
        self.probes = bool(PROBED & {*names})

    def __call__(self, sight: Sight) -> Tensor:
        """Scores (N, D)."""
        return torch.stack([SUSPICIONS[name](sight) for name in self.names], dim=1)
