"""What each part in front of the classifier costs and brings under one attack that sees all of it.
Every setup is calibrated like a model of its own, and shown what was found against any of them. Of
each image the least suspicious wrong answer tells whether the attacker gets through.
"""

import math
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rampart.handlers.engine import Engine
from rampart.handlers.verdict import Calibration
from rampart.hardening.attack.ladder import Aim, Budget, in_8_bits, rungs_of
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim, fingerprint, label_victim, pipeline_victim
from rampart.hardening.judge import checks
from rampart.hardening.judge.checks import Check
from rampart.hardening.judge.evaluate import (
    QUERIES,
    Attempt,
    Rung,
    climb,
    replay,
    rungs_on,
    to_check,
)
from rampart.hardening.judge.metrics import difference, rounded, share
from rampart.hardening.model import calibrate, detectors
from rampart.hardening.model.arrays import Bools, Floats
from rampart.hardening.model.card import Figure, Row, Subject, cell_text, gain_text
from rampart.hardening.model.detectors import PURIFIER, RECTIFIED, RECTIFIER, Confidence
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier, Variant
from rampart.hardening.model.pixels import to_float

# Rates of false alarms on the curve, and those at which the joint attack wants to be accepted.
RATES = (0.005, 0.01, 0.02, 0.05)
AIMS = (0.01, 0.02, 0.05)
SHOWN = (0.02, 0.05)
DECIDING = 0.02
# The classifier's largest probability alone: what every other rejection has to beat.
MAX_SOFTMAX = "+ confidence"
BASELINES = ("classifier", MAX_SOFTMAX)
KEPT = "right or rejected, and right and accepted when clean"
ON_TEST = (*BASELINES, "lean", "guarded", "full")
ROUNDS = 200

ToEngine = Callable[[DefendedClassifier], Engine]


class Setup(NamedTuple):
    """What stands in front of the classifier; without `detectors` nothing is ever rejected."""

    name: str
    purified: bool = False
    detectors: tuple[str, ...] = ()


class Attacked(NamedTuple):
    """A setup as it is attacked: a victim for each rate of AIMS, or one that never rejects."""

    setup: Setup
    calibration: Calibration | None
    victims: list[Victim]
    engine: Engine | None  # none for the undefended twin, which is no setup to serve


class Outcome(NamedTuple):
    """What became of N images in front of one setup."""

    attacked: Attacked
    right: Bools  # (N,) clean
    suspicion: Floats  # (N,) clean
    least: Floats  # (N,) of the least suspicious wrong answer; infinite where there was none
    checks: tuple[Check, ...] = ()  # of the detectors of a variant

    def passes(self, rate: float, suspicion: Floats) -> Bools:
        """Which images are accepted where clean ones are rejected at `rate`."""
        if self.attacked.calibration is None:
            return suspicion < math.inf
        return suspicion <= calibrate.threshold(self.attacked.calibration, rate)

    def safe(self, rate: float) -> Bools:
        """Images (N,) of which no wrong answer was accepted."""
        return np.isinf(self.least) | ~self.passes(rate, self.least)

    def safe_with(self, rejected: int) -> Bools:
        """The same (N,) at the strictest bar by which as many clean images are `rejected`."""
        bar = float(np.sort(self.suspicion)[len(self.suspicion) - 1 - rejected])
        return np.isinf(self.least) | (self.least > bar)


