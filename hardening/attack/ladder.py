"""The rungs of the evaluation ladder: each turns clean images into the strongest it can find.
Sources: AutoAttack, Croce and Hein 2020, in its packaged official form (`pyautoattack`); joint
attacks, Tramer et al. 2020 and Bryniarski et al. 2022.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import (
    HANDLINGS,
    Inner,
    Look,
    View,
    as_loss,
    flood,
    mislead,
    targeted,
    untargeted,
    withstand,
)
from rampart.hardening.attack.pgd import (
    Objective,
    Start,
    Threat,
    apgd,
    pgd,
    project,
    random_start,
)
from rampart.hardening.model.detectors import margin
from rampart.hardening.model.pixels import to_float, to_uint8


class Budget(NamedTuple):
    """What the attacker may spend on an image."""

    steps: int = 100
    targets: int = 9
    queries: int = 5000
    standard: bool = True  # AutoAttack as published; otherwise without FAB and by the numbers above

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.targets} targets, {self.queries} queries"


QUICK = Budget(steps=20, targets=3, queries=200, standard=False)
# How an attack on consistency asks: at several radii, at the worst of these, and in ten steps.
RADII = (Inner(0.5), Inner(1.0), Inner(2.0))
PROBES = (*((inner,) for inner in RADII), RADII, (Inner(1.0, steps=10),))
# Multipliers of the penalty among which the joint attack chooses, by a pilot on a few images.
WEIGHTS = (0.1, 1.0, 10.0)
PILOT = 16
# Steps towards a label, which tell how near it is, and labels towards which they are made.
PUSH, LIKELY = 8, 50
STANDARD_CLASSES = 10  # at least, for the nine targets of AutoAttack as published
AGAIN = 3  # tries onward from the nearest miss of all detectors


def seeded(x: Tensor, seed: int) -> Noise:
    """The same noise in every batch of as many images as x has."""
    return Noise(torch.arange(len(x), device=x.device), seed=seed)


def pgd20(
    look: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget | None = None
) -> Tensor:
    """PGD-20 on the label alone: steps of eps/4 from one random start, whatever the budget."""
    loss = as_loss(mislead(lambda x: View(look(x).logits), untargeted(label), label), len(x))
    start = random_start(x, threat, seeded(x, Start.PGD))
    return pgd(loss, x, threat, steps=20, step_size=threat.eps / 4, start=start)


def autoattack(look: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget) -> Tensor:
    """Official AutoAttack on the label alone; images that it cannot move come back clean."""
    from pyautoattack import AutoAttack

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return look(x).logits.contiguous()

    with torch.no_grad():
        classes = look(x[:1]).logits.shape[1]
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # the ladder's own checks report
    common = {"eps": threat.eps, "norm": threat.norm, "seed": 0, "device": x.device}
    if budget.standard and classes >= STANDARD_CLASSES:
        attack = AutoAttack(Logits(), version="standard", **common)
    else:
        names, targets = list(parts(budget, classes)), min(budget.targets, classes - 1)
        attack = AutoAttack(Logits(), version="custom", attacks=names, **common)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = budget.steps
        attack.apgd.n_restarts = attack.apgd_targeted.n_restarts = attack.fab.n_restarts = 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        attack.square.n_queries = budget.queries
    attack.verbose = False
    attacked, _ = attack.run_standard_evaluation(x.contiguous(), label, batch_size=len(x))
    return torch.as_tensor(attacked).detach()


def parts(budget: Budget, classes: int) -> dict[str, str]:
    """AutoAttack's parts under this budget: its names for them, with their usual names."""
    every = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}
    # The DLR loss of apgd-t needs four classes.
    left_out = {"apgd-t" if classes < 4 else "", "" if budget.standard else "fab-t"}
    return {name: title for name, title in every.items() if name not in left_out}


