import pytest
import torch
from blobs import Learned

from rampart.handlers.verdict import Calibration
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import (
    HANDLINGS,
    RANK,
    View,
    as_loss,
    flood,
    look_at,
    mislead,
    targeted,
    untargeted,
)
from rampart.hardening.attack.pgd import Threat, pgd, random_start
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float


def guarded(learned: Learned, x: torch.Tensor) -> View:
    """A detector that rejects dark images, beside the learned network."""
    return View(learned.model(x), 0.5 - x.mean(dim=(1, 2, 3)))


def test_only_a_wrong_label_that_is_accepted_wins(learned: Learned) -> None:
    x = torch.cat([learned.x[:2], learned.x[:2]])
    x[:2] *= 0.1  # dark: rejected
    guess = learned.model(x).argmax(1)
    label = guess.clone()
    label[[0, 2]] = (label[[0, 2]] + 1) % 10
    rows = torch.arange(4)
    bright = bool((x[2:].mean(dim=(1, 2, 3)) > 0.5).all())
    x[2:] = x[2:] if bright else (x[2:] + 0.5).clamp(0, 1)
    label[2:] = learned.model(x[2:]).argmax(1)
    label[2] = (label[2] + 1) % 10
    for handling in HANDLINGS:
        objective = mislead(
            lambda x: guarded(learned, x), untargeted(label), label, handling=handling
        )
        out = objective(x.requires_grad_(), rows)
        assert out.won.tolist() == [False, False, True, False]


def test_with_a_target_no_other_wrong_label_wins(learned: Learned) -> None:
    x, guess = learned.x[:3], learned.model(learned.x[:3]).argmax(1)
    label, rows = (guess + 1) % 10, torch.arange(3)
    target = torch.stack([guess[0], (guess[1] + 2) % 10, label[2]])
    for handling in HANDLINGS:
        loss = targeted(label, target)
        aim = mislead(learned.look, loss, label, handling=handling, target=target)
        assert aim(x.clone().requires_grad_(), rows).won.tolist() == [True, False, False]


@pytest.mark.parametrize("handling", ["selective", "orthogonal"])
def test_staged_values_rank_right_below_rejected_below_won(handling: str, learned: Learned) -> None:
    x = torch.stack([learned.x[0], learned.x[0] * 0.1, torch.ones_like(learned.x[0])])
    label = learned.model(x).argmax(1)
    label[1:] = (label[1:] + 1) % 10
    objective = mislead(lambda x: guarded(learned, x), untargeted(label), label, handling=handling)
    right, rejected, won = objective(x.requires_grad_(), torch.arange(3)).value.tolist()
    assert right < RANK / 2 < rejected < 1.5 * RANK < won


def test_an_orthogonal_step_leaves_the_other_aim_where_it_is(learned: Learned) -> None:
    x = learned.x[:8].clone().requires_grad_()
    label = learned.label[:8]
    loss = untargeted(label)
    objective = mislead(lambda x: guarded(learned, x), loss, label, handling="orthogonal")
    (step,) = torch.autograd.grad(objective(x, torch.arange(8)).slope.sum(), x)
    seen = guarded(learned, x)
    assert seen.margin is not None
    (quiet,) = torch.autograd.grad(seen.margin.sum(), x, retain_graph=True)
    (aim,) = torch.autograd.grad(loss(seen.logits, torch.arange(8)).sum(), x)
    assert float((step * quiet).sum(dim=(1, 2, 3)).abs().max()) < 1e-5
    assert ((step * aim).sum(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("handling", HANDLINGS)
def test_every_handling_brings_wrong_images_closer_to_being_accepted(
    handling: str,
    tiny_pipeline: DefendedClassifier,
    tiny_images: Images,
    tiny_calibration: Calibration,
) -> None:
    x = to_float(tiny_images.image[:16])
    look = look_at(tiny_pipeline, tiny_calibration, 0.2)
    with torch.no_grad():
        label = look(x).logits.argmax(1)
    threat = Threat()
    margins = []
    for view in (lambda x: View(look(x).logits), look):
        objective = mislead(view, untargeted(label), label, handling=handling, weight=3.0)
        start = random_start(x, threat, Noise(torch.arange(len(x))))
        loss = as_loss(objective, len(x))
        found = pgd(loss, x, threat, steps=10, step_size=threat.eps / 4, start=start)
        with torch.no_grad():
            margin = look(found).margin
        assert margin is not None
        margins.append(margin)
    assert (margins[1] <= margins[0]).float().mean() > 0.8
    assert margins[1].mean() < margins[0].mean()


def test_targeted_losses_ignore_the_scale_of_the_logits_and_favour_the_target() -> None:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    label, target, rows = logits.argmax(1), logits.argmin(1), torch.arange(6)
    loss = targeted(label, target)
    torch.testing.assert_close(loss(logits, rows), loss(logits * 1e4, rows))
    closer = logits.scatter_add(1, target[:, None], torch.ones(6, 1))
    assert (loss(closer, rows) > loss(logits, rows)).all()
    few = torch.tensor([[1.0, 0.0, -1.0]])  # three classes have no DLR loss
    assert float(targeted(torch.tensor([0]), torch.tensor([1]))(few, rows[:1])) == -1.0


def test_a_rate_too_small_for_the_calibration_rejects_nothing(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, tiny_calibration: Calibration
) -> None:
    x = to_float(tiny_images.image[:2])
    assert look_at(tiny_pipeline, tiny_calibration, 1e-9)(x).margin is None
    assert look_at(tiny_pipeline, tiny_calibration, 0.1)(x).margin is not None


def test_flooding_a_victim_that_never_rejects_is_refused(learned: Learned) -> None:
    with pytest.raises(ValueError, match="rejects nothing"):
        flood(learned.look)(learned.x, torch.arange(len(learned.x)))
