"""Attacks on object detectors: on each loss and on their sum, and with an aim of their own.

All see what anchors or proposals say before scores are cut and boxes suppressed, so that neither
hides a gradient: the aims every one, and the losses too, but SSD's, which counts of the anchors on
no object the worst, three for each on one. Sources: PGD, Madry et al. 2018; Auto-PGD, Croce and
Hein 2020; vanish, fabricate and mislabel, Chow et al. 2020 (TOG, section 3); random search in
squares, Andriushchenko et al. 2020; unseen, after the selective gradients of Bryniarski et al. 2022
(section 4.1).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from rampart.hardening.attack.ladder import in_8_bits
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.patch import sticker
from rampart.hardening.attack.pgd import Outcome, Threat, apgd, pgd, random_start
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.objects.boxes import Dense, Truth
from rampart.hardening.objects.detector import ObjectDetector
from rampart.hardening.objects.guard import Guard

# What the attacker wants more of, an image each: (detector, x (M, 3, S, S), truth) -> (M,).
Aim = Callable[[ObjectDetector, Tensor, Sequence[Truth]], Tensor]
FIRST_SIDE = 0.3  # of the squares of the random search, in parts of the picture
UNSEEN = ("sum", "vanish", "fabricate", "invert")  # aims that are also tried past a guard
STUCK = ("sum", "invert")  # aims of the sticker
# What a flagged picture is worth less than any that passes; float32 still tells margins apart.
RANK = 10_000.0


class Budget(NamedTuple):
    """What the attacker may spend on an image."""

    steps: int = 20  # of each gradient attack
    queries: int = 0  # of the random search; 0 leaves it out
    patches: bool = False  # whether patches of any colours are tried too

    def __str__(self) -> str:
        more = ", patches" if self.patches else ""
        return f"{self.steps} steps, {self.queries} queries{more}"


def loss_aim(name: str) -> Aim:
    """One of the detector's losses."""
    return lambda detector, x, truth: detector.image_losses(x, truth)[name]


def losses_together(detector: ObjectDetector, x: Tensor, truth: Sequence[Truth]) -> Tensor:
    """The sum of the detector's losses."""
    return torch.stack([*detector.image_losses(x, truth).values()]).sum(0)


def objectness(dense: Dense) -> Tensor:
    """How much more each anchor (N, A) is of any object than of none, in log odds."""
    return dense.logits[:, :, 1:].logsumexp(2) - dense.logits[:, :, 0]


def on_objects(dense: Dense, truth: Sequence[Truth]) -> Tensor:
    """Which anchors (N, A) are on a true object, by half of the union of both or more."""
    rows = []
    for boxes, real in zip(dense.boxes.detach(), truth, strict=True):  # (A, R, 4)
        overlaps = box_iou(boxes.flatten(0, 1), real.boxes.to(boxes)).view(*boxes.shape[:2], -1)
        rows.append((overlaps >= 0.5).flatten(1).any(1))
    return torch.stack(rows)


def vanish(detector: ObjectDetector, x: Tensor, truth: Sequence[Truth]) -> Tensor:
    """No anchor that is on an object is of one.

    TOG descends all anchors, which takes false boxes away too, and so can make a robust detector
    better.
    """
    dense = detector.dense(x)
    return -(F.softplus(objectness(dense)) * on_objects(dense, truth)).sum(1)


def invert(detector: ObjectDetector, x: Tensor, truth: Sequence[Truth]) -> Tensor:
    """Anchors on objects are sure of none or of another class, and all others are sure of one.

    Average precision counts which of them comes first.
    """
    dense = detector.dense(x)
    shares = dense.logits.softmax(2)[:, :, 1:]  # (N, A, K)
    real = torch.zeros_like(shares)
    for row, one in enumerate(truth):
        for label in sorted(set(one.labels.tolist())):
            mine = Truth(one.boxes[one.labels == label], one.labels[one.labels == label])
            part = Dense(dense.boxes[row : row + 1], dense.logits[row : row + 1])
            real[row, :, label] = on_objects(part, [mine])[0].float()
    return (shares * (1 - real)).sum((1, 2)) - (shares * real).sum((1, 2))


def fabricate(detector: ObjectDetector, x: Tensor, truth: Sequence[Truth]) -> Tensor:
    """As many anchors as can be are of objects: how many one would expect.

    TOG climbs the log odds of all anchors alike, and most of those cannot be brought so far.
    """
    return objectness(detector.dense(x)).sigmoid().sum(1)


def mislabel(detector: ObjectDetector, x: Tensor, truth: Sequence[Truth]) -> Tensor:
    """Objects stay where they are, as those of the next class.

    It climbs the loss of classes alone: to descend that of boxes would make them more exact.
    """
    classes = len(detector.config.classes)
    other = [Truth(one.boxes, (one.labels + 1) % classes) for one in truth]
    return -detector.image_losses(x, other)["classification"]


def aims_of(detector: ObjectDetector) -> dict[str, Aim]:
    """All aims there are against a detector."""
    aims = {name: loss_aim(name) for name in detector.net.loss_names}
    aims |= {"sum": losses_together, "vanish": vanish, "fabricate": fabricate, "invert": invert}
    if len(detector.config.classes) > 1:
        aims["mislabel"] = mislabel
    return aims


