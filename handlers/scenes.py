"""Candidates of an object detector to boxes, and boxes to the verdict on a picture.

Non-maximum suppression is done here and not in the graph. For 220 candidates on one core it takes
0.9 ms, and ONNX's own operator 0.5 ms of a graph's 12 and more; but that one would give outputs of
no fixed size, and `min_confidence` is the operator's choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.verdict import Calibration, Policy, Suspicion, rounded, shown, suspicions

if TYPE_CHECKING:
    from rampart.handlers.engine import SceneOutputs
    from rampart.handlers.image import View

MAX_BOXES = 100  # of one picture
TOGETHER = 128  # candidates that are compared with each other
TINY = np.float32(1e-12)
MIN_CONFIDENCE, MAX_OVERLAP = 0.5, 0.45  # where a card says nothing else
Boxes = NDArray[np.float32]  # (B, 4), x1, y1, x2, y2


@dataclass(frozen=True)
class SceneVerdict:
    """The answer for one picture of objects; `to_dict` gives its JSON form."""

    boxes: tuple[dict[str, Any], ...]
    decision: str
    model: Mapping[str, str]
    detail: Mapping[str, Any] | None
    # For the operator only, whatever `detail` shows.
    p_value: float
    detected: bool
    failed: bool  # detectors of attacks gave no number

    def rejected(self) -> "SceneVerdict":
        """The same without boxes."""
        return replace(self, boxes=(), decision="reject")

    def to_dict(self) -> dict[str, Any]:
        """The contents for JSON; without `detail` where the policy hides it."""
        return shown(vars(self))


@dataclass(frozen=True)
class SceneJudge:
    """Turns an object detector's outputs into verdicts, by one calibration and one policy.

    Boxes of less than `min_confidence` are left out, and of boxes of one class whose intersection
    over union is above `max_overlap` all but the most confident. Raises ValueError for other than
    shares, and where the calibration cannot tell the policy's false-alarm rate.
    """

    labels: tuple[str, ...]
    calibration: Calibration
    policy: Policy
    model: Mapping[str, str]
    min_confidence: float = MIN_CONFIDENCE
    max_overlap: float = MAX_OVERLAP

    def __post_init__(self) -> None:
        self.calibration.check_rate(self.policy.false_alarm_rate)
        for name in ("min_confidence", "max_overlap"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
                raise ValueError(f"{name} must be a number above 0 and below 1")

    def of(self, outputs: "SceneOutputs", views: "Sequence[View]") -> list[SceneVerdict]:
        """Verdicts on what the graph gave of these views.

        Raises ValueError where shapes do not fit or candidates are not finite.
        """
        boxes, confidences, labels, scores = outputs
        if labels.shape != confidences.shape or boxes.shape != (*labels.shape, 4):
            raise ValueError(f"boxes {boxes.shape} do not fit labels {labels.shape}")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.labels):
            raise ValueError(f"the graph gave labels beyond the {len(self.labels)} that there are")
        if not (np.isfinite(boxes).all() and np.isfinite(confidences).all()):
            raise ValueError("the graph gave candidates that are not finite")
        failed = np.logical_not(np.isfinite(scores).all(axis=1))  # (N,)
        found = suspicions(scores, failed, calibration=self.calibration, policy=self.policy)
        rows = zip(boxes, confidences, labels, views, found, strict=True)
        return [self._verdict(self._boxes(*row), own) for *row, own in rows]

    def _boxes(
        self,
        boxes: Boxes,
        confidences: NDArray[np.float32],
        labels: NDArray[np.int64],
        view: "View",
    ) -> tuple[dict[str, Any], ...]:
        """What is shown of the candidates of one picture, in pixels of the picture as sent."""
        kept = distinct(
            boxes, confidences, labels, above=self.min_confidence, overlap=self.max_overlap
        )
        corners = boxes[kept] if view.frame is None else view.frame.outside(boxes[kept])
        rows = zip(corners.tolist(), confidences[kept].tolist(), labels[kept].tolist(), strict=True)
        return tuple(
            {
                "label": self.labels[index],
                "index": index,
                "confidence": rounded(confidence),
                "box": [round(corner, 2) for corner in box],
            }
            for box, confidence, index in rows
            if box[0] < box[2] and box[1] < box[3]  # not one in the border alone
        )

    def _verdict(self, boxes: tuple[dict[str, Any], ...], found: Suspicion) -> SceneVerdict:
        verdict = SceneVerdict(
            boxes=boxes,
            decision=found.decision,
            model=self.model,
            detail=found.detail if self.policy.detail == "full" else None,
            p_value=found.p_value,
            detected=found.detected,
            failed=found.failed,
        )
        return verdict.rejected() if found.decision == "reject" else verdict


def distinct(
    boxes: Boxes,
    confidences: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    above: float,
    overlap: float,
) -> NDArray[np.intp]:
    """The candidates that remain of (C, 4), (C,), (C,): at most MAX_BOXES, most confident first.

    As torchvision's `batched_nms` of those of more confidence than `above`.
    """
    (likely,) = np.nonzero(confidences > above)
    waiting = likely[np.argsort(-confidences[likely], kind="stable")]
    kept = waiting[:0]

    def hides(one: NDArray[np.intp], other: NDArray[np.intp]) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = labels[one, None] == labels[other]
        return same & (overlaps(boxes[one], boxes[other]) > overlap)

    # By and by: what nearly all of many candidates cover is never compared with all of them.
    for start in range(0, len(waiting), TOGETHER):
        some = waiting[start : start + TOGETHER]
        some = some[~hides(some, kept).any(axis=1)]
        free, hidden = np.ones(len(some), np.bool_), hides(some, some)
        for row in range(len(some)):
            if free[row]:
                free[row + 1 :] &= ~hidden[row, row + 1 :]
        kept = np.concatenate([kept, some[free]])[:MAX_BOXES]
        if len(kept) == MAX_BOXES:
            break
    return kept


def overlaps(boxes: Boxes, others: Boxes) -> NDArray[np.float32]:
    """Intersection over union (A, B) of boxes (A, 4) and (B, 4)."""
    left, top, right, bottom = boxes.T[:, :, None]  # (A, 1) each
    x1, y1, x2, y2 = others.T  # (B,) each
    width = (np.minimum(right, x2) - np.maximum(left, x1)).clip(0)
    height = (np.minimum(bottom, y2) - np.maximum(top, y1)).clip(0)
    shared = width * height
    together = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - shared
    ratio: NDArray[np.float32] = shared / np.maximum(together, TINY)
    return ratio
