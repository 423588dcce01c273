"""The evaluation ladder: how strong is what is deployed, against somebody who knows all of it?
Every victim gets every image that a rung finds, in float and in 8 bits through the exported graph:
robust is what nothing found beats.
"""

import hashlib
import timeit
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rampart.hardening.attack import cache
from rampart.hardening.attack.ladder import SMALL, Aim, Attack, Budget, in_8_bits, rungs_of
from rampart.hardening.attack.objectives import Look
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Answer, Victim, max_softmax_victim
from rampart.hardening.judge import checks
from rampart.hardening.judge.checks import Check
from rampart.hardening.judge.metrics import Metric, detection, difference
from rampart.hardening.model.arrays import Bools
from rampart.hardening.model.card import FP32, Row
from rampart.hardening.model.images import Images, batches
from rampart.hardening.model.pixels import to_float

# Images that the self-checks look at, and queries of theirs to Square.
CHECKED, QUERIES = 40, 200
# Modules that what is found depends on: what attacks a label, and what is attacked beside it.
ATTACK_CODE = ("attack/pgd", "attack/ladder", "attack/noise", "attack/objectives")
DEFENCE_CODE = ("model/calibrate", "model/detectors", "model/pipeline", "model/purifier")
LABEL_CODE = (*ATTACK_CODE, "model/classifier", "model/pixels", "model/wrapping")
PIPELINE_CODE = (*LABEL_CODE, "attack/victims", *DEFENCE_CODE)
AIMS: tuple[Aim, ...] = ("label", "joint", "flood")
BARE = ("classifier", "undefended")  # victims that nothing stands in front of
UNPURIFIED = ("lean", "guarded")  # variants whose label is the classifier's


class Rung(NamedTuple):
    """One attack on one victim; `effort` is how figures name it."""

    victim: Victim
    attack: Attack
    threat: Threat
    budget: Budget
    effort: str

    @property
    def name(self) -> str:
        """That of its attack."""
        return self.attack.name

    @property
    def aim(self) -> Aim:
        """That of its attack."""
        return self.attack.aim

    @property
    def look(self) -> Look:
        """What is attacked: the label alone, which is cheaper, or all of the victim."""
        return self.victim.label_look if self.aim == "label" else self.victim.look

    @property
    def fingerprint(self) -> str:
        """What it depends on beside attack and threat."""
        label, whole = self.victim.label_fingerprint, self.victim.fingerprint
        return label if self.aim == "label" else whole


def rungs_on(
    victim: Victim, aim: Aim, threat: Threat, budget: Budget, *, classes: int, within: bool = False
) -> list[Rung]:
    """The attacks with one aim on a victim: at all of eps or, `within` it, at parts."""
    return [
        Rung(victim, attack, near, budget, attack.effort(budget, classes))
        for attack in rungs_of(aim, budget)
        for share in (attack.shares if within else (1.0,))
        for near in (threat._replace(eps=threat.eps * share),)
    ]


class Replay(NamedTuple):
    """What found images do to one victim, in float and in 8 bits: both must be withstood."""

    right: Bools  # (N,) the label is right
    safe: Bools  # (N,) the label is right, or the image rejected
    rejected: Bools  # (N,) rejected in either form
    deployed: Answer
    fooled: Bools  # (N,) the deployed label is wrong


class Attempt(NamedTuple):
    """The images that a rung made."""

    rung: Rung
    x: Tensor  # (N, 3, H, W)


def replay(victim: Victim, x: Tensor, images: Images, threat: Threat) -> Replay:
    """Put x (N, 3, H, W), made from `images`, to `victim` in float and through its 8-bit entry."""
    label = images.label.cpu().numpy()
    deployed = victim.deployed(in_8_bits(x, images.image, threat))
    both = (victim.answer(x), deployed)
    right = [answer.guess == label for answer in both]
    safe = [r | ~answer.accepted for r, answer in zip(right, both, strict=True)]
    rejected = ~both[0].accepted | ~both[1].accepted
    return Replay(right[0] & right[1], safe[0] & safe[1], rejected, deployed, ~right[1])


def climb(ladder: list[Rung], images: Images, folder: Path) -> list[Attempt]:
    """Run every rung on `images`; what `folder` holds from an earlier run is not made again."""
    attempts = []
    for rung in ladder:
        victim, attack = rung.victim, rung.attack
        source = attack_source(LABEL_CODE if victim.name in BARE else PIPELINE_CODE)
        key = f"{source} {rung.fingerprint} {rung.name} {rung.effort} {rung.threat}"
        title = f"{victim.name}, {rung.name}, {rung.threat}"
        craft = partial(attack.craft, rung.look, threat=rung.threat, budget=rung.budget)
        if attack.labels:
            craft = partial(craft, labels=victim.label_look)
        batch = cache.batch_of(attack.passes(rung.budget), images.image.device)
        keep = partial(cache.crafted, folder, key, images, craft)
        attempts.append(Attempt(rung, keep(title=title, batch=batch)))
    return attempts


