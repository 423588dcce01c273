"""The evaluation ladder: how strong is what is deployed, against somebody who knows all of it?

    rampart evaluate model_store/NAME --data cifar10-test.npz --quick

Rungs craft images against the classifier, the pipeline's label, the pipeline with its detectors,
and an undefended twin. Every image they find is then put to every victim, in float and rounded to
8 bits through the exported graph: an image is robust only if nothing found by any rung beats it.
"""

import hashlib
import timeit
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from hardening import cache, checks, rungs
from hardening.attacks import Threat
from hardening.checks import Check
from hardening.data import Images, batches, to_float
from hardening.metrics import Bools, Metric, detection, difference
from hardening.rungs import Budget, in_8_bits
from hardening.victims import GRAPH, Answer, Victim, max_softmax_victim

# Shares of eps at which a rejection counts as an error, in the stratified figure.
SMALL = (0.25, 0.5)
# Images that the self-checks look at, and queries of theirs to Square.
CHECKED, QUERIES = 40, 200
PGD20 = "PGD, 20 steps of eps/4"
# Modules that what is found depends on: what attacks a label, and what is attacked beside it.
LABEL_CODE = ("attacks", "data", "models", "noise", "objectives", "rungs")
PIPELINE_CODE = (*LABEL_CODE, "calibrate", "detectors", "pipeline", "purifier", "victims")
BARE = ("classifier", "undefended")  # victims that nothing stands in front of
LABEL_RUNGS = ("pgd20", "autoattack", "autoattack_short")


class Rung(NamedTuple):
    """One attack on one victim; `passes` estimates its forward-backward passes an image."""

    name: str
    victim: Victim
    attack: str
    threat: Threat
    passes: float
    craft: cache.Craft
    fingerprint: str  # what it depends on beside attack and threat


def label_rungs(victim: Victim, threat: Threat, budget: Budget, classes: int) -> Iterator[Rung]:
    """Attacks on a victim's label alone."""
    look, key = victim.label_look, victim.label_fingerprint
    pgd20 = partial(rungs.pgd20, look, threat=threat)
    yield Rung("pgd20", victim, PGD20, threat, 21, pgd20, key)
    standard = budget.standard
    name = "autoattack" if standard else "autoattack_short"
    what = f"{' + '.join(rungs.parts(budget, classes).values())}, {budget}"
    what = "AutoAttack, standard" if standard and classes >= 4 else what
    passes = (budget.steps * (1 + budget.targets) + budget.queries / 3) * (2 if standard else 1)
    craft = partial(rungs.autoattack, look, threat=threat, budget=budget)
    yield Rung(name, victim, what, threat, passes, craft, key)


def rejection_rungs(victim: Victim, threat: Threat, budget: Budget) -> Iterator[Rung]:
    """Attacks on label and detectors together, and on the detectors alone."""
    look, key, steps = victim.look, victim.fingerprint, budget.steps
    joint = partial(rungs.joint_apgd, look, threat=threat, budget=budget)
    what = f"joint APGD (penalty, selective, orthogonal, targeted), {budget}"
    yield Rung("joint_apgd", victim, what, threat, steps * (4 + budget.targets), joint, key)
    if victim.subject.startswith("max_softmax"):
        return
    flood = f"APGD on the detectors alone, {steps} steps"
    for share in (*SMALL, 1.0):
        near = threat._replace(eps=threat.eps * share)
        flooding = partial(rungs.forced_rejection, look, threat=near, budget=budget)
        yield Rung("forced_rejection", victim, flood, near, steps, flooding, key)
        if share < 1:
            pgd20 = partial(rungs.pgd20, victim.label_look, threat=near)
            yield Rung("pgd20", victim, PGD20, near, 21, pgd20, victim.label_fingerprint)


class Replay(NamedTuple):
    """What found images do to one victim, in float and in 8 bits: both must be withstood."""

    right: Bools  # (N,) the label is right
    safe: Bools  # (N,) the label is right, or the image rejected
    rejected: Bools  # (N,) rejected in either form
    deployed: Answer
    fooled: Bools  # (N,) the deployed label is wrong


class Found(NamedTuple):
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


