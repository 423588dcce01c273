from itertools import pairwise

import pytest
import torch

from hardening.attacks import ATTACKS, Threat, cross_entropy, pgd, random_start

THREATS = [Threat("Linf", 8 / 255), Threat("L2", 0.5)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
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
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_raises_the_loss_and_returns_images_in_range(
    name: str, threat: Threat, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, label = batch
    loss = cross_entropy(model, label)
    adversarial = ATTACKS[name](loss, x, threat, generator=torch.Generator().manual_seed(0))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert float((loss(adversarial) - loss(x)).detach().mean()) > 0.01
    assert not adversarial.requires_grad
    # N-FGSM leaves the ball on purpose: noise of 2 eps, then a step of eps.
    reach = 3 if name == "n_fgsm" else 1
    assert size(adversarial - x, threat) <= reach * threat.eps + 1e-6


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_more_steps_never_give_a_weaker_attack_on_any_image(
    threat: Threat, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, label = batch
    loss = cross_entropy(model, label)
    start = random_start(x, threat, torch.Generator().manual_seed(0))
    found = [
        loss(pgd(loss, x, threat, steps=n, step_size=threat.eps / 4, start=start)).detach()
        for n in (0, 1, 5, 20)
    ]
    for weaker, stronger in pairwise(found):
        assert (stronger >= weaker - 1e-6).all()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_random_start_fills_the_ball_and_stays_inside(threat: Threat) -> None:
    start = random_start(torch.zeros(64, 3, 8, 8), threat, torch.Generator().manual_seed(0))
    assert 0.9 * threat.eps < size(start, threat) <= threat.eps + 1e-6


def test_an_attack_is_reproducible_from_its_seed(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, label = batch
    first, again, other = (
        ATTACKS["pgd20"](
            cross_entropy(model, label), x, Threat(), generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_threat_prints_in_the_fields_units() -> None:
    assert [str(t) for t in THREATS] == ["Linf 8/255", "L2 0.5"]