def attack_source(modules: tuple[str, ...]) -> str:
    """Stands for the code of these `modules` of this package: what other code found is no use."""
    files = [Path(__file__).parents[1] / f"{name}.py" for name in modules]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return f"{digest.hexdigest()[:16]} pyautoattack {version('pyautoattack')}"


def estimate(
    victims: list[Victim], images: Images, threat: Threat, budget: Budget, *, only: list[str]
) -> float:
    """Seconds that `evaluate` will take: half of all passes, since images that fall drop out."""
    x, label = next(iter(batches(images, 16)))
    total = 0.0
    for victim in victims:
        planned = chosen(ladder([victim], threat, budget, len(images.classes)), threat, only)
        # The max-softmax alternative is attacked with the same budget.
        planned += [rung for rung in planned if rung.attack.aim == "joint" and not only]
        passes = {victim.label_look: 0.0, victim.look: 0.0}
        for rung in planned:
            passes[rung.look] += rung.attack.passes(budget) / 2 * len(images)
        if has_own_label(victim) and not only:
            passes[victim.label_look] += CHECKED * (sum(checks.STEPS) + 200 + QUERIES / 3)
        for look, count in passes.items():
            if count:
                one_pass = partial(checks.gradients, look, x, label, victim.name)
                seconds = min(timeit.repeat(one_pass, number=1, repeat=3)) / len(x)
                total += seconds * count
    return total


def chosen(every: list[Rung], threat: Threat, only: list[str]) -> list[Rung]:
    """The rungs at full eps that `only` names; all, at every eps, where it names none."""
    return [r for r in every if not only or (r.name in only and r.threat == threat)]


def check_names(every: list[Rung], only: list[str]) -> None:
    """Raise ValueError where `only` names an attack that is not among the rungs."""
    names = sorted({rung.name for rung in every})
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"no attack {', '.join(unknown)}: choose among {', '.join(names)}")


class Record(NamedTuple):
    """All that happened to one victim: clean, and under every rung of the ladder."""

    victim: Victim
    clean: Replay
    under: list[tuple[Rung, Replay]]
    budget: str

    def attacks(self, name: str) -> list[tuple[Rung, Replay]]:
        """Those called `name` on this victim, full eps last; with the classifier's where this is
        what labels.
        """
        shared = self.victim.subject.variant in UNPURIFIED
        twins = {self.victim.name, "classifier" if shared else ""}
        mine = [(r, after) for r, after in self.under if r.name == name and r.victim.name in twins]
        return sorted(mine, key=lambda pair: (pair[0].threat.eps, pair[0].victim is self.victim))

    def own(self, name: str) -> tuple[Rung, Replay]:
        """The attack called `name` on this victim at full eps."""
        return self.attacks(name)[-1]

    def transfer(self) -> tuple[Rung, Replay] | None:
        """PGD-20 on the undefended twin, where there is one."""
        twins = (pair for pair in self.under if pair[0].victim.subject.kind == "undefended")
        return next((pair for pair in twins if pair[0].name == "pgd20"), None)

    def metric(self, name: str, share: Bools, rung: Rung | None = None) -> Metric:
        """The figure that `share` (N,) of the images makes."""
        threat, attack = (rung.threat, rung.effort) if rung else (None, "")
        return Metric(self.victim.subject, name, float(share.mean()), len(share), threat, attack)

    def worst(self, of: str) -> Bools:
        """The images (N,) that are `of` (right or safe) clean and under every rung."""
        every = (self.clean, *(after for _, after in self.under))
        held: Bools = np.logical_and.reduce([getattr(after, of) for after in every])
        return held

    def everything(self) -> Rung:
        """What stands beside a worst case."""
        largest = max((rung for rung, _ in self.under), key=lambda rung: rung.threat.eps)
        if len(self.under) == 1:
            return largest
        short = "short " if any(rung.name == "autoattack_short" for rung, _ in self.under) else ""
        what = f"worst case over {len(self.under)} attacks in float and 8-bit"
        return largest._replace(effort=f"{what} ({short}AutoAttack, {self.budget})")


def record_of(victim: Victim, attempts: list[Attempt], images: Images, budget: str) -> Record:
    """Put everything that was found to one victim."""
    clean = replay(victim, to_float(images.image), images, Threat(eps=0.0))
    under = [(item.rung, replay(victim, item.x, images, item.rung.threat)) for item in attempts]
    return Record(victim, clean, under, budget)