def setups(pipeline: DefendedClassifier) -> list[Setup]:
    """The rows for a model: each part alone, then the variants."""
    head = () if pipeline.classifier.rectifier is None else (RECTIFIED,)
    lacking = set() if head else {RECTIFIER}
    needs = {name: kind.needs for name, kind in detectors.DETECTORS.items()}
    possible = [name for name in needs if not needs[name] & lacking]
    possible = [name for name in possible if not pipeline.detectors.lacks(name)]
    two_views = [name for name in possible if PURIFIER in needs[name]]
    one_view = [name for name in possible if name not in two_views]
    out = [Setup("classifier"), *(Setup(f"+ {name}", False, (name,)) for name in one_view)]
    out += [Setup(v, False, (*pipeline.variants[v], *head)) for v in ("lean", "guarded")]
    if pipeline.purifier is not None:
        out.append(Setup("+ purifier", True))
        out += [Setup(f"+ purifier + {name}", True, (name,)) for name in two_views]
        out.append(Setup("full", True, (*pipeline.variants["full"], *head)))
    return out


def chosen(
    pipeline: DefendedClassifier, only: Sequence[str], *, test: bool, guarded: bool = False
) -> list[Setup]:
    """The baselines with the rows named in `only`, or a test's, or all, of a model that is not
    `guarded` without that one; ValueError for others.
    """
    every = setups(pipeline)
    names = [setup.name for setup in every]
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"no row {', '.join(unknown)}: choose among {', '.join(names)}")
    usual = ({*ON_TEST} if test else {*names}) - (set() if guarded else {"guarded"})
    wanted = {*BASELINES, *only} if only else usual
    return [setup for setup in every if setup.name in wanted]


def arm(
    pipeline: DefendedClassifier,
    setup: Setup,
    held: Images,
    to_engine: ToEngine,
    device: torch.device,
) -> Attacked:
    """The parts of `pipeline` that `setup` names, calibrated on `held`, then moved to `device`."""
    purifier = pipeline.purifier if setup.purified else None
    # Every graph has scores; those of a setup that rejects nothing are not looked at.
    names = setup.detectors or (Confidence.name,)
    net = DefendedClassifier(pipeline.classifier, purifier, names)
    net.detectors.take(pipeline.detectors)
    net = net.cpu().eval().requires_grad_(False)
    engine, digest = to_engine(net), f"{fingerprint(net)} {setup}"
    if not setup.detectors:
        victim = label_victim(setup.name, net.to(device).label_logits, digest)
        return Attacked(setup, None, [victim], engine)
    calibration = calibrate.calibrate(net, held, "full" if setup.purified else "lean")
    net = net.to(device)
    victim_at = partial(pipeline_victim, net, calibration, digest, engine=engine)
    victims = [victim_at(rate=rate)._replace(subject=Subject(setup.name)) for rate in AIMS]
    return Attacked(setup, calibration, victims, engine)


def ladder(every: list[Attacked], threat: Threat, budget: Budget, classes: int) -> list[Rung]:
    """Attacks on the label of what never rejects; joint ones, at each rate, on what does."""
    rungs = partial(rungs_on, threat=threat, budget=budget, classes=classes)
    victims = [victim for attacked in every for victim in attacked.victims]
    return [rung for v in victims for rung in rungs(v, "joint" if v.rejects else "label")]


def outcome(attacked: Attacked, attempts: list[Tensor], images: Images, threat: Threat) -> Outcome:
    """Put everything that was found, each (N, 3, H, W), to one setup: in float and in 8 bits."""
    victim, label = attacked.victims[0], images.label.cpu().numpy()
    clean = victim.deployed(images.image)
    least = np.full(len(images), np.inf)
    bar = tqdm(attempts, desc=f"{attacked.setup.name}: all that was found", leave=False)
    for x in [to_float(images.image), *bar]:
        for answer in (victim.answer(x), victim.deployed(in_8_bits(x, images.image, threat))):
            wrong = np.where(answer.guess != label, answer.suspicion, np.inf)
            least = np.minimum(least, wrong)
    return Outcome(attacked, clean.guess == label, clean.suspicion, least)


def ablate(
    every: list[Attacked], images: Images, threat: Threat, budget: Budget, *, folder: Path
) -> list[Outcome]:
    """Attack every setup and put what was found to all; `folder` keeps it."""
    attempts = climb(ladder(every, threat, budget, len(images.classes)), images, folder)
    found = [item.x for item in attempts]
    return [
        outcome(attacked, found, images, threat)._replace(
            checks=tuple(self_checks(attacked, attempts, images, threat))
        )
        for attacked in every
    ]


