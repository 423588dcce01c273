import math

import pytest
import torch
from blobs import blobs
from torch import Tensor

from hardening.attacks import Threat
from hardening.data import to_float
from hardening.methods import (
    MART_LAMBDA,
    METHODS,
    TRADES_BETA,
    adversarial_weights,
    classification,
)
from hardening.models import Classifier, ClassifierConfig

THREAT = Threat("Linf", 8 / 255)


@pytest.fixture
def net() -> Classifier:
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    with torch.no_grad():
        net.head.weight.mul_(10)  # predictions far from uniform
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return to_float(blobs(8, size=16).image)


@pytest.fixture
def label() -> Tensor:
    return blobs(8, size=16).label


def probabilities(logits: Tensor) -> list[list[float]]:
    return [[math.exp(a) / sum(map(math.exp, row)) for a in row] for row in logits.tolist()]


def divergences(p: list[list[float]], q: list[list[float]]) -> list[float]:
    pairs = [zip(a, b, strict=True) for a, b in zip(p, q, strict=True)]
    return [sum(a * math.log(a / b) for a, b in pair) for pair in pairs]


def test_trades_is_clean_cross_entropy_plus_beta_times_the_divergence(
    net: Classifier, x: Tensor, label: Tensor
) -> None:
    attacked = (x + 0.05).clamp(0, 1)
    clean, moved = probabilities(net(x)), probabilities(net(attacked))
    right = [-math.log(p[y]) for p, y in zip(clean, label.tolist(), strict=True)]
    expected = (sum(right) + TRADES_BETA * sum(divergences(clean, moved))) / len(x)
    assert sum(divergences(clean, moved)) > 0.01
    loss = METHODS["trades"].loss(net, x, attacked, label, 0.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_mart_weighs_the_divergence_by_the_doubt_in_the_clean_label(
    net: Classifier, x: Tensor, label: Tensor
) -> None:
    attacked = (x + 0.05).clamp(0, 1)
    clean, moved = probabilities(net(x)), probabilities(net(attacked))
    total = 0.0
    rows = zip(clean, moved, divergences(clean, moved), label.tolist(), strict=True)
    for p, q, gap, y in rows:
        wrong = max(value for k, value in enumerate(q) if k != y)
        total += -math.log(q[y]) - math.log(1 - wrong) + MART_LAMBDA * gap * (1 - p[y])
    loss = METHODS["mart"].loss(net, x, attacked, label, 0.0)
    assert float(loss.detach()) == pytest.approx(total / len(x), rel=1e-4)


def test_smoothing_gives_its_share_to_all_classes_alike() -> None:
    logits, label = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    (p,) = probabilities(logits)
    expected = -0.9 * math.log(p[0]) - 0.1 / 3 * sum(math.log(value) for value in p)
    assert float(classification((logits,), label, 0.1)) == pytest.approx(expected, rel=1e-5)


def test_auxiliary_heads_count_three_tenths() -> None:
    logits, label = torch.zeros(4, 10), torch.arange(4)
    loss = classification((logits, logits, logits), label, 0.0)
    assert float(loss) == pytest.approx(1.6 * math.log(10), rel=1e-5)


@pytest.mark.parametrize("threat", [THREAT, Threat("L2", 0.5)], ids=str)
@pytest.mark.parametrize("name", ["pgd", "trades", "mart"])
def test_crafted_images_lie_in_the_ball_and_raise_the_robust_part_of_the_loss(
    name: str, threat: Threat, net: Classifier, x: Tensor, label: Tensor
) -> None:
    method = METHODS[name]
    attacked = method.craft(net, x, label, threat, torch.Generator().manual_seed(0))
    distance = (attacked - x).flatten(1)
    size = distance.abs().amax(1) if threat.norm == "Linf" else distance.norm(dim=1)
    assert size.max() <= threat.eps + 1e-5
    with torch.no_grad():
        unmoved, moved = (method.loss(net, x, view, label, 0.0) for view in (x, attacked))
    assert moved > unmoved + 0.01


def test_the_control_is_not_attacked(net: Classifier, x: Tensor, label: Tensor) -> None:
    method = METHODS["standard"]
    assert method.craft(net, x, label, THREAT, torch.Generator()) is x


def test_adversarial_weights_hurt_within_and_are_gone_afterwards(
    net: Classifier, x: Tensor, label: Tensor
) -> None:
    def loss() -> Tensor:
        return classification((net(x),), label, 0.0)

    before = {name: value.clone() for name, value in net.state_dict().items()}
    unmoved = loss().detach()
    with adversarial_weights(net, loss, 0.01):
        moved = loss()
        moved.backward()
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                step = float((weight.detach() - before[name]).norm() / before[name].norm())
                assert step == pytest.approx(0.01, rel=0.01), name
    assert moved > unmoved + 0.01
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.head.weight.grad.abs().sum() > 0


def test_without_gamma_weights_stay(net: Classifier, x: Tensor, label: Tensor) -> None:
    def loss() -> Tensor:
        raise AssertionError("one pass too many")

    before = net.head.weight.clone()
    with adversarial_weights(net, loss, 0.0):
        assert torch.equal(net.head.weight, before)
