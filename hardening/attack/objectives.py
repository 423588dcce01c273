"""What an attacker maximizes: class losses, and how they are weighed against the detectors.
Sources: targeted DLR loss, Croce and Hein 2020 (section 4.1 and 5); selective and orthogonal
gradients, Bryniarski et al. 2022 (sections 4.1 and 4.2).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rampart.handlers.verdict import Calibration
from rampart.hardening.attack.pgd import Loss, Objective, Outcome
from rampart.hardening.model.calibrate import detection_margin, straight, threshold
from rampart.hardening.model.detectors import Consistency, margin
from rampart.hardening.model.pipeline import Defended

# What consistency would see (N,) of a label (N,), at a share of its radius and in so many steps.
Probe = Callable[[Tensor, float, int], Tensor]


class Inner(NamedTuple):
    """How an attack asks what consistency would see."""

    share: float  # of the radius
    steps: int = 1


class View(NamedTuple):
    """What a victim shows of x (N, 3, H, W): an image is rejected where `margin` > 0."""

    logits: Tensor  # (N, K)
    margin: Tensor | None = None  # (N,); None where nothing is ever rejected
    # Where consistency is among the detectors: what it would see, and the doubt (N,) of the others.
    probe: Probe | None = None
    others: Tensor | None = None


Look = Callable[[Tensor], View]
ClassLoss = Callable[[Tensor, Tensor], Tensor]  # logits (M, K), rows (M,) -> (M,)

# Ahead of every class loss, so that the order is: right, wrong but rejected, won. Small enough for
# float32 to tell neighbouring losses apart.
RANK = 1000.0
HANDLINGS = ("penalty", "selective", "orthogonal")


def look_at(pipeline: Defended, calibration: Calibration, rate: float) -> Look:
    """The whole pipeline, differentiable: rejected where its p-value is below `rate`."""
    never = math.isinf(threshold(calibration, rate))
    probed = Consistency.name in calibration.detectors

    def look(x: Tensor) -> View:
        out = pipeline.defend(x)
        if never:
            return View(out.logits)
        view = View(out.logits, detection_margin(out.scores, calibration, rate))
        if not probed:
            return view
        others = straight(out.scores, calibration, Consistency.name)
        return view._replace(probe=partial(pipeline.margin_after_step, x), others=others)

    return look


def untargeted(label: Tensor) -> ClassLoss:
    """Cross-entropy of the true label (N,)."""
    return lambda logits, rows: F.cross_entropy(logits, label[rows], reduction="none")


def targeted(label: Tensor, target: Tensor) -> ClassLoss:
    """The targeted DLR loss, which no scaling of the logits changes; with K < 4 the margin."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        own = logits.gather(1, label[rows, None]).squeeze(1)
        other = logits.gather(1, target[rows, None]).squeeze(1)
        if logits.shape[1] < 4:
            return other - own
        top = logits.topk(4, dim=1).values
        return (other - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    return loss


def mislead(
    look: Look,
    loss: ClassLoss,
    label: Tensor,
    *,
    handling: str = "selective",
    weight: float = 1.0,
    target: Tensor | None = None,
) -> Objective:
    """Be wrong about `label` (N,) and accepted; `handling` (one of HANDLINGS) weighs the two.

    With `target` (N,) nothing but that label counts as wrong.
    """

    def objective(x: Tensor, rows: Tensor) -> Outcome:
        view = look(x)
        values, guess = loss(view.logits, rows), view.logits.argmax(1)
        wrong = guess != label[rows] if target is None else guess == target[rows]
        if view.margin is None:
            return Outcome(values, values, wrong)
        won = wrong & (view.margin <= 0)
        if handling == "penalty":
            values = values - weight * F.relu(view.margin)
            return Outcome(values, values, won)
        staged = torch.where(wrong, RANK - view.margin, values) + RANK * won
        slope = staged
        if handling == "orthogonal" and x.requires_grad:
            slope = orthogonal(values, view.margin, wrong, x)
        return Outcome(staged, slope, won)

    return objective


def withstand(
    look: Look, label: Tensor, target: Tensor, asks: Sequence[Inner], *, quiet: bool = False
) -> Objective:
    """Be taken for `target` (N,), and still be after the step with which consistency asks, in the
    worst of the ways in which this attack `asks` (after the adaptive attacks of Chen et al. 2023,
    "Stratified Adversarial Robustness with Rejection", on margins instead of confidence). With
    `quiet` the other detectors are to be at rest too.
    """

    def objective(x: Tensor, rows: Tensor) -> Outcome:
        with torch.set_grad_enabled(quiet and torch.is_grad_enabled()):
            view = look(x)
        assert view.margin is not None and view.probe is not None
        won = (view.logits.argmax(1) != label[rows]) & (view.margin <= 0)
        value = torch.stack([view.probe(target[rows], *ask) for ask in asks]).amin(0)
        if quiet and view.others is not None:
            value = value - view.others + margin(view.logits, target[rows]).clamp_max(0)
        return Outcome(value + RANK * won, value, won)

    return objective


def orthogonal(values: Tensor, margin: Tensor, wrong: Tensor, x: Tensor) -> Tensor:
    """A function (N,) whose gradient moves one aim while leaving the other where it is."""
    (label_way,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
    (quiet_way,) = torch.autograd.grad(-margin.sum(), x, retain_graph=True)
    aim = torch.where(wrong.view(-1, 1, 1, 1), quiet_way, label_way).flatten(1)
    other = torch.where(wrong.view(-1, 1, 1, 1), label_way, quiet_way).flatten(1)
    share = (aim * other).sum(1) / other.square().sum(1).clamp_min(1e-20)
    direction = aim - share[:, None] * other
    return (x.flatten(1) * direction.detach()).sum(1)


def flood(look: Look) -> Objective:
    """Be rejected: the aim of whoever wants a service to turn its customers away."""

    def objective(x: Tensor, rows: Tensor) -> Outcome:
        view = look(x)
        if view.margin is None:
            raise ValueError("this victim rejects nothing, so its detectors cannot be flooded")
        return Outcome(view.margin, view.margin, view.margin > 0)

    return objective


def as_loss(objective: Objective, count: int) -> Loss:
    """The objective on all `count` images as a plain loss for `pgd`: a winning step ranks first."""

    def loss(x: Tensor) -> Tensor:
        out = objective(x, torch.arange(count, device=x.device))
        rank = out.value + 4 * RANK * out.won
        return out.slope + (rank - out.slope).detach()

    return loss