def self_checks(
    attacked: Attacked, attempts: list[Attempt], images: Images, threat: Threat
) -> list[Check]:
    """Those of the detectors of a variant, at the rate that decides, on a few images that it gets
    right and accepts; none of other setups.
    """
    if attacked.setup.name not in get_args(Variant):
        return []
    victim = attacked.victims[AIMS.index(DECIDING)]
    own = next(item.x for item in attempts if item.rung.victim is victim)
    few = to_check(replay(victim, to_float(images.image), images, Threat(eps=0.0)))
    if not len(few):
        return []
    x, label = to_float(images.image[few]), images.label[few]
    joint = float(replay(victim, own, images, threat).safe[few].mean())
    check = partial(checks.check_detectors, victim.look, x, label, threat)
    return check(f"{victim.name}, detectors", queries=QUERIES, joint=joint)


def rows(outcomes: list[Outcome]) -> list[Row]:
    """The figures of every setup as the card lists them; the first is a classifier alone."""
    plain = next(outcome for outcome in outcomes if outcome.attacked.setup.name == MAX_SOFTMAX)
    durations = timings([outcome.attacked.engine for outcome in outcomes])
    out = []
    for outcome, milliseconds in zip(outcomes, durations, strict=True):
        row: Row = {
            "name": outcome.attacked.setup.name,
            "clean": share(outcome.right),
            "robust": share(np.isinf(outcome.least)),
            "milliseconds": milliseconds,
        }
        if outcome.attacked.calibration is not None:
            row["at"] = [at(rate, outcome, outcomes[0], plain) for rate in RATES]
        out.append(row)
    return out


def at(rate: float, outcome: Outcome, bare: Outcome, plain: Outcome) -> Row:
    """Figures at one rate, beside the `bare` classifier and beside `plain` max-softmax, which
    rejects as many clean images. What is `kept` is right and accepted when clean as well.
    """
    safe, rejected = outcome.safe(rate), ~outcome.passes(rate, outcome.suspicion)
    simple = plain.safe_with(min(int(rejected.sum()), len(rejected) - 1))
    return {
        "rate": rate,
        "clean_rejection": share(rejected),
        "robust_with_rejection": share(safe),
        "kept": share(safe & outcome.right & ~rejected),
        "gain": rounded(*difference(safe, bare.safe(rate))),
        "gain_over_max_softmax": rounded(*difference(safe, simple)),
    }


def gains(entry: Row) -> list[Row]:
    """An ablation's figures of what the variants add by rejection, as a card lists figures."""
    norm, eps = entry["threat_model"].split()
    origin = {name: entry[name] for name in ("data", "n", "attack", "command")}
    figure = partial(Figure, **origin, norm=norm, eps=eps)
    out = []
    for row in (row for row in entry["rows"] if row["name"] in get_args(Variant)):
        for point in (point for point in row["at"] if point["rate"] in SHOWN):
            for name, gain in (
                ("gain_over_classifier", point["gain"]),
                ("gain_over_max_softmax", point["gain_over_max_softmax"]),
            ):
                who, name = Subject("pipeline", row["name"]), f"{name}@{point['rate']:.0%}"
                value, interval = gain["value"], tuple(gain["interval"])
                out.append(figure(subject=who, name=name, value=value, interval=interval).row())
    return out


def timings(engines: list[Engine | None]) -> list[float | None]:
    """Median milliseconds of one image through each graph, in turns, so that all see the same."""
    seconds: list[list[float]] = [[] for _ in engines]
    for _ in range(ROUNDS):
        for engine, durations in zip(engines, seconds, strict=True):
            if engine is not None:
                image = np.zeros((1, *engine.image_shape), np.uint8)
                durations.append(timeit.timeit(partial(engine.run, image), number=1))
    return [round(1000 * float(np.median(times)), 3) if times else None for times in seconds]


