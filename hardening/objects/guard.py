"""What flags pictures beside an object detector, as an attacker sees it and as it is served."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.model.calibrate import detection_margin, scores_of
from rampart.hardening.objects.defended import DefendedDetector


class Guard(NamedTuple):
    """A picture is flagged where its p-value is below `rate`."""

    pipeline: DefendedDetector
    calibration: Calibration
    rate: float

    def digest(self) -> str:
        """What it depends on beside the weights."""
        table = self.calibration
        parts = (table.knots, table.surprise, table.combined)
        every = b"".join(part.tobytes() for part in parts)
        named = f"{table.detectors} {self.rate} {self.pipeline.radius}"
        return hashlib.sha256(named.encode() + every).hexdigest()[:16]

    def margin(self, x: Tensor) -> Tensor:
        """How far (N,) each of x (N, 3, S, S) is above the threshold: differentiable."""
        return detection_margin(self.pipeline.defend(x).scores, self.calibration, self.rate)

    def flags(self, image: Tensor) -> Tensor:
        """Which of uint8 (N, S, S, 3) are flagged, as bool (N,)."""
        where = self.pipeline.detector.mean.device
        scores = scores_of(self.pipeline, image.to(where))
        return torch.from_numpy(p_values(scores, self.calibration) < self.rate)
