"""From scores to p-values: quantile tables on tuning images, split conformal on calibration images.

Each score becomes a surprise, -log of the share of clean tuning images at least as suspicious;
surprises add up (Fisher 1932). The sum is ranked among those of calibration images, so that P(p <
alpha | clean) <= alpha (split conformal: Vovk et al. 2005; Bates et al. 2023).
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rampart.handlers.engine import Outputs as Arrays
from rampart.handlers.engine import Runs, SceneOutputs
from rampart.handlers.verdict import Calibration, combine, p_values
from rampart.hardening.model.arrays import Floats
from rampart.hardening.model.files import Precision as Precision
from rampart.hardening.model.files import calibration_file as calibration_file
from rampart.hardening.model.files import load_variant as load_variant
from rampart.hardening.model.files import write_whole
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import Outputs, Variant
from rampart.hardening.model.promise import PromiseCheck, check_enough

KNOTS = 33
TOGETHER = 2**18  # pixels of the images that are scored together, at most
Runner = Runs[Arrays] | Runs[SceneOutputs]


class Scores(Protocol):
    """What a pipeline of any task says of a batch."""

    @property
    def scores(self) -> Tensor:
        """Of suspicion (N, D)."""
        ...


class Named(Protocol):
    """Detectors of attacks."""

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of their scores."""
        ...


class Scored(Protocol):
    """A pipeline of any task, as far as suspicion goes."""

    @property
    def detectors(self) -> Named:
        """What its scores are of."""
        ...

    def defend(self, x: Tensor) -> Scores:
        """Of x (N, 3, H, W) in [0, 1]."""
        ...

    def __call__(self, image: Tensor, /) -> Scores:
        """Of uint8 (N, H, W, 3)."""
        ...


def outputs_of(
    run: Callable[[Tensor], Outputs], x: Tensor, size: int = 256
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (N, K) and scores (N, D) that `run` gives x, `size` images at a time."""
    with torch.no_grad():
        every = [run(part) for part in torch.split(x, size)]
    logits, scores = (torch.cat([out[i] for out in every]).cpu().numpy() for i in (0, 2))
    return logits, scores


def scores_of(pipeline: Scored, image: Tensor, engine: Runner | None = None) -> Floats:
    """Scores (N, D) of uint8 images (N, H, W, 3), through the pipeline or an exported graph."""
    if engine:
        return engine.run(image.cpu().numpy()).scores.astype(np.float64)
    count = max(1, TOGETHER // (image.shape[1] * image.shape[2]))
    with torch.no_grad():
        every = [pipeline(part).scores for part in torch.split(image, count)]
    return torch.cat(every).cpu().numpy().astype(np.float64)


def tables(scores: Floats) -> tuple[Floats, Floats]:
    """Quantile knots (D, Q) of tuning scores (N, D), and the surprise (Q,) at each."""
    # Tails from 1 down to 1/N, evenly on the log scale: resolution where decisions fall.
    tail = np.geomspace(1.0, 1.0 / len(scores), KNOTS)
    return np.quantile(scores, 1 - tail, axis=0).T, -np.log(tail)


def calibrate(
    pipeline: Scored, held: Images, variant: Variant, engine: Runner | None = None
) -> Calibration:
    """Tables from the tuning split of `held`, ranks from its calibration split; through its
    `engine` for fp16 or int8. Raises ValueError where `held` is too small for any promise.
    """
    ranked = split(held, "calibration")
    check_enough(len(held), len(ranked))
    knots, surprise = tables(scores_of(pipeline, split(held, "tuning").image, engine))
    unranked = Calibration(pipeline.detectors.names, knots, surprise, np.zeros(1), 1, variant)
    combined = np.sort(combine(scores_of(pipeline, ranked.image, engine), unranked))
    return replace(unranked, combined=combined, images=len(ranked))


def kept(
    pipeline: Scored,
    calibration: Calibration,
    images: Images,
    rate: float,
    engine: Runner | None = None,
) -> PromiseCheck:
    """How the promise of `rate` fares on clean `images` that ranked nothing."""
    scores = scores_of(pipeline, images.image, engine)
    flagged = int((p_values(scores, calibration) < rate).sum())
    return PromiseCheck.on(flagged, len(images), rate=rate, ranked=calibration.images)


def write(folder: Path, calibration: Calibration, data: str, precision: Precision = "fp32") -> Path:
    """Write a variant's calibration into a folder of model_store; `data` names its images."""
    file = calibration_file(folder, calibration.variant, precision)
    content = {"variant": calibration.variant, "detectors": list(calibration.detectors)}
    for name in ("knots", "surprise", "combined"):
        content[name] = getattr(calibration, name).tolist()
    text = json.dumps(content | {"images": calibration.images, "data": data}) + "\n"
    write_whole(file, text)
    return file


def threshold(calibration: Calibration, rate: float) -> float:
    """The combined score above which p < `rate`; infinite where the images are too few for it."""
    n = len(calibration.combined)
    # p = (1 + at_least) / (n + 1) < rate  <=>  at_least < rate * (n + 1) - 1
    most = math.ceil(rate * (n + 1) - 1 - 1e-9) - 1
    return float(calibration.combined[n - 1 - most]) if most >= 0 else math.inf


def combined(scores: Tensor, calibration: Calibration) -> Tensor:
    """The combined score (N,) of scores (N, D), differentiable; `combine` of handlers in torch."""
    knots = torch.as_tensor(calibration.knots, dtype=scores.dtype, device=scores.device)
    knots = knots.contiguous()  # as searchsorted wants them
    surprise = torch.as_tensor(calibration.surprise, dtype=scores.dtype, device=scores.device)
    total, middle = torch.zeros_like(scores[:, 0]), len(surprise) // 2
    for score, knot in zip(scores.unbind(1), knots, strict=True):
        right = torch.searchsorted(knot, score.detach().contiguous(), right=True)
        right = right.clamp(1, len(knot) - 1)
        low, high = knot[right - 1], knot[right]
        share = (score - low) / (high - low).clamp_min(1e-12)
        inside = surprise[right - 1] + share * (surprise[right] - surprise[right - 1])
        slope = (surprise[-1] - surprise[middle]) / (knot[-1] - knot[middle]).clamp_min(1e-6)
        beyond = surprise[-1] + slope * (score - knot[-1])
        total = total + torch.where(score > knot[-1], beyond, inside).clamp_min(0)
    return total


def straight(scores: Tensor, calibration: Calibration, but: str) -> Tensor:
    """How suspicious (N,) all detectors `but` one find scores (N, D), in the units of that one's
    score: by straight lines from the median on. The tables have steps, which lead an attack astray.
    """
    knots = torch.as_tensor(calibration.knots, dtype=scores.dtype, device=scores.device)  # (D, Q)
    middle = knots[:, knots.shape[1] // 2]
    slopes = 1 / (knots[:, -1] - middle).clamp_min(1e-6)
    own = calibration.detectors.index(but)
    lines = torch.relu(scores - middle) * slopes / slopes[own]  # (N, D)
    return lines.sum(1) - lines[:, own]


def detection_margin(scores: Tensor, calibration: Calibration, rate: float) -> Tensor:
    """How far (N,) an image is above the threshold: flagged where positive, differentiable."""
    return combined(scores, calibration) - threshold(calibration, rate)
