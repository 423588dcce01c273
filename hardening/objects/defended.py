"""An object detector with the scores that tell attacks: one function of pixels, as of classifiers.

Its variants are `lean`, of one pass, `guarded`, which looks again after a small step towards
objects, and behind a purifier `full`: its boxes are those of the purified view, and it looks at the
picture as sent and at a smoothed view as well.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rampart.hardening.model import checkpoint, files
from rampart.hardening.model.detectors import median3x3
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects import suspicions
from rampart.hardening.objects.boxes import Dense, strongest
from rampart.hardening.objects.detector import TOP, ObjectDetector, described
from rampart.hardening.objects.detector import load as load_detector
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
        n, purified = x.shape[0], self.detector.purified(x)
        views = [purified]
        views += [x] if self.detectors.purifies else []
        views += [median3x3(x)] if self.detectors.smooths else []
        every = self.detector.raw(torch.cat(views) if len(views) > 1 else purified)
        # Slices keep the exported batch dynamic; chunk() would freeze it. One view needs none.
        rows = [slice(i * n, (i + 1) * n) for i in range(len(views))] if len(views) > 1 else []
        each = [Dense(every.boxes[row], every.logits[row]) for row in rows] or [every]
        sight = Sight(each[0], strongest(each[0], TOP))
        if self.detectors.purifies:
            sight = sight._replace(raw=strongest(each[1], TOP), change=purified - x)
        if self.detectors.smooths:
            sight = sight._replace(smoothed=strongest(each[-1], TOP))
        if self.detectors.probes:
            near = step_towards(self.detector, x, self.radius)
            sight = sight._replace(probed=strongest(self.detector.dense(near), TOP))
        return SceneOutputs(*sight.candidates, self.detectors(sight))

    def forward(self, image: Tensor) -> SceneOutputs:
        """The entry that is exported: image uint8 (N, S, S, 3)."""
        return self.defend(to_float(image))


def variants_of(detector: ObjectDetector) -> dict[Variant, tuple[str, ...]]:
    """The scores of each variant: with a purifier, `full` has those that compare its view too."""
    more = () if detector.purifier is None else suspicions.PURIFIED
    return VARIANTS | {"full": (*VARIANTS["full"], *more)}


def as_variant(
    detector: ObjectDetector, variant: Variant, names: tuple[str, ...], radius: float
) -> DefendedDetector:
    """A frozen copy of what makes a variant, with the scores of these names."""
    own = copy.deepcopy(detector) if variant == "full" else detector.behind(None)
    return DefendedDetector(own, names, radius=radius).eval().requires_grad_(False)


def save(path: Path, detector: ObjectDetector, *, radius: float = RADIUS) -> None:
    """Write all it takes to rebuild every variant: a file of weights with the variants' parts."""
    variants = variants_of(detector).items()
    named: dict[str, Any] = {"variants": {name: list(parts) for name, parts in variants}}
    named |= {"radius": radius}
    checkpoint.save(path, detector, described(detector) | named)


def load(path: Path, variant: Variant = "full") -> tuple[DefendedDetector, tuple[str, ...]]:
    """The frozen pipeline of `path`, and its classes. ValueError for what is no object detector."""
    detector = load_detector(path, purified=variant == "full")
    content = files.read_config(path)
    names = tuple(content.get("variants", {}).get(variant, variants_of(detector)[variant]))
    pipeline = DefendedDetector(detector, names, radius=content.get("radius", RADIUS))
    return pipeline.eval().requires_grad_(False), detector.config.classes
