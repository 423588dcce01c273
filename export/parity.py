"""The gates: an exported graph ships only if it decides as the torch pipeline does.

Compared at batch 1, 2 and 32, on clean, attacked and near-threshold images: labels are equal;
decisions are equal wherever the p-value is farther from the threshold than ten times the largest
score difference seen; logits, those before the purifier too, are close, and purified pixels the
same to a level.

A graph in fp16 or int8 cannot pass that gate. Its own one asks, on clean images, for labels and
accuracy close to those of the fp32 graph, and for the promised rate of false alarms; when it is
built again, for labels and p-values close to that graph's.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rampart.export.shipped import BATCHES, Parity
from rampart.handlers.engine import Engine, Outputs, Runs
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import as_loss, look_at, mislead, untargeted
from rampart.hardening.attack.pgd import Threat, pgd10
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.calibrate import detection_margin
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float, to_uint8

# Least share of equal labels and most accuracy lost, on validation images.
GATES = {"fp16": (0.995, 0.005), "int8": (0.98, 0.01)}
LEAST_CLOSE = 0.9  # of the labels of such a graph, on any images
MOST_APART = 0.05  # its p-values and those of the fp32 one, each by its own calibration: the median
MOST_LOGITS = 0.01  # that logits may differ, of their range
MOST_PIXELS = 1  # levels that purified pixels may differ: they are rounded


def samples(
    pipeline: DefendedClassifier, calibration: Calibration, image: Tensor, *, rate: float
) -> Tensor:
    """Clean, attacked and near-threshold variations (3 N, H, W, 3) of image uint8 (N, H, W, 3)."""
    x = to_float(image)
    with torch.no_grad():
        label = pipeline.defend(x).logits.argmax(1)
    look = look_at(pipeline, calibration, rate)
    objective = mislead(look, untargeted(label), label, handling="penalty")
    attacked = pgd10(as_loss(objective, len(x)), x, Threat(), noise=Noise(torch.arange(len(x))))
    near = near_threshold(pipeline, calibration, x, rate=rate)
    return torch.cat([image, to_uint8(attacked), to_uint8(near)])


def near_threshold(
    pipeline: DefendedClassifier, calibration: Calibration, x: Tensor, *, rate: float
) -> Tensor:
    """Mix noise into x (N, 3, H, W) until each image sits just below the threshold (bisection)."""
    noise = Noise(torch.arange(len(x)), seed=1).uniform(*x.shape[1:])
    low, high = torch.zeros(len(x), 1, 1, 1), torch.ones(len(x), 1, 1, 1)
    for _ in range(10):
        middle = (low + high) / 2
        with torch.no_grad():
            scores = pipeline.defend(x.lerp(noise, middle)).scores
        over = (detection_margin(scores, calibration, rate) > 0).view(-1, 1, 1, 1)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return x.lerp(noise, low)


def compare(
    pipeline: DefendedClassifier,
    engine: Runs,
    calibration: Calibration,
    image: Tensor,
    *,
    rate: float = 0.01,
) -> Parity:
    """Run `image` uint8 (N, H, W, 3) and what is made from it through both.

    Raises RuntimeError with the differences where the gate fails.
    """
    image = samples(pipeline, calibration, image, rate=rate)
    with torch.no_grad():
        own = Outputs(*(output.numpy() for output in pipeline(image)))
    ran = [run_in_batches(engine, image.numpy(), size) for size in BATCHES]
    score_gap = largest(apart(own.scores, out.scores) for out in ran)
    p = p_values(own.scores, calibration)
    clear = np.abs(p - rate) > 10 * score_gap
    decided = [clear & ((p < rate) != (p_values(out.scores, calibration) < rate)) for out in ran]
    worst = Parity(
        len(image),
        largest(gap for out in ran for gap in logit_gaps(own, out)),
        score_gap,
        int(largest(apart(own.purified, out.purified) for out in ran)),
        max(int((own.logits.argmax(1) != out.logits.argmax(1)).sum()) for out in ran),
        max(int(differ.sum()) for differ in decided),
    )
    # With NaN scores, or a gap that leaves no image clear of the rate, decisions prove nothing. At
    # rate 0 nothing is ever flagged, but scores are still shown: hold them to the usual rate.
    vacuous = not 10 * score_gap < (rate or 0.01) / 2
    shown = worst.logits <= MOST_LOGITS * float(np.ptp(own.logits)) and worst.pixels <= MOST_PIXELS
    if worst.labels_differ or worst.decisions_differ or vacuous or not shown:
        raise RuntimeError(f"the exported graph decides differently: {worst}")
    return worst


def largest(gaps: Iterable[float]) -> float:
    """The largest, NaN where there is one, which `max` would pass over."""
    return float(np.max([*gaps]))


def logit_gaps(own: Outputs, out: Outputs) -> tuple[float, float]:
    """How far logits are apart, those before the purifier second."""
    return apart(own.logits, out.logits), apart(own.raw_logits, out.raw_logits)


def apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference between two arrays of one shape; NaN where either has one."""
    return float(np.abs(one.astype(np.float64) - other).max())


