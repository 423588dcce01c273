"""One attack on what an object detector finds in one picture, watched step by step."""

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rampart.handlers.image import View
from rampart.handlers.scenes import overlaps
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.objects.defended import SceneOutputs
from rampart.play.attack import GAIN, MAX_EPS, MAX_STEPS, Event, Stopped, Watch, refused, whole
from rampart.play.bench import UNDEFENDED, Answer
from rampart.play.scene_bench import SceneBench, shown
from rampart.scene_looks import Plan, craft

SAME = 0.5  # intersection over union from which a box is the one that was there
ON_NOTHING = "fabricate"  # the aim that needs no object


class SceneOrder(NamedTuple):
    """An attack as it is asked for."""

    victim: str
    eps: int = 4  # levels of 255
    steps: int = 20
    aim: str = "vanish"

    @classmethod
    def read(cls, query: Mapping[str, str], bench: SceneBench) -> "SceneOrder":
        """Out of an address. Raises ImageError for a value that is none of those offered."""
        victim = query.get("victim", bench.names[0])
        if victim not in bench.names:
            raise refused(f"victim must be one of {', '.join(bench.names)}")
        aims = bench.aims
        aim = query.get("aim", next(iter(aims)))
        if aim not in aims:
            raise refused(f"aim must be one of {', '.join(aims)}")
        eps = whole(query.get("eps", str(bench.described()["eps"])), "eps", MAX_EPS)
        return cls(victim, eps, whole(query.get("steps", "20"), "steps", MAX_STEPS), aim)


class Damage(NamedTuple):
    """What an attack made of the boxes that a victim shows."""

    kept: int  # that were there, and still are
    new: int  # that were not there


class Watched:
    """Tells of each step against a victim, and ends once `stop` is set."""

    def __init__(
        self, bench: SceneBench, name: str, view: View, watch: Watch, stop: threading.Event
    ) -> None:
        self.bench, self.name, self.view = bench, name, view
        self.watch, self.stop, self.steps = watch, stop, 0
        self.clean = bench.answers(view)[name]

    def __call__(self, outputs: SceneOutputs, margin: Tensor) -> None:
        """As `craft` tells it; `guard` rejects above 0."""
        if self.stop.is_set():
            raise Stopped
        self.steps += 1
        verdict = self.bench.verdict(self.name, outputs, self.view)
        step = {"kind": "step", "step": self.steps}
        step |= damage(self.clean["boxes"], verdict.boxes)._asdict()
        guard = None if self.name == UNDEFENDED else round(float(margin.detach()), 4)
        self.watch(step | {"guard": guard})


def attack(
    bench: SceneBench, view: View, order: SceneOrder, watch: Watch, stop: threading.Event
) -> Event:
    """Attack a picture as `order` says, then the undefended twin likewise; what came of it, as JSON
    has it.

    `watch` is told of each step against the victim. Raises ImageError where there is no box to
    attack, and Stopped once `stop` is set.
    """
    clean = bench.answers(view)
    if not clean[order.victim]["boxes"] and order.aim != ON_NOTHING:
        raise refused(f"it finds nothing in this picture: only the aim {ON_NOTHING} needs no box")
    began = time.perf_counter()
    report, attacked = on_victim(bench, view, order, watch, stop)
    seconds = round(time.perf_counter() - began, 2)
    after = bench.answers(View(attacked, view.frame))
    report |= {"kind": "done", "seconds": seconds, "order": order._asdict(), "twin": None}
    report |= {"clean": shown(view, view.pixels), "answers": {"clean": clean, "attacked": after}}
    some = clean.get(UNDEFENDED, {}).get("boxes") or order.aim == ON_NOTHING
    if UNDEFENDED in bench.names and order.victim != UNDEFENDED and some:
        own = order._replace(victim=UNDEFENDED)
        report["twin"], _ = on_victim(bench, view, own, lambda _: None, stop)
    return report


def on_victim(
    bench: SceneBench, view: View, order: SceneOrder, watch: Watch, stop: threading.Event
) -> tuple[dict[str, Any], Pixels]:
    """What an attack makes of one victim's boxes, and its pixels (S, S, 3)."""
    name, victim = order.victim, bench.victim(order.victim)
    watched = Watched(bench, name, view, watch, stop)
    plan = Plan(Threat("Linf", order.eps / 255), rate=bench.rate, steps=order.steps)
    rejects = name != UNDEFENDED
    boxes = watched.clean["boxes"]
    attacked = craft(victim, view, boxes, plan, order.aim, unflagged=rejects, watch=watched)
    change = attacked.astype(int) - view.pixels
    answer = bench.answers(View(attacked, view.frame))[name]
    found = damage(boxes, answer["boxes"])
    enlarged = (128 + GAIN * change).clip(0, 255).astype(np.uint8)
    report = {
        "steps": watched.steps,
        "attacked": shown(view, attacked),
        "change": shown(view, enlarged),
        "largest": int(np.abs(change).max()),
        "answer": answer,
        **found._asdict(),
        "result": result(len(boxes), found, answer),
    }
    return report, attacked


def damage(before: Any, after: Any) -> Damage:
    """Which boxes are the same ones: each the one it overlaps most, of its label."""
    left, kept = list(before), 0
    for box in after:
        mine = [one for one in left if one["index"] == box["index"]]
        shares = shares_of(box, mine)
        if mine and max(shares) >= SAME:
            left.remove(mine[shares.index(max(shares))])
            kept += 1
    return Damage(kept, len(after) - kept)


def shares_of(box: Answer, others: list[Answer]) -> list[float]:
    """Intersection over union of a box and others."""
    corners = [np.array([one["box"] for one in boxes], np.float32) for boxes in ([box], others)]
    shares: list[float] = overlaps(*(rows.reshape(-1, 4) for rows in corners))[0].tolist()
    return shares


def result(count: int, found: Damage, answer: Answer) -> str:
    """How an attack on `count` boxes ended: held, caught, dented, or fooled.

    A detector is fooled where half its boxes are gone, or half as many as it had are new.
    """
    if (found.kept, found.new) == (count, 0):
        return "held"
    if answer.get("decision", "accept") != "accept":
        return "caught"
    worst = max(count - found.kept, found.new)
    return "fooled" if 2 * worst >= max(count, 1) else "dented"
