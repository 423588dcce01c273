"""One attack on one picture, watched step by step."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rampart.handlers.errors import ImageError
from rampart.hardening.attack.ladder import Budget, in_8_bits, joint_apgd, targeted_apgd
from rampart.hardening.attack.objectives import Look, View
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.detectors import margin
from rampart.hardening.model.pixels import to_float
from rampart.play.bench import UNDEFENDED, Answer, Bench, data_uri

MAX_EPS, MAX_STEPS = 64, 100
TARGETS = 3  # that the attack without a target tries
GAIN = 10  # by which the perturbation is shown enlarged
Event = dict[str, Any]
Watch = Callable[[Event], None]


class Stopped(Exception):
    """Whoever asked for the attack has gone."""


class Order(NamedTuple):
    """An attack as it is asked for; `target` is the index of a class, None for any."""

    victim: str
    eps: int = 8  # levels of 255
    steps: int = 20  # of each try
    target: int | None = None

    @classmethod
    def read(cls, query: Mapping[str, str], bench: Bench) -> "Order":
        """Out of an address. Raises ImageError for a value that is none of those offered."""
        victim, target = query.get("victim", bench.names[0]), query.get("target", "")
        if victim not in bench.names:
            raise refused(f"victim must be one of {', '.join(bench.names)}")
        if target and target not in bench.model.classes:
            raise refused("target must be one of the model's classes, or be left out")
        eps = whole(query.get("eps", str(bench.described()["eps"])), "eps", MAX_EPS)
        steps = whole(query.get("steps", "20"), "steps", MAX_STEPS)
        return cls(victim, eps, steps, bench.model.classes.index(target) if target else None)


def whole(text: str, name: str, most: int) -> int:
    """A whole number from 1 to `most`. Raises ImageError."""
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= most):
        raise refused(f"{name} must be a whole number from 1 to {most}")
    return int(text)


def refused(message: str) -> ImageError:
    """A request that asks for what there is not."""
    return ImageError(422, "bad_parameter", message)


class Watched:
    """A victim's `look` that tells of each gradient step, and ends once `stop` is set."""

    def __init__(self, look: Look, watch: Watch, stop: threading.Event) -> None:
        self.look, self.watch, self.stop = look, watch, stop
        self.label: Tensor | None = None
        self.target: Tensor | None = None
        self.steps = 0

    def __call__(self, x: Tensor) -> View:
        """What the victim shows of x (1, 3, H, W)."""
        if self.stop.is_set():
            raise Stopped
        view = self.look(x)
        if x.requires_grad and self.label is not None:
            self.steps += 1
            self.watch(self.point(view))
        return view

    def point(self, view: View) -> Event:
        """Where the attack stands: `lead` in logits, won below 0; `guard` rejects above 0."""
        logits = view.logits.detach()
        if self.target is None:
            assert self.label is not None
            lead = margin(logits, self.label)
        else:
            lead = -margin(logits, self.target)
        guard = None if view.margin is None else round(float(view.margin.detach()), 4)
        return {"kind": "step", "step": self.steps, "lead": round(float(lead), 4), "guard": guard}


def attack(bench: Bench, image: Tensor, order: Order, watch: Watch, stop: threading.Event) -> Event:
    """Attack an image uint8 (1, H, W, 3) as `order` says, then the undefended twin likewise; what
    came of it, as JSON has it.

    `watch` is told of each step against the victim. Raises ImageError where the image is the target
    already, and Stopped once `stop` is set.
    """
    look, began = Watched(bench.look(order.victim), watch, stop), time.perf_counter()
    attacked = crafted(bench, look, image, order)
    seconds = round(time.perf_counter() - began, 2)
    report = {"kind": "done", "steps": look.steps, "seconds": seconds, "twin": None}
    report |= outcome(bench, order, image, attacked)
    if UNDEFENDED in bench.names and order.victim != UNDEFENDED:
        report["twin"] = on_twin(bench, image, order, stop)
    return report


def on_twin(
    bench: Bench, image: Tensor, order: Order, stop: threading.Event
) -> dict[str, Any] | None:
    """What the twin says under an attack of its own; None where it sees the target already."""
    look = Watched(bench.look(UNDEFENDED), lambda _: None, stop)
    try:
        attacked = crafted(bench, look, image, order)
    except ImageError:
        return None
    clean, after = (bench.answers(shown)[UNDEFENDED] for shown in (image, attacked))
    verdict = result(order, clean, after)
    return {
        "steps": look.steps,
        "attacked": data_uri(attacked),
        "answer": after,
        "result": verdict,
    }


def crafted(bench: Bench, look: Watched, image: Tensor, order: Order) -> Tensor:
    """The strongest that the attack finds for one victim, uint8 (1, H, W, 3)."""
    x, threat = to_float(image), Threat("Linf", order.eps / 255)
    with torch.no_grad():
        label = look(x).logits.argmax(1)
    look.label = label
    if order.target is None:
        found = joint_apgd(look, x, label, threat, Budget(steps=order.steps, targets=TARGETS))
    else:
        look.target = torch.full_like(label, order.target)
        if order.target == int(label):
            name = bench.model.classes[order.target]
            raise refused(f"it already labels the picture {name}: choose another target")
        found = targeted_apgd(look, x, label, look.target, threat, steps=order.steps)
    return in_8_bits(found, image, threat)


def outcome(bench: Bench, order: Order, image: Tensor, attacked: Tensor) -> Event:
    """Both pictures uint8 (1, H, W, 3), what lies between them, and what everybody says."""
    change = attacked.int() - image.int()
    clean, after = bench.answers(image), bench.answers(attacked)
    purified = next((one["purified"] for one in after.values() if "purified" in one), None)
    return {
        "order": order._asdict(),
        "clean": data_uri(image),
        "change": data_uri((128 + GAIN * change).clamp(0, 255).byte()),
        "attacked": data_uri(attacked),
        "purified": purified,
        "largest": int(change.abs().max()),
        "answers": {"clean": clean, "attacked": after},
        "result": result(order, clean[order.victim], after[order.victim]),
    }


def result(order: Order, clean: Answer, after: Answer) -> str:
    """How an attack ended for its victim: held, caught, or fooled."""
    wanted = order.target
    won = after["index"] != clean["index"] if wanted is None else after["index"] == wanted
    if not won:
        return "held"
    return "fooled" if after.get("decision", "accept") == "accept" else "caught"
