"""Figures of an object detector, clean and under each attack and the worst of all for each image.

An attacked picture is rounded to 8 bits first, as one is sent; a square picture of the model's size
reaches it as it is.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rampart.hardening.attack.cache import write
from rampart.hardening.attack.ladder import in_8_bits
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.patch import ANY_COLOUR
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.evaluate import attack_source
from rampart.hardening.model import checkpoint
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects.attack import Budget, attack, attacks_of, masked, patches
from rampart.hardening.objects.boxes import Found, Truth
from rampart.hardening.objects.detector import ObjectDetector
from rampart.hardening.objects.guard import Guard
from rampart.hardening.objects.precision import count, interval, precision
from rampart.hardening.objects.scenes import Boxed

TOGETHER = 8  # pictures that are attacked together
CLEAN, WORST, SERVED = "clean", "worst case", "as served"
ACCEPTED = f"{WORST}, accepted"
# The code that what attacks found depends on.
ATTACKS = ("attack/pgd", "attack/noise", "attack/ladder", "objects/attack")
BUILT = ("detector", "boxes", "own", "single_stage", "two_stage")
SOURCE = (*ATTACKS, "model/classifier", "model/purifier", *(f"objects/{name}" for name in BUILT))
GUARDS = ("guard", "defended", "step", "suspicions")
GUARD_SOURCE = (*(f"objects/{name}" for name in GUARDS), "model/calibrate")
STICKER_SOURCE = ("attack/patch",)
LIBRARIES = ("torch", "torchvision", "rampart")  # whose networks are none of yours


class Figures(NamedTuple):
    """What was found in `n` pictures."""

    map50: float
    interval: tuple[float, float]  # 95%, of map50, by bootstrap over pictures
    ap: float  # COCO's
    classes: tuple[float, ...]  # map50 of each
    kept: float  # share of objects among the boxes that people see
    false: float  # other boxes that people see, a picture
    n: int
    flagged: float | None = None  # share of the pictures; None without a guard

    def as_json(self, names: Sequence[str]) -> dict[str, Any]:
        """As cards have it."""
        each = dict(zip(names, (rounded(value) for value in self.classes), strict=True))
        return {
            "map50": rounded(self.map50),
            "interval": [rounded(bound) for bound in self.interval],
            "ap": rounded(self.ap),
            "classes": each,
            "objects_kept": rounded(self.kept),
            "false_boxes": rounded(self.false),
            "n": self.n,
        } | ({} if self.flagged is None else {"flagged": rounded(self.flagged)})


def rounded(value: float) -> float | None:
    """Four digits; None for what has no value, as a class that no picture shows."""
    return None if math.isnan(value) else round(value, 4)


def figures(truth: Sequence[Truth], found: Sequence[Found], classes: int) -> Figures:
    """How well objects were found."""
    exact = precision(truth, found, classes)
    counts = [count(real, seen) for real, seen in zip(truth, found, strict=True)]
    objects, kept, false = (sum(values) for values in zip(*counts, strict=True))
    bounds = interval(truth, found, classes)
    share = kept / objects if objects else float("nan")
    return Figures(
        exact.map50, bounds, exact.ap, exact.classes, share, false / len(truth), len(truth)
    )


def merit(truth: Truth, found: Found, classes: int) -> tuple[float, int]:
    """How good an answer on one picture is: its mAP50, then how few false boxes are seen."""
    false = -count(truth, found).false
    return (precision([truth], [found], classes).map50 if len(truth.boxes) else 0.0, false)


Finding = Callable[[Tensor], list[Found]]  # in uint8 (N, S, S, 3)
Notice = Callable[[str, Figures], None]  # the name of a row, and the row


class Judgement(NamedTuple):
    """Figures by attack, `clean` and `worst case` among them, and what makes them doubtful."""

    rows: dict[str, Figures]
    found: dict[str, list[Found]]
    blind: int  # pictures without a gradient: attacks that follow one are blind there


class Tally:
    """What was found in the same pictures under each attack, by the detector and as served."""

    def __init__(
        self, boxed: Boxed, sides: Mapping[str, Finding], guard: Guard | None, notice: Notice
    ) -> None:
        self.boxed, self.sides, self.guard, self.notice = boxed, sides, guard, notice
        self.found: dict[str, dict[str, list[Found]]] = {side: {} for side in sides}
        self.flags: dict[str, list[bool]] = {}
        self.rows: dict[str, Figures] = {}

    def look(self, name: str, image: Tensor) -> None:
        """Note what is found in the pictures uint8 (N, S, S, 3) as an attack left them."""
        for side, find in self.sides.items():
            self.found[side][name] = find(image)
        if self.guard:
            self.flags[name] = self.guard.flags(image).tolist()
        self.note(name, self.found[""][name])

    def note(self, name: str, found: list[Found]) -> None:
        """Note a row, and tell it."""
        self.rows[name] = figures(self.boxed.truth, found, len(self.boxed.classes))
        if flags := self.flags.get(name):
            self.rows[name] = self.rows[name]._replace(flagged=sum(flags) / len(flags))
        self.notice(name, self.rows[name])

    def conclude(self) -> None:
        """Note the worst cases of all that was looked at."""
        truth, classes = self.boxed.truth, len(self.boxed.classes)
        for side, tries in self.found.items():
            if side:
                self.note(CLEAN + side, tries[CLEAN])
            tries[WORST] = list(hardest(truth, list(tries.values()), classes))
            self.note(WORST + side, tries[WORST])
        if not self.guard:
            return
        tries = {name: self.found[""][name] for name in self.flags}
        passed = accepted(truth, tries, self.flags, classes)
        if passed:
            self.rows[ACCEPTED] = figures(*passed, classes)
            self.notice(ACCEPTED, self.rows[ACCEPTED])


def judge(
    detector: ObjectDetector,
    boxed: Boxed,
    threat: Threat,
    budget: Budget,
    *,
    source: ObjectDetector | None = None,
    guard: Guard | None = None,
    served: Finding | None = None,
    cache: Path | None = None,
    notice: Notice = lambda name, row: None,
) -> Judgement:
    """Attack a detector with full knowledge, or with what is crafted on `source`.

    With a `guard` there are attacks that know it too, and a worst case of what it lets through.
    `served` is the graph that is served; it gets rows of its own, on the same attacked pictures.
    Patches are outside the threat model, and so in no worst case. `cache` keeps what attacks find,
    so that a judgement goes on where it was interrupted. `notice` is told of each row once it is
    known.
    """
    crafted_on = source or detector
    sides = {"": partial(seen, detector)} | ({f", {SERVED}": served} if served else {})
    tally = Tally(boxed, sides, guard, notice)
    tally.look(CLEAN, boxed.image)
    known = guard if crafted_on is detector else None
    there = boxed.to(crafted_on.mean.device)
    identity = f"{checkpoint.digest(crafted_on)} {own_code(crafted_on)}"

    def look(name: str, how: tuple[str, str], threat: Threat) -> None:
        craft = partial(attack, crafted_on, threat=threat, how=how, budget=budget, guard=known)
        key = f"{keyed(how, budget, known)} {identity} {threat!r} {name}"
        image = attacked(there, craft, threat, title=name, key=key, cache=cache)
        tally.look(name, image.to(boxed.image.device))

    for name, how in attacks_of(crafted_on, budget, guarded=known is not None).items():
        look(name, how, threat)
    tally.conclude()
    for name, how in patches().items() if budget.patches else ():
        look(name, how, ANY_COLOUR)
    return Judgement(tally.rows, tally.found[""], blindness(detector, there))


def keyed(how: tuple[str, str], budget: Budget, guard: Guard | None) -> str:
    """What the finds of an attack depend on beside the detector and the pictures."""
    algorithm, _ = how
    if algorithm == "patch":
        return attack_source((*SOURCE, *STICKER_SOURCE))
    if algorithm == "search":
        return f"{attack_source(SOURCE)} {budget.queries} queries"
    known = f" {guard.digest()}" if algorithm == "unseen" and guard else ""
    return f"{attack_source((*SOURCE, *(GUARD_SOURCE if known else ())))}{known} {budget.steps}"


def own_code(detector: ObjectDetector) -> str:
    """Stands for the code of a network of yours: of its parts, and of the factory that built it."""
    modules = {type(part).__module__ for part in detector.modules()}
    yours = {name for name in modules if name.partition(".")[0] not in LIBRARIES}
    yours.add(detector.config.arch.partition(":")[0])
    files = {getattr(sys.modules.get(name), "__file__", None) for name in yours}
    code = b"".join(Path(file).read_bytes() for file in sorted(filter(None, files)))
    return hashlib.sha256(code).hexdigest()[:16]


def accepted(
    truth: Sequence[Truth],
    tries: Mapping[str, Sequence[Found]],
    flags: Mapping[str, Sequence[bool]],
    classes: int,
) -> tuple[list[Truth], Sequence[Found]] | None:
    """The `hardest` answers among those that were not flagged, and the pictures that have any.

    None where every picture is flagged under every attack.
    """
    real, passed = [], []
    for row, one in enumerate(truth):
        answers = [found[row] for name, found in tries.items() if not flags[name][row]]
        if answers:
            worst_one = min(answers, key=lambda found: merit(one, found, classes))
            each = [worst_one if flags[name][row] else tries[name][row] for name in tries]
            real.append(one)
            passed.append([worst_one, *each])
    return (real, hardest(real, list(zip(*passed, strict=True)), classes)) if real else None


def worst(truth: Sequence[Truth], tries: Sequence[Sequence[Found]], classes: int) -> list[Found]:
    """For each picture the answer under the attack that hurt it most."""
    return [
        min(answers, key=lambda found: merit(real, found, classes))
        for real, answers in zip(truth, zip(*tries, strict=True), strict=True)
    ]


def hardest(
    truth: Sequence[Truth], tries: Sequence[Sequence[Found]], classes: int
) -> Sequence[Found]:
    """The answers of `worst`, or those under one attack where these are worse.

    What hurts each picture most need not hurt most where scores of all are ranked together. The
    clean pictures are among an attacker's choices.
    """
    every = (worst(truth, tries, classes), *tries)
    return min(every, key=lambda found: precision(truth, found, classes).map50)


def seen(detector: ObjectDetector, image: Tensor) -> list[Found]:
    """What a detector finds in uint8 (N, S, S, 3), beside them whatever its device is."""
    parts = (to_float(some.to(detector.mean.device)) for some in torch.split(image, TOGETHER))
    with torch.no_grad():
        found = [one for x in parts for one in detector(x)]
    return [Found(*(part.to(image.device) for part in one)) for one in found]


def blindness(detector: ObjectDetector, boxed: Boxed) -> int:
    """How many pictures have no gradient."""
    parts = torch.split(torch.arange(len(boxed)), TOGETHER)
    some = (boxed[rows.tolist()] for rows in parts)
    return sum(int(masked(detector, to_float(s.image), s.truth).sum()) for s in some)


def attacked(
    boxed: Boxed,
    craft: Callable[..., Tensor],
    threat: Threat,
    *,
    title: str = "",
    key: str = "",
    cache: Path | None = None,
) -> Tensor:
    """All pictures, uint8 (N, S, S, 3), as `craft` leaves them; `cache` keeps them under `key`."""
    parts = []
    rounds = torch.split(torch.arange(len(boxed)), TOGETHER)
    for rows in tqdm(rounds, title, leave=False, disable=not title):
        some = boxed[rows.tolist()]
        own = hashlib.sha256(f"{key} {rows[0]} {some.digest()}".encode()).hexdigest()[:24]
        file = cache / f"{own}.npy" if cache else None
        if file and file.is_file():
            parts.append(torch.from_numpy(np.load(file)).to(boxed.image.device))
            continue
        noise = Noise(rows.to(boxed.image.device))
        x = craft(to_float(some.image), some.truth, noise=noise)
        parts.append(in_8_bits(x, some.image, threat))
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, parts[-1].cpu().numpy())
    return torch.cat(parts)


def table(rows: Mapping[str, Figures], names: Sequence[str]) -> list[str]:
    """The figures as lines of text."""
    head = f"{'':22} mAP50  95% interval    AP     kept   false  flagged  " + " ".join(names)
    return [head, *(line(name, row) for name, row in rows.items())]


def line(name: str, row: Figures) -> str:
    """One row of the table."""
    low, high = row.interval
    each = " ".join(f"{value:.2f}" for value in row.classes)
    flagged = "-" if row.flagged is None else f"{row.flagged:.1%}"
    return (
        f"{name:22} {row.map50:.3f}  {low:.3f} to {high:.3f}  {row.ap:.3f}  {row.kept:.3f}"
        f"  {row.false:5.2f}  {flagged:>7}  {each}"
    )
