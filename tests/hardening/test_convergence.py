"""The loss of one epoch bounds that of the next."""

from pathlib import Path

import pytest
import torch
from blobs import blobs
from torch import Tensor, nn

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train import loop, methods
from rampart.hardening.train.convergence import Convergence, outlying
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Recipe, train_classifier
from rampart.hardening.train.methods import METHODS

pytestmark = pytest.mark.training
CONFIG = ClassifierConfig("resnet10", 10, width=0.125, image_size=16)


def after(*epochs: list[float]) -> Convergence:
    """What remains of epochs with these losses, at the start of the next one."""
    convergence = Convergence()
    for epoch, losses in enumerate([*epochs, [0.0]]):
        for loss in losses:
            outlying(convergence, torch.tensor(loss))
            convergence.note(epoch)
    return convergence


def signs(convergence: Convergence, *losses: float) -> list[float]:
    return [float(outlying(convergence, torch.tensor(loss))) for loss in losses]


def test_two_epochs_pass_before_anything_is_outlying() -> None:
    assert signs(Convergence(), 0.0, 9.0) == [0.0, 0.0]
    assert signs(after([2.0, 2.0]), 0.0, 9.0) == [0.0, 0.0]
    assert signs(after([2.0], [2.0]), 0.0, 9.0) == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("earlier", "stride"), [(1.5, 0.02), (1.525, 0.025), (1.475, 0.025), (1.9, 0.03)]
)
def test_the_stride_is_what_the_last_epoch_moved_within_bounds(
    earlier: float, stride: float
) -> None:
    convergence = after([earlier], [1.4, 1.6])  # the last mean is 1.5
    inside, outside = stride - 0.002, stride + 0.002
    assert signs(convergence, 1.5 + inside, 1.5 - inside) == [0.0, 0.0]
    assert signs(convergence, 1.5 + outside, 1.5 - outside) == [1.0, -1.0]


def batch() -> Batch:
    images = blobs(8, size=16)
    return Batch(to_float(images.image), images.label, Noise(torch.arange(8)))


@pytest.mark.parametrize(("usual", "sign"), [(0.0, 1.0), (99.0, -1.0), (None, 0.0)])
def test_the_clean_loss_is_added_or_taken_away_where_it_is_outlying(
    usual: float | None, sign: float
) -> None:
    torch.manual_seed(0)
    net, few = Classifier(CONFIG).eval(), batch()
    attacked = (few.x + 0.05).clamp(0, 1)
    past = after([usual], [usual]) if usual is not None else Convergence()
    loss = METHODS["fgsm-cs"].loss(net, few._replace(convergence=past), attacked, 0.0)
    parts = [nn.functional.cross_entropy(net(x), few.label) for x in (attacked, few.x)]
    assert float(loss.detach()) == pytest.approx(
        float((parts[0] + sign * parts[1]).detach()), rel=1e-5
    )


def test_the_attack_is_one_step_of_eps_from_noise_of_eps() -> None:
    torch.manual_seed(0)
    net, few = Classifier(CONFIG).eval(), batch()
    with torch.no_grad():
        net.head.weight.mul_(10)
    gray = few._replace(x=few.x.clamp(0.2, 0.8))  # so that no pixel is clipped
    moved = METHODS["fgsm-cs"].craft(net, gray, Threat("Linf", 8 / 255), 10) - gray.x
    assert 12 / 255 < float(moved.abs().max()) <= 16 / 255 + 1e-6
    assert float(moved.abs().mean()) == pytest.approx(8 / 255, rel=0.05)


def test_a_run_cut_off_in_its_third_epoch_goes_on_with_the_losses_of_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[float] = []

    def spied(convergence: Convergence, loss: Tensor) -> Tensor:
        sign = outlying(convergence, loss)
        decided.append(float(sign))
        return sign

    monkeypatch.setattr(methods, "outlying", spied)
    threat = Threat("Linf", 2 / 255)
    recipe = Recipe("fgsm-cs", threat, 4, 32, 0.1, ema=0.5, precision="fp32", awp=0.005)
    images = blobs(192, size=16), blobs(64, size=16, seed=1)

    def train(folder: Path) -> dict[str, Tensor]:
        torch.manual_seed(0)
        file = train_classifier(Classifier(CONFIG), recipe, folder, images)
        return checkpoint.read(file)[1]

    whole = train(tmp_path / "whole")
    signs, validated = decided.copy(), loop.validate
    assert not any(signs[:24])  # two calls a step, six steps an epoch
    assert {-1.0, 1.0} & set(signs[24:])

    def cut(*arguments: object) -> dict[str, float]:
        if len(decided) == 36:
            raise KeyboardInterrupt
        return validated(*arguments)

    decided.clear()
    monkeypatch.setattr(loop, "validate", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    assert len(decided) == 36
    monkeypatch.setattr(loop, "validate", validated)
    rest = train(tmp_path / "cut")
    assert decided == signs
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