class Hunt:
    """Auto-PGD from several sides on what still stands; keeps what comes closest by `measure`.

    Random starts are drawn with seeds from `first` on.
    """

    def __init__(
        self, measure: Objective, x: Tensor, threat: Threat, *, steps: int, first: Start
    ) -> None:
        self.measure, self.x, self.threat = measure, x, threat
        self.steps, self.first = steps, first
        self.found, self.value = x.clone(), x.new_full((len(x),), -torch.inf)
        self.won = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.attacks = 0

    def begin(self, found: Tensor, hopeless: Tensor) -> None:
        """Go on from images that others `found` (N, 3, H, W), and leave out the `hopeless` (N,)."""
        with torch.no_grad():
            out = self.measure(found, torch.arange(len(found), device=found.device))
        self.found, self.value = found.clone(), out.value
        self.won = out.won | hopeless

    def try_all(self, objective: Objective, *, start: Tensor | None = None, times: int = 1) -> None:
        """Attack the images that still stand, from new random starts, or by smaller steps from
        `start` (N, 3, H, W), which is what to add; with so many `times` the steps.
        """
        left = self.left
        if not len(left):
            return
        if start is None:
            begin, size = random_start(self.x[left], self.threat, self.noise(left)), 2.0
        else:
            begin, size = start[left], 0.25
        self.attacks += 1
        x, steps = self.x[left], times * self.steps
        attacked, won = apgd(
            on_rows(objective, left), x, self.threat, steps=steps, start=begin, size=size
        )
        with torch.no_grad():
            value = self.measure(attacked, left).value
        closer = won | (value > self.value[left])
        self.found[left[closer]] = attacked[closer]
        self.value[left[closer]] = value[closer]
        self.won[left] = won

    @property
    def left(self) -> Tensor:
        """The images (M,) that still stand."""
        return (~self.won).nonzero().squeeze(1)

    def noise(self, rows: Tensor) -> Noise:
        """For these images, another for each attack."""
        return Noise(rows, seed=self.first + self.attacks)

    def near(self) -> Tensor:
        """Where to go on, to add to x (N, 3, H, W): a little beside what came closest."""
        little = self.threat._replace(eps=self.threat.eps / 8)
        noise = self.noise(torch.arange(len(self.x), device=self.x.device))
        return self.found - self.x + random_start(self.x, little, noise)

    def shrunk(self, objective: Objective) -> Tensor:
        """The same from a larger ball: what is found there, drawn back into the own one."""
        left, wide = self.left, self.threat._replace(eps=1.5 * self.threat.eps)
        out = torch.zeros_like(self.x)
        if len(left):
            x, start = self.x[left], random_start(self.x[left], wide, self.noise(left))
            search = partial(apgd, on_rows(objective, left), x, wide, steps=self.steps)
            out[left] = project(search(start=start)[0] - x, self.threat)
        return out


def on_rows(objective: Objective, left: Tensor) -> Objective:
    """An objective of all images for those in the rows `left` (M,)."""
    return lambda x, rows: objective(x, left[rows])


def label_hunt(labels: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget) -> Hunt:
    """Be wrong, accepted or not: Auto-PGD without and with every target."""
    aim = partial(mislead, lambda x: View(labels(x).logits), label=label)
    hunt = Hunt(aim(loss=untargeted(label)), x, threat, steps=budget.steps, first=Start.LABEL)
    for _ in HANDLINGS:  # as often as the joint attack without a target
        hunt.try_all(aim(loss=untargeted(label)))
    for target in targets_of(labels, x, label, budget):
        hunt.try_all(aim(loss=targeted(label, target)))
    return hunt


def targets_of(look: Look, x: Tensor, label: Tensor, budget: Budget) -> list[Tensor]:
    """The wrong labels (N,) to try, the likeliest first."""
    with torch.no_grad():
        logits = look(x).logits
    order = logits.scatter(1, label[:, None], -torch.inf).argsort(1, descending=True)
    return list(order[:, : min(budget.targets, order.shape[1] - 1)].unbind(1))


def joint_apgd(
    look: Look,
    x: Tensor,
    label: Tensor,
    threat: Threat,
    budget: Budget,
    *,
    labels: Look | None = None,
) -> Tensor:
    """Be wrong and accepted: Auto-PGD with every handling of the detectors and every target.

    With `labels`, the victim's logits alone, which are cheaper, the attack begins with those, and
    goes on where it found a wrong label: nothing else can be wrong and accepted.
    """
    with torch.no_grad():
        clean = look(x)
    measure = mislead(look, untargeted(label), label)
    hunt = Hunt(measure, x, threat, steps=budget.steps, first=Start.JOINT)
    if labels is None:
        targets = targets_of(look, x, label, budget)
    else:
        easy = label_hunt(labels, x, label, threat, budget)
        hunt.begin(easy.found, ~easy.won)
        targets = nearest(hunt, labels, label, budget)
    weight = 1.0
    if clean.margin is not None:
        weight = pilot(look, x, label, threat, steps=budget.steps)
    for handling in HANDLINGS if clean.margin is not None else HANDLINGS[:1]:
        loss = untargeted(label)
        hunt.try_all(mislead(look, loss, label, handling=handling, weight=weight))
    for target in targets:
        hunt.try_all(mislead(look, targeted(label, target), label, handling="selective"))
    if clean.probe is not None:
        insist(hunt, look, label, targets)
    return hunt.found


