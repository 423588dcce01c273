"""What every defence of a model says of one picture, and of the same picture under attack."""

import base64
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rampart.handlers.image import decode
from rampart.handlers.tasks import CLASSIFY
from rampart.handlers.verdict import TOP, Calibration, Judge, Policy, surprises
from rampart.hardening.attack.objectives import Look, View, look_at
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.calibrate import threshold
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.detectors import DETECTORS
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import as_file, to_float
from rampart.model import Model
from rampart.play.switches import Chosen, p_value_of

Pipeline = TypeVar("Pipeline", bound=nn.Module)
Answer = dict[str, Any]  # one defence's, as JSON has it
UNDEFENDED = "undefended"
BARS = 36  # of a histogram
NOTCH = 8  # levels of 255 that an attack may change where the card names no threat
# What each detector asks, for people; another one's own words stand in where it is not listed.
QUESTIONS = {
    "median": "Does it have unusual specks?",
    "bit_depth": "Does it lose much in 16 shades?",
    "reconstruction": "Does the purifier change it much?",
    "disagreement": "Does the purifier change the answer?",
    "confidence": "Is the classifier in two minds?",
    "energy": "Does nothing speak loudly for any class?",
    "feature_distance": "Is it unlike every class?",
    "residual": "Is it unlike all training pictures?",
    "consistency": "Would a tiny step change the label?",
    "rectified": "Does the second head distrust it?",
    "squeezing": "Does a coarser copy get another answer?",
}


class Defence(NamedTuple, Generic[Pipeline]):
    """One variant, as it judges at `rate`."""

    pipeline: Pipeline
    calibration: Calibration
    rate: float

    def suspicion(self, scores: Tensor) -> Answer:
        """What each detector makes of scores (1, D), and all of them together."""
        row = surprises(scores.double().numpy(), self.calibration)[0]  # (D,)
        pairs = zip(self.calibration.detectors, row.tolist(), strict=True)
        parts = [{"name": name, "surprise": finite(value)} for name, value in pairs]
        return {"parts": parts, "suspicion": finite(float(row.sum()))}

    def switched(self, surprise: Mapping[str, float]) -> Chosen:
        """The p-value of the detectors that are named, from the surprise of each."""
        row = np.array([surprise.get(name, 0.0) for name in self.calibration.detectors])
        return p_value_of(self.calibration, row, surprise.keys())

    def described(self, questions: Mapping[str, str]) -> dict[str, Any]:
        """What the page has to know of it, with what each detector asks."""
        edge, ranks = threshold(self.calibration, self.rate), self.calibration.combined
        top = float(max(np.quantile(ranks, 0.995), min(edge, 1e6) * 1.5, 1e-6))
        counts = np.histogram(ranks.clip(0, top), bins=BARS, range=(0, top))[0]
        return {
            "detectors": [
                {"name": name, "question": questions.get(name) or docstring(name)}
                for name in self.calibration.detectors
            ],
            "rate": self.rate,
            "images": self.calibration.images,
            "threshold": finite(edge),
            "histogram": {"top": top, "counts": counts.tolist()},
        }


class Bench:
    """A model's variants and, where there is one, its undefended twin, ready to answer."""

    def __init__(
        self, model: Model, twin: Classifier | None = None, *, rate: float | None = None
    ) -> None:
        self.model, self.twin = model, twin
        self.rate, self.name = model.chosen_rate(rate), str(model.card["model"])
        self.defences: dict[str, Defence[DefendedClassifier]] = {
            v: Defence(model.pipeline(v), model.calibration(v), self.rate) for v in model.variants
        }
        self._judges = {
            v: Judge(model.classes, one.calibration, Policy(self.rate), model.identity)
            for v, one in self.defences.items()
        }
        # The first pass of a network takes longer than those that follow.
        self.answers(torch.zeros(1, model.image_size, model.image_size, 3, dtype=torch.uint8))

    @property
    def names(self) -> list[str]:
        """Whoever answers, the default first."""
        best = self.model.best_variant
        others = [v for v in self.defences if v != best]
        return [best, *others, *([UNDEFENDED] if self.twin else [])]

    def answers(self, image: Tensor) -> dict[str, Answer]:
        """What each says of an image uint8 (1, H, W, 3)."""
        with torch.no_grad():
            found: dict[str, Answer] = {
                v: self._answer(v, one, image) for v, one in self.defences.items()
            }
            if self.twin:
                logits, milliseconds = timed(self.twin, to_float(image))
                top = likeliest(logits, self.model.classes)
                found[UNDEFENDED] = {**top[0], "top": top, "milliseconds": milliseconds}
        return {name: found[name] for name in self.names}

    def _answer(self, variant: str, one: Defence[DefendedClassifier], image: Tensor) -> Answer:
        out, milliseconds = timed(one.pipeline, image)
        every = (out.logits.numpy(), out.raw_logits.numpy(), out.scores.numpy())
        (verdict,) = self._judges[variant].verdicts(*every)
        answer = {**verdict.to_dict(), "milliseconds": milliseconds, "p_value": verdict.p_value}
        answer |= one.suspicion(out.scores)
        if one.pipeline.purifier is not None:
            answer["purified"] = data_uri(out.purified)
        return answer

    def see(self, data: bytes) -> Tensor:
        """A picture as the model sees it, uint8 (1, H, W, 3). Raises ImageError."""
        return torch.from_numpy(decode(data, self.model.image_size))[None]

    def seen(self, image: Tensor) -> Answer:
        """What the page shows of it."""
        return {"picture": data_uri(image)}

    def look(self, name: str) -> Look:
        """One of them as an attacker sees it. KeyError for another name."""
        if name == UNDEFENDED and self.twin is not None:
            twin = self.twin
            return lambda x: View(twin(x))
        one = self.defences[name]
        return look_at(one.pipeline, one.calibration, self.rate)

    def described(self) -> dict[str, Any]:
        """What the page has to know of the model."""
        return {
            "name": self.name,
            "task": CLASSIFY,
            "classes": self.model.classes,
            "size": self.model.image_size,
            "names": self.names,
            "variants": {v: one.described(QUESTIONS) for v, one in self.defences.items()},
            "eps": levels(self.model.card),
        }


def timed(run: Callable[[Any], Any], x: Any) -> tuple[Any, float]:
    """What `run` makes of x, and the milliseconds that took."""
    began = time.perf_counter()
    out = run(x)
    return out, round(1000 * (time.perf_counter() - began), 2)


def likeliest(logits: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The labels that logits (1, K) hold likeliest, as a verdict lists them."""
    share, index = logits.softmax(1)[0].topk(min(TOP, len(classes)))
    pairs = zip(index.tolist(), share.tolist(), strict=True)
    return [{"label": classes[i], "index": i, "confidence": round(c, 6)} for i, c in pairs]


def data_uri(image: Tensor) -> str:
    """An image uint8 (1, H, W, 3) as a page shows it."""
    return png_uri(Image.fromarray(image[0].numpy()))


def png_uri(picture: Image.Image) -> str:
    """A picture as a page shows it."""
    file = as_file(picture)
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def docstring(name: str) -> str:
    """What a detector of somebody's own says of itself."""
    return " ".join((DETECTORS[name].__doc__ or name).split())


def levels(card: Mapping[str, Any]) -> int:
    """The levels of 255 that the model was trained to withstand, or the usual ones."""
    training = card.get("training", {})
    recipe = str(training.get("classifier", training.get("detector", "")))
    threat = Threat.parse(recipe)
    return max(1, round(255 * threat.eps)) if threat and threat.norm == "Linf" else NOTCH
