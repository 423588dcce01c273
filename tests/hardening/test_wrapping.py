"""Networks of one's own: what fits works, what does not is refused in one sentence."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rampart.hardening.model import checkpoint, pipeline, registry
from rampart.hardening.model.classifier import Classifier

CLASSES = ("a", "b", "c")


class Net(nn.Module):
    """A small network of the usual kind."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.fc = nn.Linear(8, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.stem(x)).relu().mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Last(Net):
    """The same, but of (N, H, W, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class Normalizing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) / 0.25)


class Softmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Tupled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), None


class Branching(Net):
    """Its last Linear is not its head."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 4)


class Hidden(nn.Module):
    """A head of several layers, one of them a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten())
        head = (nn.LazyLinear(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
        self.classifier = nn.Sequential(*head)
        self(torch.zeros(1, 3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TAKE = {"head": "fc", "classes": CLASSES, "image_size": 16}


def logits(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.eval()(x)


@pytest.mark.parametrize("module", [Net(), Normalizing(), Branching()])
def test_a_wrapped_module_says_what_it_said_before(module: nn.Module) -> None:
    net = Classifier.wrap(module, **TAKE)
    torch.testing.assert_close(logits(net, X), logits(module, X))
    assert net.feature_size == 8
    assert net.embed(X).shape == (4, 8)


def test_the_module_itself_stays_as_it_is() -> None:
    module = Net().train()
    net = Classifier.wrap(module, **TAKE)
    with torch.no_grad():
        net.head.weight.zero_()
    assert isinstance(module.fc, nn.Linear) and module.fc.weight.abs().sum() > 0
    assert module.training and net.training


def test_normalization_outside_the_module_goes_in_front_of_it() -> None:
    module = Net()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    net = Classifier.wrap(module, **TAKE, mean=mean, std=std)
    x = (X - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(logits(net, X), logits(module, x))


def test_normalization_twice_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"already normalizes its input \(its buffer 'mean'\): leave out"
    ):
        Classifier.wrap(Normalizing(), **TAKE, mean=(0.5,), std=(0.25,))
    with pytest.raises(ValueError, match="one or three"):
        Classifier.wrap(Net(), **TAKE, mean=(0.5, 0.5))


def test_channels_last_works_where_it_is_said_and_is_named_where_it_is_not() -> None:
    module = Last()
    with pytest.raises(ValueError, match=r"does not take \(N, 3, 16, 16\): pass channels_last=Tru"):
        Classifier.wrap(module, **TAKE)
    net = Classifier.wrap(module, **TAKE, channels_last=True)
    torch.testing.assert_close(logits(net, X), logits(module, X.permute(0, 2, 3, 1)))
    with pytest.raises(ValueError, match=r"take \(N, 16, 16, 3\): pass channels_last=False"):
        Classifier.wrap(Net(), **TAKE, channels_last=True)


def test_one_channel_is_the_picture_in_gray() -> None:
    module = Net(1)
    with pytest.raises(ValueError, match="pass channels=1"):
        Classifier.wrap(module, **TAKE)
    net = Classifier.wrap(module, **TAKE, channels=1, mean=(0.5,), std=(0.2,))
    gray = (X * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(logits(net, X), logits(module, (gray - 0.5) / 0.2))


def test_a_head_of_several_layers_is_split_off_as_one() -> None:
    module = Hidden()
    net = Classifier.wrap(module, **TAKE | {"head": "classifier"})
    torch.testing.assert_close(logits(net, X), logits(module, X))
    assert net.train().head[2].training and not net.eval().head[2].training  # its dropout


@pytest.mark.parametrize(
    ("module", "changes", "sentence"),
    [
        (Branching(), {"head": "projection"}, "does not output the logits: pass head='fc'"),
        (Hidden(), {"head": "body"}, "pass head='classifier.3'"),
        (Net(), {"head": "classifier"}, "no layer 'classifier': its last ones are .*fc"),
        (Softmaxed(), {}, r"not the module's last step \(does a softmax follow\?\)"),
        (Tupled(), {}, "returns a tuple: let it return the logits"),
        (Net(), {"classes": 5}, r"returns \(2, 3\) for two images, but 5 classes need \(2, 5\)"),
        (Hidden(), {"head": "classifier", "image_size": 32}, "check image_size"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    module: nn.Module, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        Classifier.wrap(module, **TAKE | changes)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_imports_nothing_and_says_how_to_name_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Classifier.wrap(Net(), **TAKE, name="mine.nets:small")
    file = tmp_path / "c.safetensors"
    checkpoint.save(file, net, {"classifier": net.config._asdict()})
    torch.testing.assert_close(logits(pipeline.load_classifier(file), X), logits(net, X))
    monkeypatch.setattr(registry, "_FACTORIES", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint imports code: .*--arch mine\.nets:small"):
        pipeline.load_classifier(file)
    registry.register("mine.nets:small", Net)
    torch.testing.assert_close(logits(pipeline.load_classifier(file), X), logits(net, X))


def test_a_factory_is_imported_where_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    registry.import_factory("own_nets:small")
    assert isinstance(registry.network("own_nets:small"), nn.Sequential)
    with pytest.raises(ValueError, match="own_nets has no large"):
        registry.import_factory("own_nets:large")
    with pytest.raises(ValueError, match="no module no_such_nets"):
        registry.import_factory("no_such_nets:small")


@pytest.mark.parametrize(
    ("arch", "own"), [("timm:resnet18", False), ("resnet18", False), ("a.b:c", True), ("a:", False)]
)
def test_a_name_with_a_colon_is_a_factory_but_for_timm(arch: str, own: bool) -> None:
    assert registry.is_factory(arch) is own
