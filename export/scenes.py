"""An object detector's graph, and the gate that it ships through: it must find what torch finds.

At batch 1, 2 and 32, on clean, attacked and near-threshold pictures, each box must have its like
among the other's, and decisions must be equal wherever a picture is clear of the threshold.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rampart.export.gradients import unrolled
from rampart.export.parity import near_threshold
from rampart.export.shipped import BATCHES, SceneParity
from rampart.export.to_onnx import cast_first, export
from rampart.handlers.engine import Runs, SceneOutputs, run_in_pieces
from rampart.handlers.scenes import MAX_BOXES, distinct, overlaps
from rampart.handlers.verdict import Calibration, combine
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat, pgd10
from rampart.hardening.model.calibrate import threshold
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.objects.defended import DefendedDetector

ABOVE = 0.05  # confidence of the boxes that are compared; endpoints show far fewer
MIN_IOU = 0.99
MAX_CONFIDENCE_GAP = 0.01
MAX_SCORE_GAP = 0.01  # of combined scores, as a share of their size


class Shown(NamedTuple):
    """The boxes of one picture, the most confident first."""

    boxes: NDArray[np.float32]  # (B, 4)
    confidences: NDArray[np.float32]  # (B,)
    labels: NDArray[np.int64]  # (B,)

    def sure(self, least: float) -> int:
        """How many have more than `least` confidence."""
        return int((self.confidences > least).sum())


class Gaps(NamedTuple):
    """How two answers to the same pictures differ."""

    boxes: int  # compared
    unmatched: int
    iou: float  # the smallest, of boxes that match
    confidence: float  # the largest difference, of boxes that match


def to_onnx(pipeline: DefendedDetector, path: Path) -> Path:
    """Write `pipeline` for any batch of uint8 (N, S, S, 3); RuntimeError if the batch is fixed."""
    side = pipeline.image_size
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    module = unrolled(pipeline, example) if pipeline.detectors.probes else pipeline
    export(module, {"image": example}, SceneOutputs._fields, path)
    cast_first(path)
    return path


def shown(outputs: SceneOutputs, overlap: float) -> list[Shown]:
    """The boxes of each picture."""
    rows = zip(*outputs[:3], strict=True)
    kept = [(row, distinct(*row, above=ABOVE, overlap=overlap)) for row in rows]
    return [Shown(*(part[rows] for part in row)) for row, rows in kept]


def compared(one: Shown, other: Shown) -> Gaps:
    """The boxes of one answer, each beside the most alike of its class in the other.

    Those that rounding may have brought across the threshold, or beyond MAX_BOXES, do not count.
    """
    least = ABOVE + MAX_CONFIDENCE_GAP
    full = [side.confidences[-1] for side in (one, other) if len(side.labels) == MAX_BOXES]
    count = one.sure(max(least, *(last + MAX_CONFIDENCE_GAP for last in full), 0.0))
    if not count or not len(other.labels):
        return Gaps(count, count, 1.0, 0.0)
    iou = np.where(
        one.labels[:count, None] == other.labels, overlaps(one.boxes[:count], other.boxes), 0
    )
    best = iou.argmax(1)
    overlap = iou.max(1)
    gaps = np.abs(one.confidences[:count] - other.confidences[best])
    alike = (overlap >= MIN_IOU) & (gaps <= MAX_CONFIDENCE_GAP)
    smallest, largest = overlap[alike].min(initial=1), gaps[alike].max(initial=0)
    return Gaps(count, int((~alike).sum()), float(smallest), float(largest))


def together(one: list[Shown], other: list[Shown]) -> Gaps:
    """The differences over all pictures, in both directions."""
    pairs = [*zip(one, other, strict=True), *zip(other, one, strict=True)]
    boxes, unmatched, iou, confidence = zip(*(compared(*pair) for pair in pairs), strict=True)
    return Gaps(sum(boxes), sum(unmatched), min(iou), max(confidence))


def samples(
    pipeline: DefendedDetector, calibration: Calibration, image: Tensor, *, rate: float
) -> Tensor:
    """Clean, attacked and near-threshold variations (3 N, S, S, 3) of image uint8 (N, S, S, 3).

    The attack makes objects vanish.
    """
    x = to_float(image)

    def vanish(x: Tensor) -> Tensor:
        return -pipeline.defend(x).confidences.sum(1)

    attacked = pgd10(vanish, x, Threat(), noise=Noise(torch.arange(len(x))))
    near = near_threshold(pipeline, calibration, x, rate=rate)
    return torch.cat([image, to_uint8(attacked), to_uint8(near)])


def compare(
    pipeline: DefendedDetector,
    engine: Runs[SceneOutputs],
    calibration: Calibration,
    image: Tensor,
    *,
    rate: float = 0.01,
) -> SceneParity:
    """Run variations of `image` uint8 (N, S, S, 3) through both; RuntimeError if the gate fails."""
    image = samples(pipeline, calibration, image, rate=rate)
    with torch.no_grad():
        pieces = [pipeline(part) for part in torch.split(image, max(BATCHES))]
    own = SceneOutputs(*(torch.cat(parts).numpy() for parts in zip(*pieces, strict=True)))
    runs = [run_in_pieces(engine.run, image.numpy(), size, SceneOutputs) for size in BATCHES]
    boxes = shown(own, pipeline.overlap)
    gaps = [together(boxes, shown(run, pipeline.overlap)) for run in runs]
    suspicion = combine(own.scores, calibration)  # scores have units of their own
    others = [combine(run.scores, calibration) for run in runs]
    size = 1 + np.abs(suspicion)
    score_gap = float(np.max([np.abs(suspicion - other) / size for other in others]))
    limit = threshold(calibration, rate)
    clear = np.abs(suspicion - limit) > MAX_SCORE_GAP * size
    decisions = [clear & ((suspicion > limit) != (other > limit)) for other in others]
    worst = SceneParity(
        len(image),
        gaps[0].boxes,
        min(gap.iou for gap in gaps),
        max(gap.confidence for gap in gaps),
        score_gap,
        max(gap.unmatched for gap in gaps),
        max(int(differ.sum()) for differ in decisions),
    )
    close = score_gap <= MAX_SCORE_GAP and all(np.isfinite(p).all() for run in runs for p in run)
    if worst.unmatched or worst.decisions_differ or not close:
        raise RuntimeError(f"the exported graph finds other objects: {worst}")
    return worst