def insist(hunt: Hunt, look: Look, label: Tensor, targets: list[Tensor]) -> None:
    """Against consistency, on images that only rejection has saved: each target (N,) in each way to
    ask of PROBES, then with the other detectors at rest; then onward from the nearest miss, and
    from a larger ball.
    """
    with torch.no_grad():
        hunt.won |= look(hunt.found).logits.argmax(1) == label
    asks = RADII[1:2]
    for target in targets:
        for inner in PROBES:
            hunt.try_all(withstand(look, label, target, inner))
        hunt.try_all(withstand(look, label, target, asks, quiet=True), times=3)
    with torch.no_grad():
        reached = look(hunt.found).logits.argmax(1)
    whole = mislead(look, untargeted(label), label, handling="selective")
    quiet = withstand(look, label, reached, asks, quiet=True)
    hunt.try_all(withstand(look, label, reached, RADII), start=hunt.near())
    hunt.try_all(quiet, start=hunt.near(), times=3)
    hunt.try_all(whole, start=hunt.shrunk(quiet), times=3)
    for _ in range(AGAIN):
        hunt.try_all(whole, start=hunt.near(), times=3)


def nearest(hunt: Hunt, labels: Look, label: Tensor, budget: Budget) -> list[Tensor]:
    """The wrong labels (N,) that a few steps bring nearest, the nearest first, for what still
    stands: where classes are many, the likeliest of clean images need not be among them.
    """
    likely = targets_of(labels, hunt.x, label, budget._replace(targets=LIKELY))
    if not len(hunt.left):  # not every layer takes a batch of none
        return likely[: budget.targets]
    gap = hunt.x.new_full((len(label), len(likely)), -torch.inf)
    for i, target in enumerate(likely):
        gap[hunt.left, i] = pushed(hunt, labels, hunt.left, target[hunt.left], turn=i)
    order = gap.argsort(1, descending=True)[:, : budget.targets]
    return list(torch.stack(likely, 1).gather(1, order).unbind(1))


def pushed(hunt: Hunt, labels: Look, rows: Tensor, target: Tensor, *, turn: int) -> Tensor:
    """By how much (M,) the `target` (M,) leads after a few steps from the images in these rows;
    each `turn` begins elsewhere.
    """

    def lead(x: Tensor) -> Tensor:
        return margin(labels(x).logits, target)

    x, threat = hunt.x[rows], hunt.threat
    start = random_start(x, threat, Noise(rows, seed=Start.PUSH + turn))
    found = pgd(lead, x, threat, steps=PUSH, step_size=threat.eps / 3, start=start)
    with torch.no_grad():
        return lead(found)


def targeted_apgd(
    look: Look, x: Tensor, label: Tensor, target: Tensor, threat: Threat, *, steps: int
) -> Tensor:
    """Be taken for `target` (N,) and accepted: Auto-PGD with every handling of the detectors."""
    with torch.no_grad():
        rejects = look(x).margin is not None
    aim = partial(mislead, look, targeted(label, target), label, target=target)
    hunt = Hunt(aim(), x, threat, steps=steps, first=Start.TARGETED)
    for handling in HANDLINGS if rejects else HANDLINGS[:1]:
        hunt.try_all(aim(handling=handling))
    return hunt.found


