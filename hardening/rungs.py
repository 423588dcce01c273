"""The rungs of the evaluation ladder: each turns clean images into the strongest it can find.

Sources: AutoAttack, Croce and Hein 2020, in its packaged official form (`pyautoattack`); joint
attacks on classifier and detectors, Tramer et al. 2020 and Bryniarski et al. 2022.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hardening.attacks import Objective, Threat, apgd, pgd, random_start
from hardening.data import to_float, to_uint8
from hardening.noise import Noise
from hardening.objectives import (
    HANDLINGS,
    Look,
    Seen,
    as_loss,
    flood,
    mislead,
    targeted,
    untargeted,
)


class Budget(NamedTuple):
    """What the attacker may spend on an image."""

    steps: int = 100
    targets: int = 9
    queries: int = 5000
    standard: bool = True  # AutoAttack as published; otherwise without FAB and by the numbers above

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.targets} targets, {self.queries} queries"


QUICK = Budget(steps=20, targets=3, queries=200, standard=False)
# Multipliers of the penalty among which the joint attack chooses, by a pilot on a few images.
WEIGHTS = (0.1, 1.0, 10.0)
PILOT = 16


def seeded(x: Tensor, seed: int) -> Noise:
    """The same noise in every batch of as many images as x has."""
    return Noise(torch.arange(len(x), device=x.device), seed=seed)


def pgd20(look: Look, x: Tensor, label: Tensor, threat: Threat) -> Tensor:
    """PGD-20 on the label alone: steps of eps/4 from one random start."""
    loss = as_loss(mislead(lambda x: Seen(look(x).logits), untargeted(label), label), len(x))
    start = random_start(x, threat, seeded(x, 0))
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
    if budget.standard and classes >= 10:
        attack = AutoAttack(Logits(), version="standard", **common)
    else:
        names = list(parts(budget, classes))
        attack = AutoAttack(Logits(), version="custom", attacks=names, **common)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = budget.steps
        attack.apgd.n_restarts = attack.apgd_targeted.n_restarts = attack.fab.n_restarts = 1
        attack.apgd_targeted.n_target_classes = min(budget.targets, classes - 1)
        attack.fab.n_target_classes = min(budget.targets, classes - 1)
        attack.square.n_queries = budget.queries
    attack.verbose = False
    found, _ = attack.run_standard_evaluation(x.contiguous(), label, batch_size=len(x))
    return torch.as_tensor(found).detach()


def parts(budget: Budget, classes: int) -> dict[str, str]:
    """The attacks that AutoAttack makes: what it calls them, and what people do."""
    every = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}
    # The DLR loss of apgd-t needs four classes.
    left_out = {"apgd-t" if classes < 4 else "", "" if budget.standard else "fab-t"}
    return {name: title for name, title in every.items() if name not in left_out}


class Hunt:
    """Auto-PGD from several sides, each on the images that the ones before left standing.

    Of images that nothing beats the one is kept that `measure` says came closest: in 8 bits, or to
    another victim, it may still win.
    """

    def __init__(self, measure: Objective, x: Tensor, threat: Threat, *, steps: int) -> None:
        self.measure, self.x, self.threat, self.steps = measure, x, threat, steps
        self.found, self.value = x.clone(), x.new_full((len(x),), -torch.inf)
        self.won = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.attacks = 0

    def try_all(self, objective: Objective) -> None:
        """Attack what is standing from a new random start."""
        left = (~self.won).nonzero().squeeze(1)
        start = random_start(self.x[left], self.threat, Noise(left, seed=self.attacks))
        self.attacks += 1
        if not len(left):
            return
        found, won = apgd(
            lambda x, rows: objective(x, left[rows]),
            self.x[left],
            self.threat,
            steps=self.steps,
            start=start,
        )
        with torch.no_grad():
            value = self.measure(found, left).value
        closer = won | (value > self.value[left])
        self.found[left[closer]] = found[closer]
        self.value[left[closer]] = value[closer]
        self.won[left] = won


def joint_apgd(look: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget) -> Tensor:
    """Be wrong and accepted, sought with every handling of the detectors and every target."""
    with torch.no_grad():
        clean = look(x)
    target = clean.logits.scatter(1, label[:, None], -torch.inf).argsort(1, descending=True)
    measure = mislead(look, untargeted(label), label)
    hunt = Hunt(measure, x, threat, steps=budget.steps)
    weight = 1.0
    if clean.margin is not None:
        weight = pilot(look, x, label, threat, steps=budget.steps)
    for handling in HANDLINGS if clean.margin is not None else HANDLINGS[:1]:
        loss = untargeted(label)
        hunt.try_all(mislead(look, loss, label, handling=handling, weight=weight))
    for rank in range(min(budget.targets, target.shape[1] - 1)):
        loss = targeted(label, target[:, rank])
        hunt.try_all(mislead(look, loss, label, handling="selective"))
    return hunt.found


def pilot(look: Look, x: Tensor, label: Tensor, threat: Threat, *, steps: int) -> float:
    """The penalty's multiplier that wins most often on a few images, evenly spaced."""
    every = max(1, len(x) // PILOT)
    few, label, wins = x[::every], label[::every], {}
    for weight in WEIGHTS:
        objective = mislead(look, untargeted(label), label, handling="penalty", weight=weight)
        start = random_start(few, threat, seeded(few, 0))
        wins[weight] = int(apgd(objective, few, threat, steps=steps, start=start)[1].sum())
    return max(wins, key=lambda weight: wins[weight])


def forced_rejection(
    look: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget
) -> Tensor:
    """Clean images made suspicious: the denial-of-service side of every detector.

    The label plays no part; every rung takes the same arguments.
    """
    hunt = Hunt(flood(look), x, threat, steps=budget.steps)
    hunt.try_all(flood(look))
    return hunt.found


def in_8_bits(x: Tensor, image: Tensor, threat: Threat) -> Tensor:
    """x (N, 3, H, W) as the uint8 (N, H, W, 3) that a file carries, inside the ball of `image`.

    Where eps lies between two levels, rounding must not leave the ball; an L2 ball is left by at
    most what rounding adds.
    """
    pixels = to_uint8(x)
    if threat.norm != "Linf":
        return pixels
    whole = int(threat.eps * 255 + 1e-6)
    return (image + (pixels.int() - image).clamp(-whole, whole)).byte()


def fool(look: Look, image: Tensor, threat: Threat, budget: Budget) -> Tensor:
    """Attack each image uint8 (N, H, W, 3) away from its present label; returns 8-bit pixels.

    The better of the joint attack and PGD-20 is kept: a changed label first, then acceptance.
    """
    x = to_float(image)
    with torch.no_grad():
        label = look(x).logits.argmax(1)
    best, best_rank = image, torch.full_like(label, -1)
    for found in (joint_apgd(look, x, label, threat, budget), pgd20(look, x, label, threat)):
        pixels = in_8_bits(found, image, threat)
        with torch.no_grad():
            seen = look(to_float(pixels))
        accepted = 1 if seen.margin is None else (seen.margin <= 0).long()
        rank = 2 * (seen.logits.argmax(1) != label).long() + accepted
        best = torch.where((rank > best_rank).view(-1, 1, 1, 1), pixels, best)
        best_rank = torch.maximum(rank, best_rank)
    return best
