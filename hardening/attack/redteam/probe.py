"""One image under attack: what is sent, counted and called a success."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.image import MAX_IMAGES
from rampart.hardening.attack.redteam.said import UNNAMED, Answer, Asked
from rampart.hardening.model.arrays import Pixels

Floats = NDArray[np.floating[Any]]
# An attack that repeats old queries so often in a row goes in circles.
MAX_REPEATS = 200


@dataclass(frozen=True)
class Settings:
    """What a run was made with; `eps` is n/255, `budget` the queries an image may cost. `said` are
    classes and confidences of the first image, which tell one model from another.
    """

    endpoint: str
    model: str
    version: str
    eps: int
    budget: int
    seed: int
    target: int | None = None  # the class that an attack is to end in, else any wrong one
    said: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Outcome:
    """What one attack did to row `index` of a data set.

    `success` is the number of the first query that fooled inside the ball, `clean_wrong` tells that
    it was the image itself, `distance` is the least Linf distance, in n/255, of any image that
    fooled, `noticed` the first query that the endpoint took for part of an attack.
    """

    settings: Settings
    attack: str
    index: int
    sha256: str
    label: str
    queries: int
    success: int | None
    clean_wrong: bool
    distance: int | None
    noticed: int | None = None


class AttackEnd(Exception):
    """The attack on this image ends: it is fooled, its budget spent, or nothing new is asked."""


class Probe:
    """One image uint8 (H, W, 3) with its true `label` under attack; AttackEnd ends it. Called with
    float (N, 3, H, W) in [0, 1] it gives probabilities (N, K), as ART's black-box classifier wants
    them.
    """

    def __init__(self, endpoint: Asked, image: Pixels, label: int, settings: Settings) -> None:
        self.endpoint, self.image, self.label, self.settings = endpoint, image, label, settings
        self.queries = 0
        self.success: int | None = None
        self.distance: int | None = None
        self.noticed: int | None = None
        self.refused = False  # the last image that was sent
        self._answers: dict[bytes, Floats] = {}
        self._repeats = 0

    @property
    def x(self) -> Floats:
        """The image itself as ART takes it, float32 (1, 3, H, W)."""
        return as_float(self.image)

    @property
    def targeted(self) -> bool:
        """Whether one class is wanted."""
        return self.settings.target is not None

    @property
    def one_hot(self) -> Floats:
        """What attacks are told as probabilities (1, K): the wanted class, else the true one."""
        target = self.settings.target
        return np.eye(1, len(self.endpoint.classes), self.label if target is None else target)

    def wanted(self, shares: Floats) -> bool:
        """Whether probabilities (K,) say what the attack wants."""
        best = int(shares.argmax())
        return best != self.label if self.settings.target is None else best == self.settings.target

    def __call__(self, x: Floats) -> Floats:
        """Probabilities (N, K); sends what was not sent before. Raises AttackEnd."""
        images = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        keys = [image.tobytes() for image in images]
        by_key = dict(zip(keys, images, strict=True))
        new = [image for key, image in by_key.items() if key not in self._answers]
        self._repeats = 0 if new else self._repeats + 1
        if self._repeats > MAX_REPEATS:
            raise AttackEnd
        for first in range(0, len(new), MAX_IMAGES):
            self._send(new[first : first + MAX_IMAGES])
        return np.stack([self._answers[key] for key in keys])

    def _send(self, images: Sequence[Pixels]) -> None:
        affordable = images[: self.settings.budget - self.queries]
        answers = self.endpoint.ask(np.stack(affordable)) if affordable else []
        for image, answer in zip(affordable, answers, strict=True):
            self._count(image, answer)
        if self.success is not None or len(affordable) < len(images):
            raise AttackEnd

    def _count(self, image: Pixels, answer: Answer) -> None:
        if answer.model not in (UNNAMED, (self.settings.model, self.settings.version)):
            raise ValueError(
                f"this run began against {self.settings.model} {self.settings.version}, but"
                f" {self.endpoint.url} now serves {' '.join(answer.model)}: choose another --out"
            )
        self.queries += 1
        self.refused = answer.label is None
        if answer.similar and self.noticed is None:
            self.noticed = self.queries
        self._answers[image.tobytes()] = scores(answer, self.label, len(self.endpoint.classes))
        if not self._fools(answer):
            return
        distance = int(np.abs(image.astype(int) - self.image).max())
        self.distance = distance if self.distance is None else min(self.distance, distance)
        if distance <= self.settings.eps and self.success is None:
            self.success = self.queries

    def _fools(self, answer: Answer) -> bool:
        """Whether an answer is what the attack wants."""
        if self.settings.target is not None:
            return answer.label == self.settings.target
        return answer.label is not None and answer.label != self.label


def as_float(image: Pixels) -> Floats:
    """Uint8 (H, W, 3) to float32 (1, 3, H, W) in [0, 1]."""
    return (image.astype(np.float32) / 255).transpose(2, 0, 1)[None]


def scores(answer: Answer, label: int, classes: int) -> Floats:
    """An answer as probabilities (K,), the rest spread evenly; of a refusal all is `label`."""
    top = {label: 1.0} if answer.label is None else dict(answer.top)
    rest = max(0.0, 1 - sum(top.values())) / max(1, classes - len(top))
    spread = np.array([top.get(index, rest) for index in range(classes)])
    shares: Floats = spread / spread.sum()
    return shares
