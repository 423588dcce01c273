"""Gradient attacks: one PGD loop, of which FGSM and N-FGSM are the first step, and Auto-PGD.
Sources: PGD, Madry et al. 2018 (section 2.1); N-FGSM, de Jorge et al. 2022 (algorithm 1); Auto-PGD,
Croce and Hein 2020 (section 3, algorithm 1).
"""

import re
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rampart.hardening.attack.noise import Noise

Loss = Callable[[Tensor], Tensor]
State = dict[str, Tensor]  # of Auto-PGD, by name, a row an image


class Outcome(NamedTuple):
    """What an objective says of M images under attack."""

    value: Tensor  # (M,) larger is better for the attacker
    slope: Tensor  # (M,) what the next step differentiates; mostly `value` itself
    won: Tensor  # (M,) whether the attack has what it wants


# x (M, 3, H, W) in [0, 1], and which rows (M,) of the batch these images are.
Objective = Callable[[Tensor, Tensor], Outcome]


class Threat(NamedTuple):
    """A ball of radius `eps` around an image in [0, 1]; `norm` is "Linf" or "L2"."""

    norm: str = "Linf"
    eps: float = 8 / 255

    def __str__(self) -> str:
        return f"{self.norm} {self.eps * 255:g}/255" if self.norm == "Linf" else f"L2 {self.eps:g}"

    @classmethod
    def parse(cls, text: str) -> "Threat | None":
        """The first threat in `text`, as str or repr spells it; None without one."""
        match = re.search(r"(Linf|L2)\W+(?:eps=)?([\d.]+(?:e-\d+)?)(/255)?", text)
        return cls(match[1], float(match[2]) / (255 if match[3] else 1)) if match else None


def flat_norm(d: Tensor) -> Tensor:
    """L2 norm of each image of d (N, C, H, W), as (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(d.flatten(1), dim=1)
    return norms.view(-1, 1, 1, 1)


class Start(IntEnum):
    """First seeds of random starts, a thousand for each purpose: no attack begins where another,
    which found nothing, began.
    """

    PGD = 0
    LABEL = 1000
    JOINT = 2000
    TARGETED = 3000
    FLOOD = 4000
    PILOT = 5000
    PUSH = 6000
    CHECK = 7000
    SMOOTHED = 8000
    BLUR = 9000


def random_start(x: Tensor, threat: Threat, noise: Noise) -> Tensor:
    """A perturbation drawn uniformly from the ball, shaped like x."""
    if threat.norm == "Linf":
        return threat.eps * (noise.uniform(*x.shape[1:]) * 2 - 1)
    direction = noise.normal(*x.shape[1:])
    radius = noise.uniform(1, 1, 1)
    return threat.eps * radius ** (1 / x.shape[1:].numel()) * direction / flat_norm(direction)


def ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    """The unit step that increases the loss fastest in `norm`."""
    if norm == "Linf":
        return gradient.sign()
    return gradient / flat_norm(gradient).clamp_min(1e-12)


def project(d: Tensor, threat: Threat) -> Tensor:
    """The perturbation of the ball nearest to d."""
    if threat.norm == "Linf":
        return d.clamp(-threat.eps, threat.eps)
    return d * (threat.eps / flat_norm(d).clamp_min(1e-12)).clamp_max(1)


def pgd(
    loss: Loss,
    x: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: Tensor,
    keep_best: bool = True,
) -> Tensor:
    """Maximize `loss` (x_adv (N, 3, H, W) -> (N,)) over the ball around x; returns x_adv in [0, 1].
    `start` is the first perturbation; with `keep_best` each image keeps the best of all steps.
    """
    adversarial = (x + start).clamp(0, 1)
    best, best_loss = adversarial, x.new_full((len(x),), -torch.inf)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        values = loss(adversarial)
        (gradient,) = torch.autograd.grad(values.sum(), adversarial)
        if keep_best:
            best, best_loss = better(best, best_loss, adversarial, values)
        moved = adversarial.detach() + step_size * ascent_direction(gradient, threat.norm)
        adversarial = (x + project(moved - x, threat)).clamp(0, 1)
    if not keep_best:
        return adversarial.detach()
    with torch.no_grad():
        return better(best, best_loss, adversarial, loss(adversarial))[0].detach()


def better(best: Tensor, best_loss: Tensor, new: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Per image the one of (best, new) with the larger loss, and that loss."""
    wins = loss.detach() > best_loss
    chosen = torch.where(wins.view(-1, 1, 1, 1), new.detach(), best)
    return chosen, torch.where(wins, loss.detach(), best_loss)


