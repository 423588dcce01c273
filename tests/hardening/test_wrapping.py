"""Networks of one's own: what fits works, what does not is refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from torch import Tensor, nn

from rampart.assembly import Way
from rampart.hardening.attack.victims import fingerprint
from rampart.hardening.model import checkpoint, pipeline, registry, wrapping
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.train.loop import Recipe
from rampart.hardening.train.stages import stages
from rampart.proposal import Plan
from rampart.sources import Source

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


class Rounding(Net):
    """The same weights; its input is rounded to 8 bits, which takes the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((255 * x).round() / 255)


class Straight(Net):
    """The same logits; the gradient is of the other sign."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x.detach() - x)


class Single(Net):
    """It computes in single precision, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_an_attack_depends_on_the_code_of_your_own_network_and_not_on_its_name_alone() -> None:
    own = Net()
    nets = []
    for kind in (Net, Net, Rounding, Straight):
        module = kind()
        module.load_state_dict(own.state_dict())
        nets.append(Classifier.wrap(module, **TAKE, name="mine").eval())
    assert len({checkpoint.digest(net) for net in nets}) == 1
    first, again, *others = map(fingerprint, nets)
    assert first == again and len({first, *others}) == 3
    assert fingerprint(nets[0], "graph").split()[0] == "graph"
    ours = Classifier(ClassifierConfig("resnet10", 3, width=0.125))
    assert fingerprint(ours) == checkpoint.digest(ours)


def test_what_a_network_does_is_told_in_single_precision_where_it_has_no_other() -> None:
    nets = [Classifier.wrap(kind(), **TAKE) for kind in (Single, Single, Net)]
    codes = [wrapping.behaviour_of_code(net, 16) for net in nets]
    assert codes[0] == codes[1] != ""


def test_code_is_told_apart_whatever_the_weights_are_drawn() -> None:
    kinds = (Net, Net, Rounding, Straight)
    codes = [wrapping.behaviour_of_code(Classifier.wrap(kind(), **TAKE), 16) for kind in kinds]
    assert codes[0] == codes[1] and len(set(codes)) == 3


def test_harden_trains_anew_where_the_code_of_your_own_network_changes(tmp_path: Path) -> None:
    images = blobs(240, size=16)
    np.savez(tmp_path / "a.npz", image=images.image, label=images.label % 3, classes=CLASSES)
    net = Classifier.wrap(Net(), **TAKE, name="mine").config
    plan, source = Plan(net, Recipe()), Source(tmp_path / "a.npz")
    places = []
    with stages(tmp_path, plan.stages()) as job:
        way = Way(source, plan, job, "harden")
        for kind in (Net, Net, Rounding):
            registry.register("mine", kind)
            places.append(job.place("train", way.training_inputs(None)))
    assert places[0] == places[1] != places[2]


def test_weights_are_refused_where_the_name_of_your_own_network_stands_for_other_code(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    file, own = tmp_path / "a.safetensors", Straight()
    net = Classifier.wrap(own, **TAKE, name="mine")
    checkpoint.save(file, net, {"classifier": net.config._asdict()})
    assert torch.equal(logits(pipeline.load_classifier(file), X), logits(net, X))
    for other in (Net, Rounding):  # their logits are the same, or nearly
        registry.register("mine", other)
        with pytest.raises(ValueError, match="registered as mine answers otherwise"):
            pipeline.load_classifier(file)
    registry.register("mine", Straight)
    pipeline.load_classifier(file)
