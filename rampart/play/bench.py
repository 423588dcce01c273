"""What every defence of a model says of one picture, and of the same picture under attack."""

import base64
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rampart.handlers.verdict import TOP, Calibration, Judge, Policy, surprises
from rampart.hardening.attack.objectives import Look, View, look_at
from rampart.hardening.model.calibrate import threshold
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.detectors import DETECTORS
from rampart.hardening.model.pipeline import DefendedClassifier, Outputs, Variant
from rampart.hardening.model.pixels import as_file, to_float
from rampart.model import Model
from rampart.play.switches import Chosen, p_value_of

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


class Defence(NamedTuple):
    """One variant, as it judges at `rate`."""

    pipeline: DefendedClassifier
    calibration: Calibration
    rate: float

    def answer(self, image: Tensor, judge: Judge) -> Answer:
        """What it says of an image uint8 (1, H, W, 3)."""
        out, milliseconds = timed(self.pipeline, image)
        verdict = judge.verdicts(out.logits.numpy(), out.raw_logits.numpy(), out.scores.numpy())[0]
        answer = {**verdict.to_dict(), "milliseconds": milliseconds}
        answer["p_value"] = verdict.p_value
        row = surprises(out.scores.double().numpy(), self.calibration)[0]  # (D,)
        names, own = self.calibration.detectors, row.tolist()
        answer["parts"] = [
            {"name": name, "surprise": finite(value)}
            for name, value in zip(names, own, strict=True)
        ]
        answer["suspicion"] = finite(float(row.sum()))
        if self.pipeline.purifier is not None:
            answer["purified"] = data_uri(out.purified)
        return answer

    def switched(self, surprise: Mapping[str, float]) -> Chosen:
        """The p-value of the detectors that are named, from the surprise of each."""
        row = np.array([surprise.get(name, 0.0) for name in self.calibration.detectors])
        return p_value_of(self.calibration, row, surprise.keys())

    def described(self) -> dict[str, Any]:
        """What the page has to know of it."""
        edge, ranks = threshold(self.calibration, self.rate), self.calibration.combined
        top = float(max(np.quantile(ranks, 0.995), min(edge, 1e6) * 1.5, 1e-6))
        counts = np.histogram(ranks.clip(0, top), bins=BARS, range=(0, top))[0]
        return {
            "detectors": [
                {"name": name, "question": question(name)} for name in self.calibration.detectors
            ],
            "rate": self.rate,
            "images": self.calibration.images,
            "threshold": finite(edge),
            "histogram": {"top": top, "counts": counts.tolist()},
            "purifier": self.pipeline.purifier is not None,
        }


class Bench:
    """A model's variants and, where there is one, its undefended twin, ready to answer."""

    def __init__(
        self, model: Model, twin: Classifier | None = None, *, rate: float | None = None
    ) -> None:
        self.model, self.twin = model, twin
        self.rate, self.name = model.chosen_rate(rate), str(model.card["model"])
        self.defences: dict[Variant, Defence] = {
            v: Defence(model.pipeline(v), model.calibration(v), self.rate) for v in model.variants
        }
        names = {"name": self.name, "version": "1.0"}
        self._judges = {
            v: Judge(model.classes, one.calibration, Policy(self.rate), names)
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
                v: one.answer(image, self._judges[v]) for v, one in self.defences.items()
            }
            if self.twin:
                logits, milliseconds = timed(self.twin, to_float(image))
                top = likeliest(logits, self.model.classes)
                found[UNDEFENDED] = {**top[0], "top": top, "milliseconds": milliseconds}
        return {name: found[name] for name in self.names}

    def look(self, name: str) -> Look:
        """One of them as an attacker sees it. KeyError for another name."""
        if name == UNDEFENDED and self.twin is not None:
            twin = self.twin
            return lambda x: View(twin(x))
        one = {str(v): defence for v, defence in self.defences.items()}[name]
        return look_at(one.pipeline, one.calibration, self.rate)

    def described(self) -> dict[str, Any]:
        """What the page has to know of the model."""
        return {
            "name": self.name,
            "classes": self.model.classes,
            "size": self.model.image_size,
            "names": self.names,
            "variants": {v: one.described() for v, one in self.defences.items()},
            "eps": levels(self.model.card),
        }


def timed(run: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, float]:
    """What `run` makes of x, and the milliseconds that took."""
    began = time.perf_counter()
    out: Outputs | Tensor = run(x)
    return out, round(1000 * (time.perf_counter() - began), 2)


def likeliest(logits: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The labels that logits (1, K) hold likeliest, as a verdict lists them."""
    share, index = logits.softmax(1)[0].topk(min(TOP, len(classes)))
    pairs = zip(index.tolist(), share.tolist(), strict=True)
    return [{"label": classes[i], "index": i, "confidence": round(c, 6)} for i, c in pairs]


def data_uri(image: Tensor) -> str:
    """An image uint8 (1, H, W, 3) as a page shows it."""
    file = as_file(Image.fromarray(image[0].numpy()))
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def question(name: str) -> str:
    """What a detector asks, for people."""
    return QUESTIONS.get(name) or " ".join((DETECTORS[name].__doc__ or name).split())


def levels(card: Mapping[str, Any]) -> int:
    """The levels of 255 that the model was trained to withstand, or the usual ones."""
    recipe = str(card.get("training", {}).get("classifier", ""))
    found = re.search(r"norm='Linf', eps=([\d.]+)", recipe)
    return max(1, round(255 * float(found[1]))) if found else NOTCH
