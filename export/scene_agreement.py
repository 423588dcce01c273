"""The gate of an object detector's int8 graph: it finds what the float32 one finds.

Average precision may fall by a point, on clean pictures and on those that an attack on the float32
detector left; it may flag no more than is promised, or than in float32.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rampart.export.scenes import Shown, shown
from rampart.handlers.engine import Runs, SceneOutputs
from rampart.handlers.scenes import overlaps
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.images import Images
from rampart.hardening.objects.attack import Budget, attack
from rampart.hardening.objects.boxes import Candidates, Found, suppressed
from rampart.hardening.objects.detector import MOST, ObjectDetector
from rampart.hardening.objects.judge import attacked
from rampart.hardening.objects.precision import precision
from rampart.hardening.objects.scenes import Boxed

MAX_LOSS = 0.01  # of mAP50, clean and attacked
STEPS = 10  # of PGD on the sum of the losses
MIN_EQUAL = 0.9  # share of boxes with their like, on any pictures
ALIKE, OVERLAP = 0.75, 0.5  # intersection over union, of the same box, and for suppression
SURE = 0.25  # confidence of the boxes that are looked for among the other graph's
MAX_P_VALUE_GAP = 0.1  # median, to those of the float32 graph, each by its own calibration

Calibrated = tuple[Runs[SceneOutputs], Calibration]


class SceneAgreement(NamedTuple):
    """How an int8 graph compares with the float32 one; pairs are (float32, int8)."""

    precision: str
    images: int
    map50: tuple[float, float]
    attacked: tuple[float, float]  # mAP50
    flagged: tuple[float, float]  # shares of the clean pictures that rank nothing
    unranked: int  # those pictures
    rate: float  # of false alarms, as promised
    attack: str

    @property
    def holds(self) -> bool:
        """Whether the graph may ship."""
        losses = [one - other for one, other in (self.map50, self.attacked)]
        low, _ = wilson(self.flagged[1], self.unranked)
        return max(losses) <= MAX_LOSS and low <= max(self.rate, self.flagged[0])

    def __str__(self) -> str:
        clean, hurt, flags = (
            f"{after:.1%} against {before:.1%}"
            for before, after in (self.map50, self.attacked, self.flagged)
        )
        return (
            f"{self.precision} against fp32 on {self.images} pictures: mAP50 {clean}, under"
            f" {self.attack} {hurt}; {flags} flagged of {self.unranked} (promised: {self.rate:.2%})"
        )


def agree(
    fp32: Calibrated,
    lower: Calibrated,
    detector: ObjectDetector,
    boxed: Boxed,
    unranked: Images,
    *,
    threat: Threat,
    rate: float,
) -> SceneAgreement:
    """Put pictures with boxes, as they are and attacked, through both graphs.

    `unranked` are clean pictures that neither calibration saw.
    """
    budget = Budget(STEPS, 0)
    craft = partial(attack, detector, threat=threat, how=("pgd", "sum"), budget=budget)
    hurt = attacked(boxed, craft, threat, title="attack")

    def found(image: Tensor, engine: Runs[SceneOutputs]) -> float:
        return average_precision(engine, image, boxed, detector.net.iou)

    def flagged(engine: Runs[SceneOutputs], table: Calibration) -> float:
        scores = engine.run(unranked.image.numpy()).scores
        return float((p_values(scores, table) < rate).mean())

    return SceneAgreement(
        "int8",
        len(boxed),
        (found(boxed.image, fp32[0]), found(boxed.image, lower[0])),
        (found(hurt, fp32[0]), found(hurt, lower[0])),
        (flagged(*fp32), flagged(*lower)),
        len(unranked),
        rate,
        f"PGD-{STEPS} at {threat}",
    )


def average_precision(
    engine: Runs[SceneOutputs], image: Tensor, boxed: Boxed, overlap: float
) -> float:
    """mAP50 of what a graph finds in uint8 (N, S, S, 3)."""
    found = found_by(engine, image, overlap)
    return precision(boxed.truth, found, len(boxed.classes)).map50


def found_by(engine: Runs[SceneOutputs], image: Tensor, overlap: float) -> list[Found]:
    """What a graph finds in uint8 (N, S, S, 3)."""
    outputs = engine.run(image.cpu().numpy())
    candidates = Candidates(*map(torch.from_numpy, outputs[:3]))
    return suppressed(candidates, iou=overlap, most=MOST)


def count_alike(one: Shown, other: Shown) -> tuple[int, int]:
    """(boxes that one graph is sure of, those of them that the other found too)."""
    sure = one.sure(SURE)
    same = one.labels[:sure, None] == other.labels
    near = np.where(same, overlaps(one.boxes[:sure], other.boxes), 0) > ALIKE
    return sure, int(near.any(1).sum())


def check_close(fp32: Calibrated, lower: Calibrated, image: Tensor) -> str:
    """Compare a rebuilt graph with the `fp32` one, in words; RuntimeError where they differ."""
    before, after = (engine.run(image.numpy()) for engine, _ in (fp32, lower))
    if not all(np.isfinite(part).all() for part in after):
        raise RuntimeError("the graph in lower precision has outputs that are not finite")
    pairs = list(zip(shown(before, OVERLAP), shown(after, OVERLAP), strict=True))
    counts = [count_alike(*pair) for one, other in pairs for pair in ((one, other), (other, one))]
    every, alike = (sum(values) for values in zip(*counts, strict=True))
    equal = alike / every if every else 1.0
    p_gaps = np.abs(p_values(before.scores, fp32[1]) - p_values(after.scores, lower[1]))
    gap = float(np.median(p_gaps))
    comparison = (
        f"agrees with the fp32 one on {equal:.0%} of {every} boxes on {len(image)} pictures, and"
        f" p-values differ by {gap:.2g} (median)"
    )
    if equal < MIN_EQUAL or gap > MAX_P_VALUE_GAP:
        raise RuntimeError(
            f"the graph in lower precision only {comparison}: run `rampart quantize` again"
        )
    return comparison
