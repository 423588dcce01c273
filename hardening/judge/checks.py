"""Distrust of our own evaluation: signs that an attack failed and not that a defence held. Sources:
Athalye et al. 2018 (section 3.1), Carlini et al. 2019 (section 4), the checks of AutoAttack (Croce
and Hein 2020).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rampart.hardening.attack.ladder import seeded
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import Look, View, mislead, untargeted
from rampart.hardening.attack.pgd import Objective, Outcome, Start, Threat, apgd, random_start
from rampart.hardening.model.detectors import margin

# Shares of images, but for `randomness`, which is a distance between logits.
MOST_ZERO_GRADIENTS = 0.05
MOST_RANDOMNESS = 1e-4
# By how much shares of images may differ, and no less than so many images: of 17 each is 6%.
TOLERANCE, SPARED = 0.05, 2
# On how many images, at least, a gradient has to point the right way for one step of a pixel.
LEAST_TRUE, PIXEL = 0.75, 1 / 255
# Draws of noise over which gradients are averaged, and how large it is beside eps.
DRAWS, BLUR = 8, 0.5
STEPS = (5, 20, 60)
EPS = (0.5, 1.0, 2.0, 4.0)
# Balls in which white noise hides the picture: nothing is robust there.
FAR = {"Linf": 64 / 255, "L2": 4.0}


class Check(NamedTuple):
    """One self-check: whether it passed and what it saw, in an evaluation on `n` images."""

    name: str
    subject: str
    passed: bool
    seen: str
    data: str = ""  # names the images
    n: int = 0

    @property
    def where(self) -> str:
        """What it saw, and in an evaluation of which images."""
        return f"{self.seen}; {self.data}" if self.data else self.seen

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name} ({self.subject}): {self.seen}"


def gradients(look: Look, x: Tensor, label: Tensor, subject: str) -> list[Check]:
    """Gradients are zero, of the label or of the detectors: saturation, or rounding on the way."""
    x = x.detach().requires_grad_()
    view = look(x)
    losses = {"zero_gradients": F.cross_entropy(view.logits, label, reduction="sum")}
    if view.margin is not None:
        losses["zero_detector_gradients"] = view.margin.sum()
    out = []
    for name, loss in losses.items():
        size = torch.zeros(len(x))
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss, x, retain_graph=True, materialize_grads=True)
            size = slopes[0].flatten(1).abs().amax(1)
        share, most = float((size < 1e-12).float().mean()), MOST_ZERO_GRADIENTS
        finding = f"{share:.0%} of {len(x)} images have a zero gradient (at most {most:.0%})"
        out.append(Check(name, subject, share <= most, finding))
    return out


def falling(value: Callable[[Tensor], Tensor], x: Tensor, name: str, subject: str) -> Check:
    """One step along the gradient of `value` (x (N, 3, H, W) -> (N,)) does not lead down: it was
    taken from something else, or is of the wrong sign.
    """
    x = x.detach().requires_grad_()
    before = value(x)
    slope = torch.zeros_like(x)
    if before.requires_grad:
        (slope,) = torch.autograd.grad(before.sum(), x, materialize_grads=True)
    with torch.no_grad():
        after = value((x - PIXEL * slope.sign()).clamp(0, 1))
    share = float((after < before).float().mean())
    finding = (
        f"one step along the gradient leads down on {share:.0%} of {len(x)} images (at least"
        f" {LEAST_TRUE:.0%})"
    )
    return Check(name, subject, share >= LEAST_TRUE, finding)


def detector_slopes(look: Look, x: Tensor, subject: str) -> list[Check]:
    """The gradients of the detectors, and what consistency asks, are what they are taken for."""

    def suspicion(x: Tensor) -> Tensor:
        found = look(x).margin
        assert found is not None
        return found

    out = [falling(suspicion, x, "detector_slope", subject)]
    with torch.no_grad():
        view = look(x)
    logits, probe = view.logits, view.probe
    if probe is None:
        return out
    own = logits.argmax(1)

    def left(x: Tensor) -> Tensor:
        ask = look(x).probe
        assert ask is not None
        return ask(own, 1.0, 1)

    out.append(falling(left, x, "consistency_slope", subject))
    values = [margin(logits, own), *(probe(own, share, 1) for share in (0.5, 1.0, 2.0))]
    falls = torch.stack([b < a for a, b in pairwise(values)]).all(0)
    share = float(falls.float().mean())
    finding = (
        f"the margin falls with every larger step on {share:.0%} of {len(x)} images (at least"
        f" {LEAST_TRUE:.0%})"
    )
    return [*out, Check("consistency_step", subject, share >= LEAST_TRUE, finding)]


def blurred(look: Look, label: Tensor, threat: Threat) -> Objective:
    """Be wrong about `label` (N,) and accepted, with gradients averaged over noise: they see beyond
    a slope that holds for a step too small to matter.
    """
    exact = mislead(look, untargeted(label), label)

    def objective(x: Tensor, rows: Tensor) -> Outcome:
        with torch.no_grad():
            seen = exact(x, rows)
        slope = torch.zeros_like(seen.value)
        for draw in range(DRAWS):
            noise = Noise(rows, seed=Start.BLUR + draw).uniform(*x.shape[1:])
            near = (x + BLUR * threat.eps * (2 * noise - 1)).clamp(0, 1)
            slope = slope + exact(near, rows).slope / DRAWS
        return Outcome(seen.value, slope, seen.won)

    return objective


def smoothed(
    look: Look, x: Tensor, label: Tensor, threat: Threat, subject: str, *, joint: float
) -> Check:
    """Gradients averaged over noise find what exact ones do not; `joint` of x withstand those."""
    start = random_start(x, threat, seeded(x, Start.SMOOTHED))
    attack = blurred(look, label, threat)
    _, won = apgd(attack, x, threat, steps=STEPS[1], start=start)
    left = 1 - float(won.float().mean())
    finding = (
        f"right or rejected {joint:.1%} jointly, {left:.1%} with gradients averaged over noise"
    )
    return Check("smoothed_gradients", subject, left >= joint - tolerance(len(x)), finding)


def randomness(look: Look, x: Tensor, subject: str) -> Check:
    """The same image gets different logits: an attack must average over that (EOT)."""
    with torch.no_grad():
        first, second = look(x).logits, look(x).logits
    gap = float((F.normalize(first) - F.normalize(second)).norm(dim=1).max())
    finding = (
        f"logits of one image differ by {gap:.2g} at a second look (at most {MOST_RANDOMNESS})"
    )
    return Check("randomness", subject, gap <= MOST_RANDOMNESS, finding)


def logits_are_logits(look: Look, x: Tensor, subject: str) -> Check:
    """Probabilities passed as logits flatten every loss that expects logits."""
    with torch.no_grad():
        logits = look(x).logits
    sums = (logits.sum(1) - 1).abs().max()
    probabilities = bool(logits.min() >= 0 and logits.max() <= 1 and sums < 1e-4)
    finding = "outputs are probabilities" if probabilities else "outputs are not probabilities"
    return Check("logits", subject, not probabilities, finding)


def robust_at(look: Look, x: Tensor, label: Tensor, threat: Threat, *, steps: int) -> float:
    """Share of x that withstands one Auto-PGD of `steps` on the label."""
    objective = mislead(lambda x: View(look(x).logits), untargeted(label), label)
    start = random_start(x, threat, seeded(x, Start.CHECK))
    _, won = apgd(objective, x, threat, steps=steps, start=start)
    return 1 - float(won.float().mean())


def tolerance(count: int) -> float:
    """By how much shares of `count` images may differ before they mean anything."""
    return max(TOLERANCE, SPARED / count)


def falls(values: Sequence[float], count: int) -> bool:
    """No value, of `count` images, exceeds one before it by more than the tolerance."""
    lowest = np.minimum.accumulate([1.0, *values])[:-1]
    return bool((np.array(values) <= lowest + tolerance(count)).all())


def more_steps(look: Look, x: Tensor, label: Tensor, threat: Threat, subject: str) -> Check:
    """An attack with more steps finds fewer images."""
    values = [robust_at(look, x, label, threat, steps=steps) for steps in STEPS]
    pairs = ", ".join(f"{v:.1%} after {s}" for s, v in zip(STEPS, values, strict=True))
    return Check("more_steps", subject, falls(values, len(x)), f"robust {pairs} steps")


def larger_eps(look: Look, x: Tensor, label: Tensor, threat: Threat, subject: str) -> Check:
    """A larger ball holds fewer adversarial images, or even a huge one does not hold them."""
    sizes = [*(threat.eps * size for size in EPS), max(8 * threat.eps, FAR[threat.norm])]
    balls = [threat._replace(eps=size) for size in sizes]
    values = [robust_at(look, x, label, ball, steps=20) for ball in balls]
    pairs = ", ".join(f"{v:.1%} at {ball}" for ball, v in zip(balls, values, strict=True))
    passed = falls(values, len(x)) and values[-1] <= tolerance(len(x))
    return Check("larger_eps", subject, passed, f"robust {pairs}")


def black_box(white: float, blind: float, subject: str, name: str, *, count: int) -> Check:
    """An attack that sees only answers beats those that see gradients: shares left by each."""
    finding = f"robust {white:.1%} against gradients, {blind:.1%} against {name}"
    return Check("black_box", subject, blind >= white - tolerance(count), finding)


def adaptive(static: float, joint: float, subject: str, *, count: int) -> list[Check]:
    """A joint attack finds far more than one that ignores detectors, or fewer: both are signs."""
    finding = f"right or rejected {static:.1%} when detectors are ignored, {joint:.1%} jointly"
    return [
        Check("adaptive", subject, static <= joint + 2 * tolerance(count), finding),
        Check("weak_joint", subject, joint <= static + tolerance(count), finding),
    ]


def square(look: Look, x: Tensor, label: Tensor, threat: Threat, *, queries: int) -> float:
    """Share of x that withstands the official Square attack: never both wrong and accepted."""
    from pyautoattack.square import SquareAttack

    def left(x: Tensor, label: Tensor) -> Tensor:
        view = look(x)
        lead = margin(view.logits, label)
        return lead if view.margin is None else torch.maximum(lead, view.margin)

    class Square(SquareAttack):  # type: ignore[misc]
        def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            # The first is compared with zero, the second is what shrinks; it keeps both, apart.
            value = left(x, y)
            return value, value.clone()

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"n_queries": queries, "n_restarts": 1, "resc_schedule": False}
        ball = {"norm": threat.norm, "eps": threat.eps}
        attack = Square(lambda x: look(x).logits, **ball, **options, device=x.device)
        attack.init_hyperparam(x)
        _, attacked = attack.attack_single_run(x, label)
        return float((left(attacked, label) > 0).float().mean())


def check_look(
    look: Look, x: Tensor, label: Tensor, threat: Threat, subject: str, *, queries: int
) -> list[Check]:
    """All checks of a victim without detectors on images x (N, 3, H, W) that it gets right."""
    white = robust_at(look, x, label, threat, steps=STEPS[1])
    blind = square(look, x, label, threat, queries=queries)
    outputs = [randomness(look, x, subject), logits_are_logits(look, x, subject)]
    attacks = [check(look, x, label, threat, subject) for check in (more_steps, larger_eps)]
    last = black_box(white, blind, subject, f"{queries} queries of Square", count=len(x))
    return [*gradients(look, x, label, subject), *outputs, *attacks, last]


def check_detectors(
    look: Look,
    x: Tensor,
    label: Tensor,
    threat: Threat,
    subject: str,
    *,
    queries: int,
    joint: float,
) -> list[Check]:
    """Masked gradients of detectors; `joint` is the share of x that withstands the joint attack."""
    blind = square(look, x, label, threat, queries=queries)
    finding = f"{queries} queries of Square for a wrong label that is accepted"
    last = black_box(joint, blind, subject, finding, count=len(x))
    slopes = [*gradients(look, x, label, subject)[1:], *detector_slopes(look, x, subject)]
    return [*slopes, last, smoothed(look, x, label, threat, subject, joint=joint)]