class Agreement(NamedTuple):
    """How a graph in fp16 or int8 stands beside the fp32 one on N clean images; shares of N."""

    precision: str
    images: int
    same: float
    accuracy: tuple[float, float]  # in fp32 and in this precision
    flagged: float
    rate: float  # of false alarms, as promised
    differ: tuple[int, ...]  # the images whose label differs

    @property
    def holds(self) -> bool:
        """Whether the graph may ship; the rate may exceed its promise by no more than chance."""
        least, most_lost = GATES[self.precision]
        lost = self.accuracy[0] - self.accuracy[1]
        kept = wilson(self.flagged, self.images)[0] <= self.rate
        return self.same >= least and lost <= most_lost and kept

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.differ[:20])) + (" ..." if len(self.differ) > 20 else "")
        return (
            f"{self.precision} beside fp32 on {self.images} images: {self.same:.2%} of labels equal"
            f" (they differ on images {listed or 'none'}), accuracy {self.accuracy[1]:.2%} beside"
            f" {self.accuracy[0]:.2%}, {self.flagged:.2%} flagged where {self.rate:.2%} is promised"
        )


def agree(
    fp32: Engine,
    lower: Engine,
    calibration: Calibration,
    images: Images,
    *,
    precision: str,
    rate: float,
) -> Agreement:
    """Put clean labelled `images` through both graphs; `calibration` is that of the `lower` one."""
    image, label = images.image.numpy(), images.label.numpy()
    before, after = (engine.run(image) for engine in (fp32, lower))
    guesses = [out.logits.argmax(1) for out in (before, after)]
    flagged = p_values(after.scores.astype(np.float64), calibration) < rate
    shares = [float((guess == label).mean()) for guess in guesses]
    differ = guesses[0] != guesses[1]
    return Agreement(
        precision,
        len(image),
        1 - float(differ.mean()),
        (shares[0], shares[1]),
        float(flagged.mean()),
        rate,
        tuple(np.flatnonzero(differ).tolist()),
    )


def check_close(
    before: tuple[Runs, Calibration], lower: tuple[Runs, Calibration], image: Tensor
) -> str:
    """Raise RuntimeError where a graph is plainly not made from the one `before`; says what was
    seen. Each comes with its own calibration.

    For when it is built again: what it costs was measured when it was made, on validation images.
    """
    ran = [engine.run(image.numpy()) for engine, _ in (before, lower)]
    if not all(np.isfinite(out).all() for out in (ran[1].logits, ran[1].scores)):
        raise RuntimeError(
            "the graph in lower precision gives logits or scores that are no numbers"
        )
    same = float((ran[0].logits.argmax(1) == ran[1].logits.argmax(1)).mean())
    p = [p_values(out.scores, known) for out, (_, known) in zip(ran, (before, lower), strict=True)]
    gap = float(np.median(np.abs(p[0] - p[1])))
    seen = (
        f"has the labels of the fp32 one on {same:.0%} of {len(image)} images, and p-values that"
        f" are {gap:.2g} from its (median)"
    )
    if same < LEAST_CLOSE or gap > MOST_APART:
        raise RuntimeError(f"the graph in lower precision only {seen}: `rampart quantize` anew")
    return seen


def run_in_batches(engine: Runs, image: NDArray[np.uint8], size: int) -> Outputs:
    """What the graph says of image (N, H, W, 3), `size` images a run."""
    parts = [engine.run(image[i : i + size]) for i in range(0, len(image), size)]
    return Outputs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