def climb(ladder: list[Rung], images: Images, folder: Path) -> list[Found]:
    """Run every rung on `images`; what `folder` holds from an earlier run is not made again."""
    found = []
    for rung in ladder:
        bare = rung.victim.name in BARE
        source = attack_source(LABEL_CODE if bare else PIPELINE_CODE)
        key = f"{source} {rung.fingerprint} {rung.name} {rung.attack} {rung.threat}"
        title = f"{rung.victim.name}, {rung.name}, {rung.threat}"
        found.append(Found(rung, cache.crafted(folder, key, images, rung.craft, title=title)))
    return found


def attack_source(modules: tuple[str, ...]) -> str:
    """Stands for the code of these `modules` of this package: what other code found is no use."""
    files = [Path(__file__).with_name(f"{name}.py") for name in modules]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return f"{digest.hexdigest()[:16]} pyautoattack {version('pyautoattack')}"


def estimate(
    victims: list[Victim], images: Images, threat: Threat, budget: Budget, *, only: list[str]
) -> float:
    """Seconds that `evaluate` will take, from timed passes through each victim.

    Half of all passes are counted: images that fall early are attacked no further.
    """
    x, label = next(iter(batches(images, 16)))
    total = 0.0
    for victim in victims:
        planned = chosen(ladder([victim], threat, budget, len(images.classes)), threat, only)
        # The max-softmax alternative is attacked with the same budget.
        planned += [rung for rung in planned if rung.name == "joint_apgd" and not only]
        passes = {victim.label_look: 0.0, victim.look: 0.0}
        for rung in planned:
            look = victim.label_look if rung.name in LABEL_RUNGS else victim.look
            passes[look] += rung.passes / 2 * len(images)
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


class Record(NamedTuple):
    """All that happened to one victim: clean, and under every rung of the ladder."""

    victim: Victim
    clean: Replay
    under: list[tuple[Rung, Replay]]
    budget: str

    def attacks(self, name: str) -> list[tuple[Rung, Replay]]:
        """Those called `name` on this victim, that at full eps last; `lean` labels as the
        classifier."""
        twins = {self.victim.name, "classifier" if self.victim.variant == "lean" else ""}
        mine = [(r, after) for r, after in self.under if r.name == name and r.victim.name in twins]
        return sorted(mine, key=lambda pair: (pair[0].threat.eps, pair[0].victim is self.victim))

    def own(self, name: str) -> tuple[Rung, Replay]:
        """The attack called `name` on this victim at full eps."""
        return self.attacks(name)[-1]

    def metric(self, name: str, share: Bools, rung: Rung | None = None) -> Metric:
        """The figure that `share` (N,) of the images makes."""
        threat, attack = (rung.threat, rung.attack) if rung else (None, "")
        value, n = float(share.mean()), len(share)
        return Metric(
            self.victim.subject, self.victim.variant, name, value, n, threat=threat, attack=attack
        )

    def worst(self, of: str) -> Bools:
        """The images (N,) that are `of` (right or safe) clean and under every rung."""
        held: Bools = np.array(getattr(self.clean, of))
        for _, after in self.under:
            held = held & getattr(after, of)
        return held

    def everything(self) -> Rung:
        """What stands beside a worst case."""
        largest = max((rung for rung, _ in self.under), key=lambda rung: rung.threat.eps)
        short = any(rung.name == "autoattack_short" for rung, _ in self.under)
        what = f"worst case over {len(self.under)} attacks in float and 8-bit"
        effort = f"short AutoAttack, {self.budget}" if short else f"AutoAttack, {self.budget}"
        return largest._replace(attack=f"{what} ({effort})")


def record(victim: Victim, found: list[Found], images: Images, budget: str) -> Record:
    """Put everything that was found to one victim."""
    clean = replay(victim, to_float(images.image), images, Threat(eps=0.0))
    under = [(item.rung, replay(victim, item.x, images, item.rung.threat)) for item in found]
    return Record(victim, clean, under, budget)