def default(outcomes: list[Outcome]) -> Row:
    """The variant to serve, and why: one that costs more has to pass its self-checks, and to add
    something beyond chance to the best of the cheaper ones.
    """
    held = {outcome.attacked.setup.name: outcome.safe(DECIDING) for outcome in outcomes}
    failed = {o.attacked.setup.name for o in outcomes if not all(c.passed for c in o.checks)}
    best, reasons = "lean", []
    for dearer in (name for name in ("guarded", "full") if name in held):
        if dearer in failed:
            reasons.append(f"{dearer} failed a self-check, so its attack says little")
            continue
        added, (low, high) = difference(held[dearer], held[best])
        reasons.append(
            f"at {DECIDING:.0%} false alarms {dearer} holds {held[dearer].mean():.1%} of the"
            f" images, {best} {held[best].mean():.1%}: {100 * added:+.1f} points"
            f" ({100 * low:+.1f} to {100 * high:+.1f}); {dearer} costs more, so it must be better"
            " beyond chance"
        )
        best = dearer if low > 0 else best
    return {"variant": best, "why": "; ".join(reasons) or "there is no other variant"}


def entry(
    outcomes: list[Outcome],
    threat: Threat,
    budget: Budget,
    classes: int,
    *,
    data: str,
    command: str,
) -> Row:
    """What the card says of an ablation on images that `data` names."""
    aims = ", ".join(f"{rate:.0%}" for rate in AIMS)

    def effort(aim: Aim) -> str:
        return ", ".join(attack.effort(budget, classes) for attack in rungs_of(aim, budget))

    return {
        "data": data,
        "n": len(outcomes[0].right),
        "threat_model": str(threat),
        "attack": f"on labels {effort('label')}; on what rejects {effort('joint')}, which wants to"
        f" be accepted at {aims} false alarms (other rates are read off what it found)",
        "rows": rows(outcomes),
        "checks": [check._asdict() for outcome in outcomes for check in outcome.checks],
        "command": command,
    }


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of the rows, with rejection at 2% and 5% false alarms."""
    head = ["in front of the classifier", "clean", "robust"]
    for rate in SHOWN:
        head += [f"clean rejected at {rate:.0%}", "right or rejected", "gain, points"]
    body = []
    for row in rows:
        cells = [row["name"], cell_text(row["clean"]), cell_text(row["robust"])]
        points = {point["rate"]: at_cells(point) for point in row.get("at", [])}
        for rate in SHOWN:
            cells += points.get(rate, ["-"] * 3)
        ms = row["milliseconds"]
        body.append((*cells, f"{ms:.2f}" if ms else "-"))
    return (*head, "ms, 1 image, 1 thread"), body


def at_cells(point: Row) -> list[str]:
    """Rejection at one rate: its clean cost, what holds, and what that adds."""
    held = (point["clean_rejection"], point["robust_with_rejection"])
    return [*map(cell_text, held), gain_text(point["gain"])]


def curve_table(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of what rejects, at every rate of RATES."""
    front = ("in front of the classifier", "promised", "clean rejected", "right or rejected")
    head: tuple[str, ...] = (*front, "over the classifier, points", "over max-softmax, points")
    points = [(row["name"], point) for row in rows for point in row.get("at", [])]
    body: list[tuple[str, ...]] = [
        (name, f"{point['rate']:.1%}", *at_cells(point), gain_text(point["gain_over_max_softmax"]))
        for name, point in points
    ]
    if all("kept" in point for _, point in points):  # earlier cards do not say
        head = (*head, KEPT)
        rest = (cell_text(point["kept"]) for _, point in points)
        body = [(*cells, kept) for cells, kept in zip(body, rest, strict=True)]
    return head, body
