"""Candidates of an object detector to boxes, and boxes to the verdict on a picture.

Non-maximum suppression is done here and not in the graph, so that `min_confidence` stays the
operator's choice.
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
    corners, classes = boxes[waiting], labels[waiting]
    areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    rows, kept = np.arange(len(waiting)), list[int]()
    while len(rows) and len(kept) < MAX_BOXES:
        first, rest = rows[0], rows[1:]
        kept.append(first)
        low = np.maximum(corners[first, :2], corners[rest, :2])
        high = np.minimum(corners[first, 2:], corners[rest, 2:])
        shared = (high - low).clip(0).prod(axis=1)
        iou = shared / np.maximum(areas[first] + areas[rest] - shared, 1e-12)
        rows = rest[(iou <= overlap) | (classes[rest] != classes[first])]
    return waiting[kept]