def label_figures(seen: Record) -> Iterator[Metric]:
    """Clean accuracy and rejection, each attack on the label alone, and transfer."""
    yield seen.metric("clean", seen.clean.right)
    if seen.victim.rejects:
        yield seen.metric("clean_rejection", ~seen.clean.deployed.accepted)
    for name in LABEL_RUNGS:
        if mine := seen.attacks(name):
            rung, after = mine[-1]
            yield seen.metric(name, seen.clean.right & after.right, rung)
    for rung, after in seen.under:
        if (rung.victim.subject, rung.name) == ("undefended", "pgd20"):
            how = rung._replace(attack=f"{rung.attack}, made on the undefended twin")
            if seen.victim.subject != "undefended":
                yield seen.metric("transfer", seen.clean.right & after.right, how)


def detector_figures(seen: Record) -> Iterator[Metric]:
    """The attacks on label and detectors, and on the detectors alone."""
    names = {rung.name for rung, _ in seen.under}
    if "joint_apgd" in names:
        rung, after = seen.own("joint_apgd")
        yield seen.metric("joint_apgd", seen.clean.safe & after.safe, rung)
    if "forced_rejection" in names:
        rung, _ = seen.own("forced_rejection")
        floods = [after.rejected for r, after in seen.under if r.name == rung.name]
        yield seen.metric("forced_rejection", np.logical_or.reduce(floods), rung)


def rejection_figures(seen: Record, plain: Record, rate: float) -> Iterator[Metric]:
    """What rejecting adds, beside max-softmax rejection (`plain`) at the same clean rate."""
    percent = f"{100 * rate:g}%"
    safe, everything = seen.worst("safe"), seen.everything()
    yield seen.metric(f"robust_with_rejection@{percent}", safe, everything)
    yield seen.metric("accepted_and_wrong", ~safe, everything)
    simple = plain.worst("safe")
    yield plain.metric("clean_rejection", ~plain.clean.deployed.accepted)
    yield plain.metric(f"robust_with_rejection@{percent}", simple, everything)
    gap, interval = difference(safe, simple)
    gain = seen.metric("gain_over_max_softmax", safe, everything)
    yield gain._replace(value=gap, interval=interval)
    yield from stratified(seen, safe)
    yield from detection_figures(seen)


def stratified(seen: Record, safe: Bools) -> Iterator[Metric]:
    """Safe up to eps, and right *and accepted* up to a part of it: rejecting little is an error."""
    eps = seen.everything().threat.eps
    for share in (0.0, *SMALL, 1.0):
        small = [after for rung, after in seen.under if rung.threat.eps <= share * eps + 1e-9]
        held = [after.right & ~after.rejected for after in (seen.clean, *small)]
        rung = seen.everything()
        near = rung.threat._replace(eps=share * eps)
        rung = rung._replace(attack=f"{rung.attack}; a rejection up to {near} is an error")
        yield seen.metric(f"stratified@{share:g}eps", np.logical_and.reduce([safe, *held]), rung)


def detection_figures(seen: Record) -> Iterator[Metric]:
    """How well suspicion tells images that an attack on the label made wrong; AUROC last.

    The joint attack stops at the threshold, so of its images only the share caught says anything.
    """
    for name in ("joint_apgd", "pgd20"):
        rung, after = seen.own(name)
        wrong = seen.clean.right & after.fooled
        if not wrong.any():
            continue
        if name == "joint_apgd":
            yield seen.metric(f"caught:{name}", ~after.deployed.accepted[wrong], rung)
            continue
        base = seen.metric("", wrong[wrong], rung)
        clean, attacked = seen.clean.deployed.suspicion, after.deployed.suspicion[wrong]
        for title, (value, interval) in detection(clean, attacked).items():
            yield base._replace(name=f"{title}:{name}", value=value, interval=interval)


class Evaluation(NamedTuple):
    """All that an evaluation saw."""

    images: Images
    threat: Threat
    metrics: list[Metric]
    checks: list[Check]
    records: dict[str, Record]  # by the victim's name
    found: list[Found]


def ladder(victims: list[Victim], threat: Threat, budget: Budget, classes: int) -> list[Rung]:
    """Every rung for `victims`."""
    out: list[Rung] = []
    for victim in victims:
        if has_own_label(victim):
            out += label_rungs(victim, threat, budget, classes)
        if victim.rejects:
            out += rejection_rungs(victim, threat, budget)
    return out


