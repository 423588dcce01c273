import math

import pytest
import torch
from blobs import blobs
from torch import Tensor

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train.data import Batch
from rampart.hardening.train.methods import (
    GAT_LAMBDA,
    MART_LAMBDA,
    METHODS,
    RSLAD_ALPHA,
    TRADES_BETA,
    adversarial_weights,
    classification,
    rectification,
)

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


@pytest.fixture
def batch(x: Tensor, label: Tensor) -> Batch:
    """With a teacher that is sure of the next class."""
    soft = torch.full((8, 10), 0.01).scatter(1, (label[:, None] + 1) % 10, 0.91)
    return Batch(x, label, Noise(torch.arange(8)), soft)


def probabilities(logits: Tensor) -> list[list[float]]:
    return [[math.exp(a) / sum(map(math.exp, row)) for a in row] for row in logits.tolist()]


def divergences(p: list[list[float]], q: list[list[float]]) -> list[float]:
    pairs = [zip(a, b, strict=True) for a, b in zip(p, q, strict=True)]
    return [sum(a * math.log(a / b) for a, b in pair) for pair in pairs]


def test_trades_is_clean_cross_entropy_plus_beta_times_the_divergence(
    net: Classifier, batch: Batch
) -> None:
    x, label = batch.x, batch.label
    attacked = (x + 0.05).clamp(0, 1)
    clean, moved = probabilities(net(x)), probabilities(net(attacked))
    right = [-math.log(p[y]) for p, y in zip(clean, label.tolist(), strict=True)]
    expected = (sum(right) + TRADES_BETA * sum(divergences(clean, moved))) / len(x)
    assert sum(divergences(clean, moved)) > 0.01
    loss = METHODS["trades"].loss(net, batch, attacked, 0.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_mart_weighs_the_divergence_by_the_doubt_in_the_clean_label(
    net: Classifier, batch: Batch
) -> None:
    x, label = batch.x, batch.label
    attacked = (x + 0.05).clamp(0, 1)
    clean, moved = probabilities(net(x)), probabilities(net(attacked))
    total = 0.0
    rows = zip(clean, moved, divergences(clean, moved), label.tolist(), strict=True)
    for p, q, gap, y in rows:
        wrong = max(value for k, value in enumerate(q) if k != y)
        total += -math.log(q[y]) - math.log(1 - wrong) + MART_LAMBDA * gap * (1 - p[y])
    loss = METHODS["mart"].loss(net, batch, attacked, 0.0)
    assert float(loss.detach()) == pytest.approx(total / len(x), rel=1e-4)


def test_gat_is_clean_cross_entropy_plus_lambda_times_the_squared_distance(
    net: Classifier, batch: Batch
) -> None:
    attacked = (batch.x + 0.05).clamp(0, 1)
    clean, moved = probabilities(net(batch.x)), probabilities(net(attacked))
    total = 0.0
    for p, q, y in zip(clean, moved, batch.label.tolist(), strict=True):
        gap = sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
        assert gap > 1e-4
        total += -math.log(p[y]) + GAT_LAMBDA * gap
    loss = METHODS["gat"].loss(net, batch, attacked, 0.0)
    assert float(loss.detach()) == pytest.approx(total / len(batch.x), rel=1e-4)


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
@pytest.mark.parametrize("name", ["gat", "pgd", "trades", "mart", "rslad"])
def test_crafted_images_lie_in_the_ball_and_raise_the_robust_part_of_the_loss(
    name: str, threat: Threat, net: Classifier, batch: Batch
) -> None:
    method = METHODS[name]
    attacked = method.craft(net, batch, threat, 10)
    distance = (attacked - batch.x).flatten(1)
    size = distance.abs().amax(1) if threat.norm == "Linf" else distance.norm(dim=1)
    assert size.max() <= threat.eps + 1e-5
    with torch.no_grad():
        unmoved, moved = (method.loss(net, batch, view, 0.0) for view in (batch.x, attacked))
    assert moved > unmoved + 0.01


@pytest.mark.parametrize("steps", [1, 3, 10, 40])
@pytest.mark.parametrize("name", ["pgd", "rslad"])
def test_steps_reach_the_border_of_the_ball_and_no_further(
    name: str, steps: int, net: Classifier, batch: Batch
) -> None:
    moved = METHODS[name].craft(net, batch, THREAT, steps) - batch.x
    assert moved.abs().max() == pytest.approx(THREAT.eps, abs=1e-6)


def test_distillation_without_a_teacher_says_how_to_name_one(net: Classifier, batch: Batch) -> None:
    with pytest.raises(ValueError, match="--teacher"):
        METHODS["rslad"].craft(net, batch._replace(soft=None), THREAT, 1)


def test_distillation_follows_the_teacher_on_attacked_and_clean_images(
    net: Classifier, batch: Batch
) -> None:
    attacked = (batch.x + 0.05).clamp(0, 1)
    assert batch.soft is not None
    teacher = batch.soft.tolist()
    gaps = [sum(divergences(teacher, probabilities(net(view)))) for view in (attacked, batch.x)]
    expected = (RSLAD_ALPHA * gaps[0] + (1 - RSLAD_ALPHA) * gaps[1]) / 8
    loss = METHODS["rslad"].loss(net, batch, attacked, 0.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_control_is_not_attacked(net: Classifier, batch: Batch) -> None:
    assert METHODS["standard"].craft(net, batch, THREAT, 10) is batch.x


def test_rectified_confidence_learns_the_probability_of_the_true_label() -> None:
    torch.manual_seed(0)
    config = ClassifierConfig("resnet10", 4, width=0.125, image_size=16, rectified=True)
    net = Classifier(config).eval()
    assert net.rectifier is not None
    features = torch.randn(64, net.feature_size)
    with torch.no_grad():
        net.head.weight.mul_(10)
        logits = net.head(features)
        # Right in one half of feature space, wrong in the other.
        label = torch.where(features[:, 0] > 0, logits.argmax(1), logits.argmin(1))
        true = logits.softmax(1).gather(1, label[:, None]).squeeze(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        rectification(net, features, label).backward()
        optimizer.step()
    gap = (net.rectified_confidence(features, logits) - true).abs().mean()
    assert gap < 0.1 < (logits.softmax(1).amax(1) - true).abs().mean()
    changed = [n for n, v in net.state_dict().items() if not torch.equal(v, before[n])]
    assert all(name.startswith("rectifier.") for name in changed)


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


def test_adversarial_weights_hurt_in_mixed_precision_too(net: Classifier, batch: Batch) -> None:
    def loss() -> Tensor:
        return METHODS["pgd"].loss(net, batch, batch.x, 0.0)

    with torch.autocast("cpu", torch.bfloat16):
        unmoved = loss().detach()
        with adversarial_weights(net, loss, 0.02):
            assert loss().detach() > unmoved + 0.01
        assert torch.equal(loss().detach(), unmoved)


def test_an_attack_without_steps_is_refused(net: Classifier, batch: Batch) -> None:
    with pytest.raises(ValueError, match="--steps 0"):
        METHODS["pgd"].craft(net, batch, THREAT, 0)


def test_without_gamma_weights_stay(net: Classifier, x: Tensor, label: Tensor) -> None:
    def loss() -> Tensor:
        raise AssertionError("one pass too many")

    before = net.head.weight.clone()
    with adversarial_weights(net, loss, 0.0):
        assert torch.equal(net.head.weight, before)