def pilot(look: Look, x: Tensor, label: Tensor, threat: Threat, *, steps: int) -> float:
    """The weight of the penalty that wins most often on PILOT images, evenly spaced."""
    every = max(1, len(x) // PILOT)
    few, label, wins = x[::every], label[::every], {}
    for weight in WEIGHTS:
        objective = mislead(look, untargeted(label), label, handling="penalty", weight=weight)
        start = random_start(few, threat, seeded(few, Start.PILOT))
        wins[weight] = int(apgd(objective, few, threat, steps=steps, start=start)[1].sum())
    return max(wins, key=lambda weight: wins[weight])


def forced_rejection(look: Look, x: Tensor, _: Tensor, threat: Threat, budget: Budget) -> Tensor:
    """Denial of service: clean images made suspicious. The label plays no part."""
    hunt = Hunt(flood(look), x, threat, steps=budget.steps, first=Start.FLOOD)
    hunt.try_all(flood(look))
    return hunt.found


# look, x (N, 3, H, W), label (N,), then by name `threat` and `budget`; returns x attacked.
Craft = Callable[..., Tensor]
# What an attack wants: a wrong label; one that is accepted; a rejection.
Aim = Literal["label", "joint", "flood"]


@dataclass(frozen=True)
class Attack:
    """One rung of the ladder: how it attacks, and what tables and the page say of it.

    Figures are compared by `effort`; `passes` estimates forward-backward passes an image; `shares`
    are smaller parts of eps; `title` is a column of the documents' tables; `chosen` tells which
    budgets include it; with `labels` it takes the victim's logits alone as well, by that name.
    """

    name: str
    aim: Aim
    craft: Craft
    effort: Callable[[Budget, int], str]
    passes: Callable[[Budget], float]
    meaning: str
    title: str = ""
    shares: tuple[float, ...] = ()
    chosen: Callable[[Budget], bool] = lambda budget: True
    labels: bool = False


def short_effort(budget: Budget, classes: int) -> str:
    """How figures name parts of AutoAttack, run by the numbers of a budget."""
    return f"{' + '.join(parts(budget, classes).values())}, {budget}"


def autoattack_passes(budget: Budget) -> float:
    """Passes of AutoAttack an image; the standard one makes about twice as many."""
    return budget.steps * (1 + budget.targets) + budget.queries / 3


# Shares of eps at which a rejection counts as an error, in the stratified figure.
SMALL = (0.25, 0.5)
RUNGS = (
    Attack(
        "pgd20",
        "label",
        pgd20,
        lambda *_: "PGD, 20 steps of eps/4",
        lambda _: 21,
        meaning="label right under PGD-20",
        title="PGD-20",
        shares=SMALL,
    ),
    Attack(
        "autoattack",
        "label",
        autoattack,
        lambda budget, classes: (
            "AutoAttack, standard" if classes >= STANDARD_CLASSES else short_effort(budget, classes)
        ),
        lambda budget: 2 * autoattack_passes(budget),
        meaning="label right under AutoAttack",
        title="AutoAttack",
        chosen=lambda budget: budget.standard,
    ),
    Attack(
        "autoattack_short",
        "label",
        autoattack,
        short_effort,
        autoattack_passes,
        meaning="label right under a part of AutoAttack",
        title="AutoAttack, short",
        chosen=lambda budget: not budget.standard,
    ),
    Attack(
        "joint_apgd",
        "joint",
        joint_apgd,
        lambda budget, _: (
            "joint APGD (penalty, selective, orthogonal, nearest targets; against consistency also"
            f" each target after its step, from larger balls, onward from near misses), {budget}"
        ),
        lambda budget: budget.steps * (4 + budget.targets),
        meaning="right or rejected under the joint attack",
        title="joint attack, right or rejected",
        labels=True,
    ),
    Attack(
        "forced_rejection",
        "flood",
        forced_rejection,
        lambda budget, _: f"APGD on the detectors alone, {budget.steps} steps",
        lambda budget: budget.steps,
        meaning="rejected under an attack on the detectors alone",
        shares=SMALL,
    ),
)


def rungs_of(aim: Aim, budget: Budget) -> list[Attack]:
    """The rungs of this budget with one aim."""
    return [attack for attack in RUNGS if attack.aim == aim and attack.chosen(budget)]


def in_8_bits(x: Tensor, image: Tensor, threat: Threat) -> Tensor:
    """x (N, 3, H, W) rounded to uint8 (N, H, W, 3), without leaving the Linf ball of `image`."""
    pixels = to_uint8(x)
    if threat.norm != "Linf":
        return pixels
    whole = int(threat.eps * 255 + 1e-6)
    return (image + (pixels.int() - image).clamp(-whole, whole)).byte()


def fool(look: Look, image: Tensor, threat: Threat, budget: Budget) -> Tensor:
    """Attack uint8 (N, H, W, 3) away from its labels: the best of joint attack and PGD-20."""
    x = to_float(image)
    with torch.no_grad():
        label = look(x).logits.argmax(1)
    best, best_rank = image, torch.full_like(label, -1)
    for attacked in (joint_apgd(look, x, label, threat, budget), pgd20(look, x, label, threat)):
        pixels = in_8_bits(attacked, image, threat)
        with torch.no_grad():
            view = look(to_float(pixels))
        accepted = 1 if view.margin is None else (view.margin <= 0).long()
        rank = 2 * (view.logits.argmax(1) != label).long() + accepted
        best = torch.where((rank > best_rank).view(-1, 1, 1, 1), pixels, best)
        best_rank = torch.maximum(rank, best_rank)
    return best
