"""What a server says of an image, in whichever terms, and what that is in probabilities."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from rampart.hardening.model.arrays import Pixels

UNNAMED = ("", "")  # of an answer that tells no model
OFF = 0.01  # by which rounded probabilities may miss a sum of 1
Kind = Literal["probabilities", "logits", "labels", "a confidence"]
Scores = Sequence[float] | Mapping[str, float]


class Answer(NamedTuple):
    """What an endpoint says of one image: `top` are (index, confidence), the most confident first,
    and `model` name and version. A `label` of None is a refusal.
    """

    label: int | None
    top: tuple[tuple[int, float], ...]
    model: tuple[str, str]
    similar: bool = False


class Said(NamedTuple):
    """A label, the scores of all classes in order or of some by name, or the label's own score."""

    label: str | int | None = None
    scores: Scores | float | None = None
    accepted: bool = True


class Asked(Protocol):
    """What is attacked: an endpoint, or what answers as one does."""

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Its labels, in the order of its scores."""
        ...

    @property
    def reading(self) -> "Reading":
        """What was found out about its answers."""
        ...

    def ask(self, images: Pixels) -> list[Answer]:
        """Answers for uint8 (N, H, W, 3)."""
        ...


class Reading:
    """Reads one server's answers about these `classes`; its `kind` is that of the first answer."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.kind: Kind | None = None

    def answer(self, said: Said) -> Answer:
        """An answer in probabilities. Raises ValueError for what fits neither classes nor kind."""
        pairs = self._pairs(said)
        kind = kind_of([value for _, value in pairs], said)
        self.kind = self.kind or kind
        if kind != self.kind and not (self.kind == "logits" and kind == "probabilities"):
            raise ValueError(f"earlier answers were {self.kind}, but this one is {kind}")
        if self.kind == "logits":
            pairs = softmax(pairs)
        top = tuple(sorted(pairs, key=lambda pair: -pair[1]))
        label = self.index(said.label) if said.label is not None else top[0][0]
        return Answer(label if said.accepted else None, top, UNNAMED)

    def _pairs(self, said: Said) -> list[tuple[int, float]]:
        """(index, score) of each class that is told."""
        if isinstance(said.scores, Mapping):
            return [(self.index(name), float(value)) for name, value in said.scores.items()]
        if isinstance(said.scores, Sequence):
            if len(said.scores) != len(self.classes):
                raise ValueError(
                    f"{len(said.scores)} scores do not fit the {len(self.classes)} classes of these"
                    " images: take images with the model's classes, in its order"
                )
            return list(enumerate(map(float, said.scores)))
        if said.label is None:
            raise ValueError("an answer has neither label nor scores")
        return [(self.index(said.label), 1.0 if said.scores is None else float(said.scores))]

    def index(self, label: str | int) -> int:
        """The index of a label, which may be a number where no class is called so."""
        if label in self.classes:
            return self.classes.index(str(label))
        text = str(label)
        if text.isdecimal() and int(text) < len(self.classes):
            return int(text)
        raise ValueError(
            f"{label!r} is not a class of these images ({', '.join(self.classes)[:200]}): use"
            " images with the model's classes"
        )


def kind_of(values: Sequence[float], said: Said) -> Kind:
    """What scores are. Raises ValueError for those that are not finite."""
    if not all(map(math.isfinite, values)):
        raise ValueError("an answer has scores that are not finite numbers")
    if said.scores is None:
        return "labels"
    if isinstance(said.scores, float | int):
        return "a confidence"
    total, whole = sum(values), isinstance(said.scores, Sequence)
    inside = all(-OFF <= value <= 1 + OFF for value in values) and total <= 1 + OFF
    return "probabilities" if inside and (total >= 1 - OFF or not whole) else "logits"


def softmax(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Logits by index, as probabilities."""
    values = np.array([value for _, value in pairs])
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    return [(index, float(share)) for (index, _), share in zip(pairs, shares, strict=True)]
