"""What is attacked: each victim as an attacker sees it, and as it answers when deployed."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rampart.handlers.engine import Engine
from rampart.handlers.verdict import Calibration, combine, p_values
from rampart.hardening.attack.objectives import Look, View, look_at
from rampart.hardening.model import checkpoint, wrapping
from rampart.hardening.model.arrays import Bools, Floats
from rampart.hardening.model.calibrate import outputs_of, threshold
from rampart.hardening.model.card import FP32, Subject
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.pipeline import Defended, Outputs
from rampart.hardening.model.pixels import to_float, to_uint8


class Answer(NamedTuple):
    """What a victim says of N images."""

    guess: NDArray[np.int64]  # (N,)
    accepted: Bools  # (N,)
    suspicion: Floats  # (N,) higher is more suspicious; zero where nothing is ever rejected


class Victim(NamedTuple):
    """Something that answers, as an attacker sees it and as it is deployed."""

    subject: Subject
    fingerprint: str  # changes with anything that changes an attack on it
    rejects: bool
    look: Look
    # The label alone, which is cheaper to differentiate, and what it depends on.
    label_look: Look
    label_fingerprint: str
    answer: Callable[[Tensor], Answer]  # x (N, 3, H, W) in [0, 1]
    deployed: Callable[[Tensor], Answer]  # uint8 (N, H, W, 3)

    @property
    def name(self) -> str:
        """Who it is, for people."""
        return self.subject.name


def fingerprint(model: nn.Module, graph: str = "") -> str:
    """Stands for all of a model that an attack on it depends on; a `graph` in lower precision by
    its digest. No file holds the code of your own networks: what they do stands for that.
    """
    own = [part for part in model.modules() if isinstance(part, Classifier) and part.config.head]
    code = [wrapping.behaviour(part, part.config.image_size) for part in own]
    return " ".join([graph or checkpoint.digest(model), *code])


def batched(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `model` says of x, in pieces that fit in memory and without gradients."""
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(x, 128)])


def label_victim(kind: str, model: Callable[[Tensor], Tensor], fingerprint: str) -> Victim:
    """A victim that labels and never rejects: `model` maps x (N, 3, H, W) to logits."""

    def answer(x: Tensor) -> Answer:
        guess = batched(model, x).argmax(1).cpu().numpy()
        return Answer(guess, np.ones(len(guess), bool), np.zeros(len(guess)))

    def look(x: Tensor) -> View:
        return View(model(x))

    subject, key = Subject(kind), fingerprint
    return Victim(subject, key, False, look, look, key, answer, lambda i: answer(to_float(i)))


class StraightThrough:
    """A graph in lower precision with the gradients of its fp32 pipeline (BPDA, Athalye 2018)."""

    def __init__(self, pipeline: Defended, engine: Engine) -> None:
        self.pipeline, self.engine = pipeline, engine

    def defend(self, x: Tensor) -> Outputs:
        """The graph's outputs for x (N, 3, H, W) in [0, 1], rounded to 8 bits."""
        own = self.graph(x)
        if not wants_gradient(x):
            return own
        return Outputs(*map(carried, own, self.pipeline.defend(x)))

    def label_logits(self, x: Tensor) -> Tensor:
        """The graph's logits (N, K)."""
        own = self.graph(x).logits
        return carried(own, self.pipeline.label_logits(x)) if wants_gradient(x) else own

    def margin_after_step(
        self, x: Tensor, label: Tensor, share: float = 1.0, steps: int = 1
    ) -> Tensor:
        """Of the fp32 pipeline: what leads the attack need not be what the graph says."""
        return self.pipeline.margin_after_step(x, label, share, steps)

    def graph(self, x: Tensor) -> Outputs:
        """What the graph itself says, without gradients."""
        out = self.engine.run(to_uint8(x.detach()).cpu().numpy())
        logits, raw_logits, scores, image = (torch.from_numpy(part).to(x.device) for part in out)
        return Outputs(logits, raw_logits, scores, to_float(image))


def wants_gradient(x: Tensor) -> bool:
    """Whether anybody will differentiate by x: all weights are frozen."""
    return x.requires_grad and torch.is_grad_enabled()


def carried(value: Tensor, by: Tensor) -> Tensor:
    """`value` with the gradients of `by`, of the same shape."""
    return by + (value - by).detach()


def pipeline_victim(
    pipeline: Defended,
    calibration: Calibration,
    fingerprint: str,
    *,
    rate: float,
    engine: Engine | None = None,
    precision: str = FP32,
) -> Victim:
    """The pipeline as deployed; ValueError where the calibration has too few images for `rate`."""
    if math.isinf(threshold(calibration, rate)):
        n = calibration.images
        problem = f"{n} calibration images cannot support a false-alarm rate of {rate:g}"
        raise ValueError(f"{problem}: pass {2 / (n + 1):.2g} or more")

    def judge(logits: NDArray[np.float32], scores: NDArray[np.float32]) -> Answer:
        accepted = p_values(scores.astype(np.float64), calibration) >= rate
        return Answer(logits.argmax(1), accepted, combine(scores, calibration))

    def answer(x: Tensor) -> Answer:
        return judge(*outputs_of(pipeline.defend, x, 128))

    def deployed(image: Tensor) -> Answer:
        if engine is None:
            return answer(to_float(image))
        out = engine.run(image.cpu().numpy())
        return judge(out.logits, out.scores)

    table = hashlib.sha256(calibration.combined.tobytes() + calibration.knots.tobytes())
    own = f"{fingerprint} {calibration.variant}"
    return Victim(
        Subject("pipeline", calibration.variant, precision),
        f"{own} {table.hexdigest()[:16]} {rate}",
        True,
        look_at(pipeline, calibration, rate),
        lambda x: View(pipeline.label_logits(x)),
        own,
        answer,
        deployed,
    )


def max_softmax_victim(victim: Victim, image: Tensor) -> Victim:
    """Reject low confidence, on as many of `image` uint8 (N, H, W, 3) as `victim` rejects."""

    def logits_of(x: Tensor) -> Tensor:
        return victim.label_look(x).logits

    clean = batched(logits_of, to_float(image)).softmax(1).amax(1)
    rejected = int((~victim.deployed(image).accepted).sum())
    bar = float(clean.sort().values[rejected])  # exactly that many clean images are below

    def view(logits: Tensor) -> View:
        return View(logits, bar - logits.softmax(1).amax(1) - 1e-7)

    def answer(x: Tensor) -> Answer:
        seen = view(batched(logits_of, x))
        margin = cast(Tensor, seen.margin).cpu().numpy()
        return Answer(seen.logits.argmax(1).cpu().numpy(), margin <= 0, margin.astype(np.float64))

    return victim._replace(
        subject=replace(victim.subject, kind="max_softmax"),
        fingerprint=f"{victim.label_fingerprint} max-softmax {bar:.6f}",
        look=lambda x: view(logits_of(x)),
        answer=answer,
        deployed=lambda image: answer(to_float(image)),
    )