def checkpoints(steps: int) -> set[int]:
    """Steps after which step sizes are reconsidered: 22% of all, then ever sooner."""
    marks, at, length = set(), 0, max(int(0.22 * steps), 1)
    while (at := at + length) <= steps:
        marks.add(at)
        length = max(length - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return marks


def apgd(
    objective: Objective, x: Tensor, threat: Threat, *, steps: int, start: Tensor, size: float = 2
) -> tuple[Tensor, Tensor]:
    """Auto-PGD around x (N, 3, H, W) from x + `start`, first by steps of `size` eps: the best ones
    and which (N,) have won.
    """
    best, won = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    state = first_look(objective, x, (x + project(start, threat)).clamp(0, 1), size * threat.eps)
    marks, since = checkpoints(steps), 0
    for step in range(steps + 1):
        best[state["row"]] = state["best"]
        won[state["row"]] = state["won"]
        state = {name: value[~state["won"]] for name, value in state.items()}
        if step == steps or not len(state["row"]):
            break
        advance(objective, state, threat, momentum=0.75 if step else 1.0)
        since += 1
        if step + 1 in marks:
            reconsider(state, since)
            since = 0
    return best, won


def first_look(objective: Objective, x: Tensor, now: Tensor, size: float) -> State:
    """The state of Auto-PGD, one row an image: where it is, its best so far, its step `size`."""
    n = len(x)
    row = torch.arange(n, device=x.device)
    value, gradient, won = differentiate(objective, now, row)
    state = {"row": row, "x": x, "now": now, "before": now, "gradient": gradient, "value": value}
    state |= {"best": now, "best_gradient": gradient, "best_value": value, "best_at_mark": value}
    sizes, halved = x.new_full((n, 1, 1, 1), size), torch.ones_like(won)
    return state | {"won": won, "size": sizes, "rises": x.new_zeros(n), "halved": halved}


def differentiate(objective: Objective, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (M,), gradient (M, 3, H, W) and victory (M,) of an objective at x."""
    x = x.detach().requires_grad_()
    out = objective(x, row)
    (gradient,) = torch.autograd.grad(out.slope.sum(), x)
    return out.value.detach(), gradient, out.won.detach()


def advance(objective: Objective, state: State, threat: Threat, *, momentum: float) -> None:
    """One step with momentum; the best image of each row is kept, a winning one above all."""
    x, now = state["x"], state["now"]
    step = state["size"] * ascent_direction(state["gradient"], threat.norm)
    moved = (x + project(now + step - x, threat)).clamp(0, 1)
    moved = now + momentum * (moved - now) + (1 - momentum) * (now - state["before"])
    moved = (x + project(moved - x, threat)).clamp(0, 1)
    value, gradient, won = differentiate(objective, moved, state["row"])
    state["rises"] = state["rises"] + (value > state["value"])
    better = won | (value > state["best_value"])
    image = better.view(-1, 1, 1, 1)
    state["best"] = torch.where(image, moved, state["best"])
    state["best_gradient"] = torch.where(image, gradient, state["best_gradient"])
    state["best_value"] = torch.where(better, value, state["best_value"])
    state |= {"before": now, "now": moved, "gradient": gradient, "value": value, "won": won}


def reconsider(state: State, since: int) -> None:
    """Halve the step of rows that oscillate or stand still, and send them back to their best."""
    stuck = ~state["halved"] & (state["best_at_mark"] >= state["best_value"])
    halve = (state["rises"] <= 0.75 * since) | stuck
    image = halve.view(-1, 1, 1, 1)
    state["size"] = torch.where(image, state["size"] / 2, state["size"])
    state["now"] = torch.where(image, state["best"], state["now"])
    state["gradient"] = torch.where(image, state["best_gradient"], state["gradient"])
    state["value"] = torch.where(halve, state["best_value"], state["value"])
    state |= {"halved": halve, "best_at_mark": state["best_value"]}
    state["rises"] = torch.zeros_like(state["rises"])


def cross_entropy(model: Callable[[Tensor], Tensor], label: Tensor) -> Loss:
    """The loss whose ascent makes `model` wrong about `label` (N,)."""
    return lambda x: F.cross_entropy(model(x).float(), label, reduction="none")


def n_fgsm(loss: Loss, x: Tensor, threat: Threat, *, noise: Noise) -> Tensor:
    """One step of size eps from noise of 2 eps, without projection onto the ball."""
    start = random_start(x, threat._replace(eps=2 * threat.eps), noise)
    free = threat._replace(eps=float("inf"))
    return pgd(loss, x, free, steps=1, step_size=threat.eps, start=start, keep_best=False)


def pgd10(loss: Loss, x: Tensor, threat: Threat, *, noise: Noise) -> Tensor:
    """Ten steps of eps/4 from a random start."""
    start = random_start(x, threat, noise)
    return pgd(loss, x, threat, steps=10, step_size=threat.eps / 4, start=start)
