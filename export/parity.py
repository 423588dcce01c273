"""The gates: an exported graph ships only if it decides as the torch pipeline does.

Compared at batch 1, 2 and 32, on clean, attacked and near-threshold images: labels are equal;
decisions are equal wherever the p-value is farther from the threshold than ten times the largest
score difference seen.

A graph in fp16 or int8 cannot pass that gate. Its own one asks, on clean images, for labels and
accuracy close to those of the fp32 graph, and for the promised rate of false alarms.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlers.engine import Engine, Runs
from handlers.verdict import Calibration, p_values
from hardening.attacks import Threat, pgd10
from hardening.calibrate import detection_margin
from hardening.data import Images, to_float, to_uint8
from hardening.metrics import wilson
from hardening.noise import Noise
from hardening.objectives import as_loss, look_at, mislead, untargeted
from hardening.pipeline import DefendedClassifier

BATCHES = (1, 2, 32)
# Least share of equal labels and most accuracy lost, on validation images.
GATES = {"fp16": (0.995, 0.005), "int8": (0.98, 0.01)}
LEAST_CLOSE = 0.9  # of the labels of such a graph, on any images


class Parity(NamedTuple):
    """Largest differences between torch and the graph, and how many images were compared."""

    images: int
    logits: float
    scores: float
    labels_differ: int
    decisions_differ: int

    def __str__(self) -> str:
        return (
            f"parity on {self.images} images at batch {', '.join(map(str, BATCHES))}:"
            f" logits differ by at most {self.logits:.2g}, scores by {self.scores:.2g};"
            f" labels differ on {self.labels_differ}, decisions on {self.decisions_differ}"
        )


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
        out = pipeline(image)
    logits, scores = out.logits.numpy(), out.scores.numpy()
    p = p_values(scores.astype(np.float64), calibration)
    worst = Parity(len(image), 0.0, 0.0, 0, 0)
    ran = [run_in_batches(engine, image.numpy(), size) for size in BATCHES]
    score_gap = max(float(np.abs(s - scores).max()) for _, s in ran)
    for graph_logits, graph_scores in ran:
        graph_p = p_values(graph_scores.astype(np.float64), calibration)
        clear = np.abs(p - rate) > 10 * score_gap
        differ = clear & ((p < rate) != (graph_p < rate))
        labels = graph_logits.argmax(1) != logits.argmax(1)
        worst = Parity(
            len(image),
            max(worst.logits, float(np.abs(graph_logits - logits).max())),
            score_gap,
            max(worst.labels_differ, int(labels.sum())),
            max(worst.decisions_differ, int(differ.sum())),
        )
    # With NaN scores, or a gap that leaves no image clear of the rate, decisions prove nothing. At
    # rate 0 nothing is ever flagged, but scores are still shown: hold them to the usual rate.
    vacuous = not 10 * score_gap < (rate or 0.01) / 2
    if worst.labels_differ or worst.decisions_differ or vacuous:
        raise RuntimeError(f"the exported graph decides differently: {worst}")
    return worst


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


def check_close(fp32: Runs, lower: Runs, image: Tensor) -> str:
    """Raise RuntimeError where a graph is plainly not made from the fp32 one; says what was seen.

    For when it is built again: what it costs was measured when it was made, on validation images.
    """
    ran = [engine.run(image.numpy()) for engine in (fp32, lower)]
    if not all(np.isfinite(out).all() for out in (ran[1].logits, ran[1].scores)):
        raise RuntimeError(
            "the graph in lower precision gives logits or scores that are no numbers"
        )
    same = float((ran[0].logits.argmax(1) == ran[1].logits.argmax(1)).mean())
    seen = f"has the labels of the fp32 one on {same:.0%} of {len(image)} images"
    if same < LEAST_CLOSE:
        raise RuntimeError(f"the graph in lower precision only {seen}: `rampart quantize` anew")
    return seen


def run_in_batches(
    engine: Runs, image: NDArray[np.uint8], size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (N, K) and scores (N, D) of image (N, H, W, 3), `size` images a run."""
    parts = [engine.run(image[i : i + size]) for i in range(0, len(image), size)]
    return (
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.scores for part in parts]),
    )