def attacks_of(
    detector: ObjectDetector, budget: Budget, *, guarded: bool = False
) -> dict[str, tuple[str, str]]:
    """(algorithm, aim) of each attack by name: PGD on the losses, Auto-PGD on every aim, and past
    the guard of a `guarded` one.
    """
    aims = aims_of(detector)
    losses = [*detector.net.loss_names, "sum"]
    attacks = {f"pgd {name}": ("pgd", name) for name in losses}
    attacks |= {f"apgd {name}": ("apgd", name) for name in aims}
    if guarded:
        attacks |= {f"unseen {name}": ("unseen", name) for name in UNSEEN}
    if budget.queries:
        attacks["random search"] = ("search", "sum")
    return attacks


def patches() -> dict[str, tuple[str, str]]:
    """(algorithm, aim) of attacks outside the threat model, by name."""
    return {f"patch {name}": ("patch", name) for name in STUCK}


def attack(
    detector: ObjectDetector,
    x: Tensor,
    truth: Sequence[Truth],
    threat: Threat,
    *,
    how: tuple[str, str],
    budget: Budget,
    noise: Noise,
    guard: Guard | None = None,
) -> Tensor:
    """x (N, 3, S, S) after one of `attacks_of`, float32 within the ball, or of `patches`."""
    algorithm, name = how
    aim = aims_of(detector)[name]
    start = random_start(x, threat, noise)

    def loss(near: Tensor) -> Tensor:
        return aim(detector, near, truth)

    if algorithm == "pgd":
        size = threat.eps * min(1.0, 2.5 / budget.steps)
        return pgd(loss, x, threat, steps=budget.steps, step_size=size, start=start)
    if algorithm == "patch":
        return sticker(loss, x, places=1)
    if algorithm == "search":
        return search(loss, x, threat, queries=budget.queries, noise=noise)

    def gain(near: Tensor, rows: Tensor) -> Tensor:
        return aim(detector, near, [truth[row] for row in rows.tolist()])

    if algorithm == "unseen" and guard:
        return unseen(gain, x, threat, guard, steps=budget.steps, start=start)

    def objective(near: Tensor, rows: Tensor) -> Outcome:
        value = gain(near, rows)
        return Outcome(value, value, torch.zeros_like(value, dtype=torch.bool))

    return apgd(objective, x, threat, steps=budget.steps, start=start)[0]


def unseen(
    gain: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    threat: Threat,
    guard: Guard,
    *,
    steps: int,
    start: Tensor,
) -> Tensor:
    """Auto-PGD past a guard, from x + `start` and from x: of what is not flagged once it is rounded
    to 8 bits, what has the most `gain`; x where all is.
    """
    image = to_uint8(x)

    def sent(near: Tensor, rows: Tensor) -> Tensor:
        return to_float(in_8_bits(near, image[rows], threat))

    def value(near: Tensor, rows: Tensor) -> Tensor:
        margin = guard.margin(near)
        return torch.where(margin > 0, -margin - RANK, gain(near, rows))

    def objective(near: Tensor, rows: Tensor) -> Outcome:
        slope = value(near, rows)
        with torch.no_grad():
            kept = value(sent(near, rows), rows)
        return Outcome(kept, slope, torch.zeros_like(slope, dtype=torch.bool))

    rows = torch.arange(len(x), device=x.device)
    starts = (start, torch.zeros_like(start))
    one, other = (
        sent(apgd(objective, x, threat, steps=steps, start=start)[0], rows) for start in starts
    )
    with torch.no_grad():
        better = value(one, rows) > value(other, rows)
        best = torch.where(better[:, None, None, None], one, other)
        flagged = guard.flags(to_uint8(best)).to(x.device)
    return torch.where(flagged[:, None, None, None], x, best)


def search(
    loss: Callable[[Tensor], Tensor], x: Tensor, threat: Threat, *, queries: int, noise: Noise
) -> Tensor:
    """Random search: squares of plus or minus eps, ever smaller, each kept where it hurts.

    It asks for no gradient, so nothing that hides one stops it.
    """
    if threat.norm != "Linf":
        raise ValueError(f"the random search is of Linf alone: leave out its queries for {threat}")
    _, channels, height, width = x.shape
    signs = torch.where(noise.uniform(channels, 1, width) < 0.5, -1.0, 1.0)  # stripes
    best = (x + threat.eps * signs).clamp(0, 1)
    with torch.no_grad():
        value = loss(best)
        for query in range(queries):
            share = FIRST_SIDE / 2 ** (4 * query / queries)
            side = max(1, math.ceil(share * min(height, width)))
            room = torch.tensor([height - side, width - side], device=x.device)
            corners = (noise.uniform(2) * (room + 1)).long().minimum(room)
            sign = torch.where(noise.uniform(channels) < 0.5, -1.0, 1.0)
            moved = best.clone()
            for row, (top, left) in enumerate(corners.tolist()):
                window = (row, slice(None), slice(top, top + side), slice(left, left + side))
                moved[window] = x[window] + threat.eps * sign[row, :, None, None]
            moved = moved.clamp(0, 1)
            new = loss(moved)
            wins = new > value
            best = torch.where(wins[:, None, None, None], moved, best)
            value = torch.where(wins, new, value)
    return best


def masked(detector: ObjectDetector, x: Tensor, truth: Sequence[Truth]) -> Tensor:
    """Which images (N,) have no gradient of the losses: where attacks that follow one are blind."""
    near = x.detach().requires_grad_()
    value = losses_together(detector, near, truth).sum()
    (slope,) = torch.autograd.grad(value, near, allow_unused=True)
    if slope is None:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return slope.flatten(1).abs().amax(1) == 0
