"""What would fail after the training fails before it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from command import run
from torch import Tensor, nn

import rampart as rp
from rampart import preflight
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import ARCHITECTURES, Classifier, ClassifierConfig
from rampart.hardening.model.faults import Faults
from rampart.hardening.train.loop import Recipe
from rampart.preflight import check_export, check_network, check_place, try_classifier


class Net(nn.Module):
    """A network of one's own, right but for what a test puts before its head."""

    def __init__(self, between: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 10)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.conv(x).relu().mean((2, 3)), self.training))


def broken(between: Callable[[Tensor, bool], Tensor]) -> Classifier:
    """A network that was right when it was wrapped."""
    net = Classifier.wrap(Net(lambda x, _: x), head="fc", classes=10, image_size=16)
    net.backbone.net.between = between
    return net


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda x, _: nn.functional.dropout(x, 0.5, training=True), "differently each time"),
        (lambda x, _: x - x.mean(0), "differently in another batch"),
        (lambda x, _: x.detach(), "passes no gradient to its input"),
        (lambda x, _: x * 0, "a gradient that is zero"),
        (lambda x, _: x / 0, "not finite"),
        (lambda x, _: (x, x), "more than one head"),
        (lambda x, _: torch.cat([x, x], 1), "more than one head"),
    ],
)
def test_a_network_that_cannot_be_defended_is_refused(
    between: Callable[[Tensor, bool], Tensor], message: str
) -> None:
    check_network(broken(lambda x, _: x))
    with pytest.raises(ValueError, match=message):
        check_network(broken(between))


class Tied(nn.Module):
    """A convolution that is folded, and whose weights are used a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 10)
        nn.init.constant_(self.norm.running_var, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        return self.fc(nn.functional.conv2d(y, self.conv.weight).mean((2, 3)))


def test_a_network_whose_graph_takes_another_step_has_no_variant_guarded() -> None:
    torch.manual_seed(0)
    tied = Classifier.wrap(Tied(), head="fc", classes=10, image_size=16)
    with pytest.raises(ValueError, match="its gradient as a graph is another one"):
        preflight.check_guardable(tied)


def test_dropout_as_a_layer_is_no_fault() -> None:
    net = broken(lambda x, training: nn.functional.dropout(x, 0.5, training=training))
    check_network(net.train())
    assert net.training


def test_a_network_with_two_heads_is_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs timm")
    file = data_in(tmp_path, 400)
    two = ["--arch", "timm:deit_tiny_distilled_patch16_224", "--image-size", 32]
    with pytest.raises(ValueError, match=r"deit_tiny_distilled.* more than one head"):
        run("train", "--data", file, "--out", tmp_path / "run", *two)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_exported_is_refused_and_what_is_exported_answers_alike() -> None:
    check_export(broken(lambda x, _: x))
    with pytest.raises(ValueError, match="cannot be exported to ONNX"):
        check_export(broken(lambda x, _: x if float(x.sum()) > 0 else -x))


def test_a_deep_network_is_exported_too_before_it_is_trained() -> None:
    deep = Net(lambda x, _: x)
    deep.layers = nn.ModuleList(nn.Identity() for _ in range(200))
    net = Classifier.wrap(deep, head="fc", classes=10, image_size=16)
    net.backbone.net.between = lambda x, _: x if float(x.sum()) > 0 else -x
    with pytest.raises(ValueError, match="cannot be exported to ONNX"):
        check_export(net)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("resnet10", 32),
        ("resnet18", 224),
        ("resnet50", 32),
        ("vgg11", 32),
        ("vgg11_bn", 64),
        ("alexnet", 64),
        ("googlenet", 32),
        ("squeezenet1_1", 32),
    ],
)
def test_every_family_of_our_networks_can_be_exported_so_no_training_has_to_try(
    arch: str, size: int
) -> None:
    width = 0.25 if arch.startswith(("resnet", "vgg")) else 1.0
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig(arch, 10, width=width, image_size=size))
    check_export(net)
    families = ("resnet", "wide_resnet", "vgg", "alexnet", "googlenet", "squeezenet")
    assert all(name.startswith(families) for name in ARCHITECTURES)


def test_a_trial_leaves_network_and_random_numbers_as_they_are() -> None:
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    digest, before = checkpoint.digest(net), torch.get_rng_state()
    trial = try_classifier(net, Recipe(batch_size=8))
    assert checkpoint.digest(net) == digest
    assert torch.equal(torch.get_rng_state(), before)
    assert trial.step > 0 and trial.look > 0 and trial.memory > 1e6
    recipe = Recipe(batch_size=8, epochs=3)
    expected = 3 * (12 * trial.step + 20 * trial.look)
    assert trial.seconds(100, 20, recipe) == pytest.approx(expected)


def test_a_batch_that_a_network_does_not_take_is_refused() -> None:
    norm = nn.BatchNorm1d(8)
    net = broken(lambda x, training: norm.train(training)(x))
    with pytest.raises(ValueError, match=r"a step with --batch-size 1 fails: Expected more than 1"):
        preflight.try_steps(preflight.Trainer(net, Recipe(batch_size=1), Path()), net, rp.Threat())


def test_a_place_that_cannot_be_written_or_is_too_small_is_refused(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "folder", 1e3, "--out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, not a folder"):
        check_place(tmp_path / "file" / "folder", 0, "--out")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match=r"--runs .* MB, .* MB are free"):
        check_place(tmp_path, free * 2, "--runs")
    with pytest.raises(ValueError, match="nothing can be written into /proc"):
        check_place(Path("/proc/nowhere"), 0, "--out")


def test_all_faults_are_told_at_once_and_a_single_one_as_it_is() -> None:
    def fail(error: Exception) -> None:
        raise error

    faults = Faults()
    assert faults.of(lambda: 3) == 3
    faults.tell()
    faults.of(lambda: fail(FileNotFoundError("no data")))
    with pytest.raises(FileNotFoundError, match=r"^no data$"):
        faults.tell()
    faults.of(lambda: fail(ValueError("no name")))
    with pytest.raises(ValueError, match=r"2 things .*:\n  1\. no data\n  2\. no name"):
        faults.tell()


def data_in(folder: Path, count: int, *, size: int = 32, classes: int = 3) -> Path:
    images, file = blobs(count, size=size), folder / "data.npz"
    np.savez(file, image=images.image.numpy(), label=images.label.numpy() % classes)
    return file


def test_harden_lists_all_that_is_wrong_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = blobs(400)
    np.savez("data.npz", image=images.image.numpy(), label=images.label.numpy() % 3 + 1)
    command = ["harden", "--data", "data.npz", "--out", "mine.mar", "--arch", "alexnet"]
    with pytest.raises(ValueError, match="2 things to put right") as told:
        run(*command, "--width", 0.125)
    for fault in ("data.npz has no image of class 0", "alexnet has no --width"):
        assert fault in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_train_says_how_long_it_will_take_before_it_begins(tmp_path: Path) -> None:
    net = ["--arch", "resnet10", "--width", 0.125, "--image-size", 16, "--epochs", 1]
    data = ["--data", data_in(tmp_path, 400, size=16), "--device", "cpu"]
    told = run("train", *data, *net, "--out", tmp_path / "run").splitlines()
    begin = next(i for i, line in enumerate(told) if line.startswith("classifier: about "))
    assert "on this machine (1 epochs of 1 steps" in told[begin]
    assert "GB of memory" in told[begin]
    assert any(line.startswith("epoch 1 ") for line in told[begin:])
