"""An object detector with the scores that tell attacks: one function of pixels, as of classifiers.

Its variants are `lean`, of one pass, `full`, which looks at a smoothed view as well, and `guarded`,
which looks again after a small step towards objects.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rampart.hardening.model import checkpoint
from rampart.hardening.model.detectors import median3x3
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects import suspicions
from rampart.hardening.objects.boxes import Dense, strongest
from rampart.hardening.objects.detector import (
    TASK,
    TOP,
    ObjectConfig,
    ObjectDetector,
    described,
)
from rampart.hardening.objects.step import step_towards
from rampart.hardening.objects.suspicions import Sight, Suspicions

VARIANTS: dict[Variant, tuple[str, ...]] = {
    "full": suspicions.FULL,
    "lean": suspicions.LEAN,
    "guarded": suspicions.GUARDED,
}
RADIUS = 2 / 255  # of the step of `guarded`, where a file of weights names none


class SceneOutputs(NamedTuple):
    """What the pipeline says of a batch: C candidates of each picture, and D scores."""

    boxes: Tensor  # (N, C, 4) x1, y1, x2, y2 in pixels of the model's input
    confidences: Tensor  # (N, C) in [0, 1]
    labels: Tensor  # (N, C) int64
    scores: Tensor  # (N, D)


class DefendedDetector(nn.Module):
    """Object detector and detectors of attacks as one module without branches or randomness."""

    def __init__(
        self, detector: ObjectDetector, names: tuple[str, ...], *, radius: float = RADIUS
    ) -> None:
        super().__init__()
        self.detector, self.detectors, self.radius = detector, Suspicions(names), radius

    @property
    def image_size(self) -> int:
        """Pixels a side of the square that it takes."""
        return self.detector.config.size

    @property
    def overlap(self) -> float:
        """Intersection over union above which the weaker of two boxes is the same object."""
        return self.detector.net.iou

    def defend(self, x: Tensor) -> SceneOutputs:
        """The float entry, for attacks: x (N, 3, S, S) in [0, 1]."""
        n = x.shape[0]
        views = torch.cat([x, median3x3(x)]) if self.detectors.smooths else x
        every = self.detector.dense(views)
        # Slices keep the exported batch dynamic; chunk() would freeze it.
        dense = Dense(every.boxes[:n], every.logits[:n]) if self.detectors.smooths else every
        sight = Sight(dense, strongest(dense, TOP))
        if self.detectors.smooths:
            smoothed = Dense(every.boxes[n:], every.logits[n:])
            sight = sight._replace(smoothed=strongest(smoothed, TOP))
        if self.detectors.probes:
            near = step_towards(self.detector, x, self.radius)
            sight = sight._replace(probed=strongest(self.detector.dense(near), TOP))
        return SceneOutputs(*sight.candidates, self.detectors(sight))

    def forward(self, image: Tensor) -> SceneOutputs:
        """The entry that is exported: image uint8 (N, S, S, 3)."""
        return self.defend(to_float(image))


def save(path: Path, detector: ObjectDetector, *, radius: float = RADIUS) -> None:
    """Write all it takes to rebuild any variant: a file of weights with the variants' parts."""
    named: dict[str, Any] = {"variants": {name: list(parts) for name, parts in VARIANTS.items()}}
    named |= {"radius": radius}
    checkpoint.save(path, detector, described(detector) | named)


def load(path: Path, variant: Variant = "full") -> tuple[DefendedDetector, tuple[str, ...]]:
    """The frozen pipeline of `path`, and its classes. ValueError for what is no object detector."""
    config, state = checkpoint.read(path)
    if config.get("task") != TASK:
        raise ValueError(f"{path} holds no object detector: pass a folder of one")
    detector = ObjectDetector(ObjectConfig.from_json(config["object_detector"]))
    detector.load_state_dict(state)
    names = tuple(config.get("variants", {}).get(variant, VARIANTS[variant]))
    pipeline = DefendedDetector(detector, names, radius=config.get("radius", RADIUS))
    return pipeline.eval().requires_grad_(False), detector.config.classes