def attack_figures(record: Record) -> Iterator[Metric]:
    """Clean accuracy and rejection, transfer, and every attack on this victim."""
    clean = record.clean
    yield record.metric("clean", clean.right)
    if record.victim.rejects:
        yield record.metric("clean_rejection", ~clean.deployed.accepted)
    if record.victim.subject.kind != "undefended" and (moved := record.transfer()):
        rung, after = moved
        how = rung._replace(effort=f"{rung.effort}, made on the undefended twin")
        yield record.metric("transfer", clean.right & after.right, how)
    for name, aim in {rung.name: rung.attack.aim for rung, _ in record.under}.items():
        if not (mine := record.attacks(name)):
            continue
        rung, after = mine[-1]
        if aim == "flood":
            floods = [after.rejected for rung, after in record.under if rung.name == name]
            yield record.metric(name, np.logical_or.reduce(floods), rung)
        else:
            of = "right" if aim == "label" else "safe"
            yield record.metric(name, getattr(clean, of) & getattr(after, of), rung)


def rejection_figures(record: Record, plain: Record, rate: float) -> Iterator[Metric]:
    """What rejecting adds, beside max-softmax rejection (`plain`) at the same clean rate."""
    percent = f"{100 * rate:g}%"
    safe, everything = record.worst("safe"), record.everything()
    yield record.metric(f"robust_with_rejection@{percent}", safe, everything)
    yield record.metric("accepted_and_wrong", ~safe, everything)
    simple = plain.worst("safe")
    yield plain.metric("clean_rejection", ~plain.clean.deployed.accepted)
    yield plain.metric(f"robust_with_rejection@{percent}", simple, everything)
    gap, interval = difference(safe, simple)
    gain = record.metric(f"gain_over_max_softmax@{percent}", safe, everything)
    yield gain._replace(value=gap, interval=interval)
    yield from stratified(record, safe)
    yield from detection_figures(record)


def stratified(record: Record, safe: Bools) -> Iterator[Metric]:
    """Safe up to eps, and right *and accepted* up to a part of it: rejecting little is an error."""
    eps = record.everything().threat.eps
    for share in (0.0, *SMALL, 1.0):
        small = [after for rung, after in record.under if rung.threat.eps <= share * eps + 1e-9]
        held = [after.right & ~after.rejected for after in (record.clean, *small)]
        rung = record.everything()
        near = rung.threat._replace(eps=share * eps)
        rung = rung._replace(effort=f"{rung.effort}; a rejection up to {near} is an error")
        yield record.metric(f"stratified@{share:g}eps", np.logical_and.reduce([safe, *held]), rung)


def detection_figures(record: Record) -> Iterator[Metric]:
    """How well suspicion tells wrong images; the joint attack stops at the threshold."""
    rung, after = record.own("joint_apgd")
    wrong = record.clean.right & after.fooled
    if wrong.any():
        yield record.metric("caught:joint_apgd", ~after.deployed.accepted[wrong], rung)
    rung, after = record.own("pgd20")
    wrong = record.clean.right & after.fooled
    if wrong.any():
        base = record.metric("", wrong[wrong], rung)
        clean, attacked = record.clean.deployed.suspicion, after.deployed.suspicion[wrong]
        for title, (value, interval) in detection(clean, attacked).items():
            yield base._replace(name=f"{title}:pgd20", value=value, interval=interval)


class Evaluation(NamedTuple):
    """All that an evaluation saw."""

    images: Images
    threat: Threat
    metrics: list[Metric]
    checks: list[Check]
    records: dict[str, Record]  # by the victim's name
    attempts: list[Attempt]
    knowledge: str = "knows every part"  # of the attacker
    worst: str = "worst case"  # what is left is called

    def on(self, data: str) -> "Evaluation":
        """The same, whose self-checks say on which images: `data` names them."""
        named = [check._replace(data=data, n=len(self.images)) for check in self.checks]
        return self._replace(checks=named)

    @property
    def check_rows(self) -> list[Row]:
        """The self-checks as cards have them."""
        return [check._asdict() for check in self.checks]


def ladder(victims: list[Victim], threat: Threat, budget: Budget, classes: int) -> list[Rung]:
    """Every rung for `victims`."""
    out: list[Rung] = []
    for victim in victims:
        make = partial(rungs_on, victim, threat=threat, budget=budget, classes=classes)
        if has_own_label(victim):
            out += make("label")
        if victim.rejects:
            out += make("joint")
        if victim.rejects and victim.subject.kind != "max_softmax":
            out += make("flood")
            for aim in AIMS:
                out += make(aim, within=True)
    return out


