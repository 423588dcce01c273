"""A backward pass inside a graph."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rampart.export.gradients import folded, unrolled
from rampart.export.to_onnx import to_onnx
from rampart.handlers.engine import Engine
from rampart.hardening.model import detectors
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.purifier import BlockPurifier, BlockPurifierConfig

SIZE = 32


def pipeline(arch: str, width: float = 1.0, activation: str = "relu") -> DefendedClassifier:
    """An untrained one that looks at consistency."""
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig(arch, 10, width, SIZE, activation=activation))
    looks = ("consistency", "confidence")
    return DefendedClassifier(net, None, looks).eval().requires_grad_(False)


def images(count: int) -> Tensor:
    """Noise, uint8 (count, SIZE, SIZE, 3)."""
    draws = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=draws)


# Residuals and strides; max-pooling; layer norms and GELU; attention and a class token.
@pytest.mark.parametrize(
    ("arch", "activation"),
    [
        ("resnet10", "relu"),
        ("resnet10", "silu"),
        pytest.param("vgg11_bn", "relu", marks=pytest.mark.slow),
        pytest.param("timm:test_convnext", "relu", marks=pytest.mark.slow),
        pytest.param("timm:test_vit", "relu", marks=pytest.mark.slow),
    ],
)
def test_the_graph_takes_the_step_that_torch_takes_at_any_batch(
    arch: str, activation: str, tmp_path: Path
) -> None:
    looks = pipeline(arch, 1 if ":" in arch else 0.125, activation)
    graph = to_onnx(looks, tmp_path / "graph.onnx")
    engine = Engine(graph)
    for count in (1, 2, 5):
        image = images(count)
        with torch.no_grad():
            own = looks(image)
        out = engine.run(image.numpy())
        assert np.abs(own.scores.numpy() - out.scores).max() < 1e-4
        assert np.abs(own.logits.numpy() - out.logits).max() < 1e-4
    # `quantize` finds the classifier by the names of its weights.
    names = [value.name for value in onnx.load(graph).graph.initializer]
    assert any(name.startswith("classifier.backbone.") for name in names)


class PreActivated(nn.Module):
    """What its stem and its shared convolution give is read by more than one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = (nn.Conv2d(n, 8, 3, padding=1, bias=False) for n in (3, 8))
        self.last = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        one = self.norms[1](self.shared(self.norms[0](stem).relu())).relu()
        two = self.norms[2](self.shared(one)).relu()
        return self.fc(self.norms[3](self.last(two + stem)).relu().mean((2, 3)))


def test_a_normalization_is_folded_only_into_what_it_alone_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = PreActivated().eval()
    for norm in module.norms:
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(values, 0.5, 2)
    net = Classifier.wrap(module, head="fc", classes=10, image_size=SIZE)
    whole = DefendedClassifier(net, None, ("consistency", "confidence"))
    whole = whole.eval().requires_grad_(False)
    engine, image = Engine(to_onnx(whole, tmp_path / "graph.onnx")), images(3)
    with torch.no_grad():
        own = whole(image)
    out = engine.run(image.numpy())
    assert np.abs(own.scores.numpy() - out.scores).max() < 1e-4
    assert np.abs(own.logits.numpy() - out.logits).max() < 1e-4
    left = folded(whole, images(2)).classifier.backbone.net.norms
    assert [type(norm) for norm in left] == [nn.BatchNorm2d] * 3 + [nn.Identity]


class Choosing(nn.Module):
    """It chooses as the gradient of ReLU does, and not between a slope and nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.relu() <= 0, -torch.ones_like(x), x)


def test_a_choice_of_your_own_network_is_no_gradient_of_relu() -> None:
    x = torch.tensor([[-2.0, 0.0, 3.0], [1.0, -1.0, 2.0]])
    assert torch.equal(unrolled(Choosing(), x)(x), Choosing()(x))


def test_a_purifier_stands_in_front_of_a_graph_that_takes_the_step(tmp_path: Path) -> None:
    classifier = pipeline("resnet10", 0.125).classifier
    purifier = BlockPurifier(BlockPurifierConfig(width=8, blocks=1))
    nn.init.normal_(purifier.get_parameter("residual.4.weight"), std=0.05)
    looks = ("consistency", "disagreement", "reconstruction")
    whole = DefendedClassifier(classifier, purifier, looks).eval().requires_grad_(False)
    engine, image = Engine(to_onnx(whole, tmp_path / "graph.onnx")), images(3)
    with torch.no_grad():
        own = whole(image)
    out = engine.run(image.numpy())
    assert np.abs(own.scores.numpy() - out.scores).max() < 1e-4
    assert np.abs(own.logits.numpy() - out.logits).max() < 1e-4
    assert np.abs(out.logits - out.raw_logits).max() > 1e-3  # it does purify
    assert np.abs(own.purified.numpy().astype(int) - out.purified).max() <= 1


def test_the_step_lowers_the_margin_and_moves_no_pixel_further_than_the_radius() -> None:
    net = pipeline("resnet18", 0.125).classifier
    x = images(8).permute(0, 3, 1, 2).float() / 255
    near = detectors.step_against(net, x, torch.tensor(2 / 255))
    assert float((near - x).abs().max()) <= 2 / 255 + 1e-6
    label = net(x).argmax(1)
    before, after = (detectors.margin(net(y), label) for y in (x, near))
    assert (after < before).all()


def test_margin_is_the_lead_of_a_label() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, -1.0, 4.0]])
    lead = detectors.margin(logits, torch.tensor([0, 1]))
    assert lead.tolist() == [0.5, -5.0]


def test_attackers_see_the_gradient_of_the_score() -> None:
    looks = pipeline("resnet18", 0.125)
    x = (images(4).permute(0, 3, 1, 2).float() / 255).requires_grad_()
    looks.defend(x).scores[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert float(x.grad.abs().amax((1, 2, 3)).min()) > 0


def test_a_gradient_that_onnx_lacks_is_told() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                pooled = nn.functional.adaptive_max_pool2d(y, 3)
                (slope,) = torch.autograd.grad(pooled.sum(), y)
            return slope

    with pytest.raises(
        ValueError, match=r"adaptive_max_pool2d_backward\.default, which ONNX lacks"
    ):
        unrolled(Odd(), torch.rand(2, 3, 8, 8))
