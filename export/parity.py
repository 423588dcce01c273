"""The gates: an exported graph ships only if it decides as the torch pipeline does.

At batch 1, 2 and 32, on clean, attacked and near-threshold images, labels must be equal, and
decisions wherever the p-value is clear of the threshold. A graph in fp16 or int8 needs labels and
accuracy close to those of the fp32 graph, and no more false alarms than promised, or than in fp32.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rampart.export.shipped import BATCHES, Parity
from rampart.handlers.engine import Outputs, Runner, run_in_pieces
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import as_loss, look_at, mislead, untargeted
from rampart.hardening.attack.pgd import Threat, pgd10
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.calibrate import Scored, detection_margin
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float, to_uint8

# Least share of equal labels and most accuracy lost, on validation images.
GATES = {"fp16": (0.995, 0.005), "int8": (0.98, 0.01)}
MIN_EQUAL = 0.9  # share of equal labels on any images
MAX_P_VALUE_GAP = 0.05  # median, to those of the fp32 graph, each by its own calibration
MAX_LOGIT_GAP = 0.01  # as a share of their range
MAX_PIXEL_GAP = 1  # levels: purified pixels are rounded


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


def near_threshold(pipeline: Scored, calibration: Calibration, x: Tensor, *, rate: float) -> Tensor:
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
    engine: Runner,
    calibration: Calibration,
    image: Tensor,
    *,
    rate: float = 0.01,
) -> Parity:
    """Run variations of `image` uint8 (N, H, W, 3) through both; RuntimeError if the gate fails."""
    image = samples(pipeline, calibration, image, rate=rate)
    with torch.no_grad():
        own = Outputs(*(output.numpy() for output in pipeline(image)))
    runs = [run_in_pieces(engine.run, image.numpy(), size, Outputs) for size in BATCHES]
    # By output, over all runs; NaN where any is, which `max` would pass over.
    gaps = np.max([largest_gaps(own, run) for run in runs], axis=0)
    logit_gap, score_gap, pixel_gap = gaps[:2].max(), gaps[2], gaps[3]
    # P-values are ranks: of scores in logits, as of consistency, the share of their range counts.
    spread = np.maximum(1, np.ptp(own.scores, axis=0))  # (D,)
    doubt = 10 * np.max([np.abs(own.scores - run.scores) / spread for run in runs])
    p = p_values(own.scores, calibration)
    clear = np.abs(p - rate) > doubt
    decisions = [clear & ((p < rate) != (p_values(run.scores, calibration) < rate)) for run in runs]
    labels = max(int((own.logits.argmax(1) != run.logits.argmax(1)).sum()) for run in runs)
    differing = (labels, max(int(differ.sum()) for differ in decisions))
    worst = Parity(len(image), float(logit_gap), float(score_gap), int(pixel_gap), *differing)
    # With NaN scores, or a gap that leaves no image clear of the rate, decisions prove nothing. At
    # rate 0 nothing is ever flagged, but scores are still shown: hold them to the usual rate.
    vacuous = not doubt < (rate or 0.01) / 2
    close = logit_gap <= MAX_LOGIT_GAP * np.ptp(own.logits) and pixel_gap <= MAX_PIXEL_GAP
    if worst.labels_differ or worst.decisions_differ or vacuous or not close:
        raise RuntimeError(f"the exported graph decides differently: {worst}")
    return worst


def largest_gaps(one: Outputs, other: Outputs) -> list[float]:
    """The largest difference of each output; NaN where either has one."""
    pairs = zip(map(np.asarray, one), map(np.asarray, other), strict=True)
    return [float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs]


class Agreement(NamedTuple):
    """How a graph in fp16 or int8 compares with the fp32 one on clean images; shares of them."""

    precision: str
    images: int
    equal: float  # labels
    accuracy: tuple[float, float]  # in fp32 and in this precision
    flagged: tuple[float, float]  # in fp32 and in this precision
    rate: float  # of false alarms, as promised
    differ: tuple[int, ...]  # images whose labels differ

    @property
    def unranked(self) -> int:
        """Of how many images `flagged` are shares: of all, since none of them rank anything."""
        return self.images

    @property
    def holds(self) -> bool:
        """Whether the graph may ship.

        What it flags may exceed the promise, or what fp32 flags of the same images where these are
        unlike the calibration's, by no more than chance.
        """
        min_equal, max_loss = GATES[self.precision]
        loss = self.accuracy[0] - self.accuracy[1]
        low, _ = wilson(self.flagged[1], self.images)
        allowed = max(self.rate, self.flagged[0])
        return self.equal >= min_equal and loss <= max_loss and low <= allowed

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.differ[:20])) + (" ..." if len(self.differ) > 20 else "")
        return (
            f"{self.precision} against fp32 on {self.images} images: {self.equal:.2%} of labels"
            f" equal (they differ on images {listed or 'none'}), accuracy {self.accuracy[1]:.2%}"
            f" against {self.accuracy[0]:.2%}, {self.flagged[1]:.2%} flagged against"
            f" {self.flagged[0]:.2%} (promised: {self.rate:.2%})"
        )


def agree(
    fp32: tuple[Runner, Calibration],
    lower: tuple[Runner, Calibration],
    images: Images,
    *,
    precision: str,
    rate: float,
) -> Agreement:
    """Put clean labelled `images` through both graphs, each judged by its own calibration."""
    image, label = images.image.numpy(), images.label.numpy()
    before, after = (engine.run(image) for engine, _ in (fp32, lower))
    guess, new_guess = before.logits.argmax(1), after.logits.argmax(1)
    p = [p_values(before.scores, fp32[1]), p_values(after.scores, lower[1])]
    equal, differ = float((guess == new_guess).mean()), np.flatnonzero(guess != new_guess)
    accuracy = (float((guess == label).mean()), float((new_guess == label).mean()))
    flags = (float((p[0] < rate).mean()), float((p[1] < rate).mean()))
    return Agreement(precision, len(image), equal, accuracy, flags, rate, tuple(differ.tolist()))


def check_close(
    fp32: tuple[Runner, Calibration], lower: tuple[Runner, Calibration], image: Tensor
) -> str:
    """Compare a rebuilt graph with the `fp32` one, in words; RuntimeError where they differ."""
    before, after = (engine.run(image.numpy()) for engine, _ in (fp32, lower))
    if not (np.isfinite(after.logits).all() and np.isfinite(after.scores).all()):
        raise RuntimeError("the graph in lower precision has logits or scores that are not finite")
    equal = float((before.logits.argmax(1) == after.logits.argmax(1)).mean())
    p_gaps = np.abs(p_values(before.scores, fp32[1]) - p_values(after.scores, lower[1]))
    gap = float(np.median(p_gaps))
    comparison = (
        f"agrees with the fp32 one on {equal:.0%} of the labels of {len(image)} images, and"
        f" p-values differ by {gap:.2g} (median)"
    )
    if equal < MIN_EQUAL or gap > MAX_P_VALUE_GAP:
        raise RuntimeError(
            f"the graph in lower precision only {comparison}: run `rampart quantize` again"
        )
    return comparison