def has_own_label(victim: Victim) -> bool:
    """Whether no other victim has the same label; without a purifier it is the classifier's."""
    subject = victim.subject
    shared = subject.precision == FP32 and subject.variant in UNPURIFIED
    return not victim.rejects or (subject.kind == "pipeline" and not shared)


def evaluate(
    victims: list[Victim],
    images: Images,
    threat: Threat,
    budget: Budget,
    *,
    rate: float,
    folder: Path,
    only: list[str],
) -> Evaluation:
    """Climb the ladder, or its rungs named `only`; `folder` keeps the images found. `victims` hold
    the classifier first, then pipelines and, as a control, an undefended twin. Raises ValueError
    where `only` names no rung.
    """
    # The plain alternative plays a part in worst cases alone.
    rejecting = [] if only else [v for v in victims if v.rejects]
    plain = {v.name: max_softmax_victim(v, images.image) for v in rejecting}
    whole = ladder([*victims, *plain.values()], threat, budget, len(images.classes))
    check_names(whole, only)
    if not (rungs := chosen(whole, threat, only)):
        raise ValueError(f"{', '.join(only)} is made on the classifier: leave out --variant")
    attempts = climb(rungs, images, folder)
    everyone = [*victims, *plain.values()]
    records = {v.name: record_of(v, attempts, images, str(budget)) for v in everyone}
    metrics: list[Metric] = []
    for record in (records[v.name] for v in victims):
        metrics += attack_figures(record)
        if only:
            continue
        metrics.append(record.metric("robust", record.worst("right"), record.everything()))
        if record.victim.rejects:
            metrics += rejection_figures(record, records[plain[record.victim.name].name], rate)
    if only:
        return Evaluation(images, threat, metrics, [], records, attempts)
    metrics += added(records, [v.name for v in victims], rate)
    checked = self_checks(victims, records, images, threat)
    return Evaluation(images, threat, metrics, checked, records, attempts)


def added(records: dict[str, Record], names: list[str], rate: float) -> Iterator[Metric]:
    """What each pipeline adds to the bare classifier: the number that decides the default."""
    alone = records[names[0]].worst("right")
    for record in (records[name] for name in names if records[name].victim.rejects):
        gap, interval = difference(record.worst("safe"), alone)
        name = f"gain_over_classifier@{100 * rate:g}%"
        metric = record.metric(name, alone, record.everything())
        yield metric._replace(value=gap, interval=interval)


def self_checks(
    victims: list[Victim], records: dict[str, Record], images: Images, threat: Threat
) -> list[Check]:
    """Every check on every defended victim, on images that it gets right and accepts."""
    out: list[Check] = []
    defended = [victim for victim in victims if victim.subject.kind != "undefended"]
    for victim in tqdm(defended, desc="self-checks", leave=False):
        record = records[victim.name]
        few = to_check(record.clean)
        if not len(few):
            raise ValueError(
                f"{victim.name} gets no image right, so there is nothing to attack: check labels"
                " and classes, or pass more images"
            )
        x, label = to_float(images.image[few]), images.label[few]
        if has_own_label(victim):
            look = victim.label_look
            out += checks.check_look(look, x, label, threat, victim.name, queries=QUERIES)
        if victim.rejects:
            joint = float(record.own("joint_apgd")[1].safe[few].mean())
            check = partial(checks.check_detectors, victim.look, x, label, threat)
            out += check(f"{victim.name}, detectors", queries=QUERIES, joint=joint)
        out += outcome_checks(record)
    return out


def to_check(clean: Replay) -> NDArray[np.int64]:
    """The rows of CHECKED images at most that are right and accepted."""
    right = np.flatnonzero(clean.right & ~clean.rejected)
    # Evenly spaced: a folder of images is sorted by class.
    chosen = np.linspace(0, len(right) - 1, min(CHECKED, len(right))).astype(int)
    few: NDArray[np.int64] = right[chosen]
    return few


def outcome_checks(record: Record) -> Iterator[Check]:
    """Checks of what the rungs found: transfer against gradients, ignoring against joint."""
    name, clean, static = record.victim.name, record.clean, record.own("pgd20")[1]
    if moved := record.transfer():
        white, blind = (float((clean.right & after.right).mean()) for after in (static, moved[1]))
        finding = "transfer from the undefended twin"
        yield checks.black_box(white, blind, name, finding, count=len(clean.right))
    if record.victim.rejects:
        joint = record.own("joint_apgd")[1]
        alone, both = (float((clean.safe & after.safe).mean()) for after in (static, joint))
        yield from checks.adaptive(alone, both, name, count=len(clean.right))
