import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import (
    Objective,
    Outcome,
    Threat,
    apgd,
    checkpoints,
    cross_entropy,
    n_fgsm,
    pgd,
    pgd10,
    random_start,
)

THREATS = [Threat("Linf", 8 / 255), Threat("L2", 0.5)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    )


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(16, 3, 8, 8, generator=generator)
    x[0], x[1] = 0.0, 1.0
    return x, torch.randint(5, (16,), generator=generator)


def size(d: torch.Tensor, threat: Threat) -> float:
    order = torch.inf if threat.norm == "Linf" else 2
    return float(torch.linalg.vector_norm(d.flatten(1), ord=order, dim=1).max())


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("attack", [n_fgsm, pgd10])
def test_every_attack_raises_the_loss_and_returns_images_in_range(
    attack: Callable[..., torch.Tensor],
    threat: Threat,
    model: torch.nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, label = batch
    loss = cross_entropy(model, label)
    adversarial = attack(loss, x, threat, noise=Noise(torch.arange(len(x))))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert float((loss(adversarial) - loss(x)).detach().mean()) > 0.01
    assert not adversarial.requires_grad
    # N-FGSM leaves the ball on purpose: noise of 2 eps, then a step of eps.
    reach = 3 if attack is n_fgsm else 1
    assert size(adversarial - x, threat) <= reach * threat.eps + 1e-6


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_more_steps_never_give_a_weaker_attack_on_any_image(
    threat: Threat, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, label = batch
    loss = cross_entropy(model, label)
    start = random_start(x, threat, Noise(torch.arange(len(x))))
    found = [
        loss(pgd(loss, x, threat, steps=n, step_size=threat.eps / 4, start=start)).detach()
        for n in (0, 1, 5, 20)
    ]
    for weaker, stronger in pairwise(found):
        assert (stronger >= weaker - 1e-6).all()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_random_start_fills_the_ball_and_stays_inside(threat: Threat) -> None:
    start = random_start(torch.zeros(64, 3, 8, 8), threat, Noise(torch.arange(64)))
    assert 0.9 * threat.eps < size(start, threat) <= threat.eps + 1e-6


def test_an_attack_is_reproducible_from_its_seed(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, label = batch
    first, again, other = (
        pgd10(
            cross_entropy(model, label), x, Threat(), noise=Noise(torch.arange(len(x)), seed=seed)
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_threat_prints_in_the_fields_units() -> None:
    assert [str(t) for t in THREATS] == ["Linf 8/255", "L2 0.5"]


def standing(model: torch.nn.Module, label: torch.Tensor) -> Objective:
    """Cross-entropy that never counts as a victory, so that no image leaves the attack."""

    def objective(x: torch.Tensor, rows: torch.Tensor) -> Outcome:
        loss = torch.nn.functional.cross_entropy(model(x), label[rows], reduction="none")
        return Outcome(loss, loss, torch.zeros_like(loss, dtype=torch.bool))

    return objective


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_auto_pgd_finds_the_losses_that_the_official_one_finds_from_the_same_start(
    threat: Threat, model: torch.nn.Sequential, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, label = batch
    # Steep in a large ball, where fewer steps, no momentum or plain PGD miss by 0.5 and more.
    model, threat = copy.deepcopy(model), threat._replace(eps=8 * threat.eps)
    with torch.no_grad():
        for layer in (model[0], model[-1]):
            layer.weight.mul_(4)
    start = random_start(x, threat, Noise(torch.arange(len(x))))
    found, won = apgd(standing(model, label), x, threat, steps=50, start=start)
    assert not won.any()
    official = APGDAttack(model, n_iter=50, norm=threat.norm, eps=threat.eps, seed=0, device="cpu")
    official.init_hyperparam(x)
    official.loss = "ce"
    theirs = official.attack_single_run(x, label, x_init=(x + start).clamp(0, 1))[2]
    ours = cross_entropy(model, label)(found).detach()
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_auto_pgd_stays_in_the_ball_and_reports_who_won(
    threat: Threat, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, _ = batch
    label = model(x).argmax(1)

    def objective(x: torch.Tensor, rows: torch.Tensor) -> Outcome:
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, label[rows], reduction="none")
        return Outcome(loss, loss, logits.argmax(1) != label[rows])

    found, won = apgd(objective, x, threat, steps=30, start=torch.zeros_like(x))
    assert int(won.sum()) > 0
    assert torch.equal(won, model(found).argmax(1) != label)
    assert size(found - x, threat) <= threat.eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


def test_step_sizes_are_reconsidered_where_the_paper_says() -> None:
    # 0.22, then shorter by 0.03 each time, never below 0.06 (Croce and Hein 2020, section 3.2).
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