def has_own_label(victim: Victim) -> bool:
    """Whether no other victim has the same label; `lean` in fp32 has the classifier's."""
    own = victim.subject.startswith(GRAPH) or victim.name == "pipeline full"
    return not victim.rejects or own


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
    """Climb the ladder, or of it the rungs that `only` names; `folder` keeps what was found.

    `victims` hold the classifier first, then pipelines and, as a control, an undefended twin. Worst
    cases and self-checks need the whole ladder. Raises ValueError where `only` names no rung.
    """
    # The plain alternative plays a part in worst cases alone.
    rejecting = [] if only else [v for v in victims if v.rejects]
    plain = {v.name: max_softmax_victim(v, images.image) for v in rejecting}
    whole = ladder([*victims, *plain.values()], threat, budget, len(images.classes))
    known = sorted({rung.name for rung in whole})
    if unknown := sorted(set(only) - set(known)):
        raise ValueError(f"no attack {', '.join(unknown)}: choose among {', '.join(known)}")
    rungs = chosen(whole, threat, only)
    if not rungs:
        raise ValueError(f"{', '.join(only)} is made on the classifier: leave out --variant")
    found = climb(rungs, images, folder)
    everyone = [*victims, *plain.values()]
    records = {v.name: record(v, found, images, str(budget)) for v in everyone}
    metrics: list[Metric] = []
    for seen in (records[v.name] for v in victims):
        metrics += label_figures(seen)
        if seen.victim.rejects:
            metrics += detector_figures(seen)
        if only:
            continue
        metrics.append(seen.metric("robust", seen.worst("right"), seen.everything()))
        if seen.victim.rejects:
            metrics += rejection_figures(seen, records[plain[seen.victim.name].name], rate)
    checked = []
    if not only:
        metrics += added(records, [v.name for v in victims])
        checked = self_checks(victims, records, images, threat)
    return Evaluation(images, threat, metrics, checked, records, found)


def added(records: dict[str, Record], names: list[str]) -> Iterator[Metric]:
    """What each pipeline adds to the bare classifier: the number that decides the default."""
    alone = records[names[0]].worst("right")
    for seen in (records[name] for name in names if records[name].victim.rejects):
        gap, interval = difference(seen.worst("safe"), alone)
        metric = seen.metric("gain_over_classifier", alone, seen.everything())
        yield metric._replace(value=gap, interval=interval)


def self_checks(
    victims: list[Victim], records: dict[str, Record], images: Images, threat: Threat
) -> list[Check]:
    """Every check on every defended victim, on images that it gets right and accepts."""
    out: list[Check] = []
    defended = [victim for victim in victims if victim.subject != "undefended"]
    for victim in tqdm(defended, desc="self-checks", leave=False):
        seen = records[victim.name]
        right = np.flatnonzero(seen.clean.right & ~seen.clean.rejected)
        if not len(right):
            raise ValueError(f"{victim.name} gets no image right: there is nothing to attack")
        # Evenly spaced: a folder of images is sorted by class.
        few = right[np.linspace(0, len(right) - 1, min(CHECKED, len(right))).astype(int)]
        x, label = to_float(images.image[few]), images.label[few]
        if has_own_label(victim):
            look = victim.label_look
            out += checks.check_look(look, x, label, threat, victim.name, queries=QUERIES)
        if victim.rejects:
            joint = float(seen.own("joint_apgd")[1].safe[few].mean())
            out += checks.check_detectors(
                victim.look,
                x,
                label,
                threat,
                f"{victim.name}, detectors",
                queries=QUERIES,
                joint=joint,
            )
        out += outcome_checks(seen)
    return out


def outcome_checks(seen: Record) -> Iterator[Check]:
    """Checks of what the rungs found: transfer against gradients, ignoring against joint."""

    def share(parts: tuple[Bools, Bools]) -> float:
        return float((parts[0] & parts[1]).mean())

    name, clean, static = seen.victim.name, seen.clean, seen.own("pgd20")[1]
    for rung, after in seen.under:
        if (rung.victim.subject, rung.name) == ("undefended", "pgd20"):
            white, blind = share((clean.right, static.right)), share((clean.right, after.right))
            yield checks.black_box(white, blind, name, "transfer from the undefended twin")
    if seen.victim.rejects:
        joint = seen.own("joint_apgd")[1]
        yield from checks.adaptive(
            share((clean.safe, static.safe)), share((clean.safe, joint.safe)), name
        )
