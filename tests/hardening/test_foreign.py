from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.foreign import take

State = dict[str, Tensor]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CONFIG = ClassifierConfig("resnet18", 5, image_size=96, mean=MEAN, std=STD)
VALUES = torch.tensor([MEAN, STD])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return get_model("resnet18", weights=None, num_classes=5).eval()


def adopt(path: Path, config: ClassifierConfig, **said: Any) -> Classifier:
    return take(path, config, **said).classifier


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def spelled(state: State) -> State:
    """As the ResNets for CIFAR of both call their parts."""
    return {
        name.replace("downsample", "shortcut").replace("fc.", "linear."): tensor
        for name, tensor in state.items()
    }


def madry_lab(state: State) -> dict[str, Any]:
    """`robustness`: the network twice, as the model and inside its attacker, normalizers beside."""
    norms = {"new_mean": VALUES[0].view(3, 1, 1), "new_std": VALUES[1].view(3, 1, 1)}
    model = prefixed(state, "module.model.") | prefixed(norms, "module.normalizer.")
    attacker = prefixed(state, "module.attacker.model.")
    attacker |= prefixed(norms, "module.attacker.normalize.")
    return {"model": attacker | model, "epoch": 90, "nat_prec1": torch.tensor(60.0)}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "torchvision": lambda state: state,
    "DataParallel": lambda state: prefixed(state, "module."),
    "RobustBench, entry state_dict": lambda state: {"state_dict": prefixed(state, "module.")},
    "RobustBench, normalizer first": lambda state: (
        prefixed(state, "model.") | {"normalize.mean": VALUES[0], "normalize.std": VALUES[1]}
    ),
    "RobustBench, normalizer inside": lambda state: state | {"mu": VALUES[0], "sigma": VALUES[1]},
    "MadryLab robustness": madry_lab,
    "RobustBench, CIFAR": lambda state: {"state_dict": prefixed(spelled(state), "module.")},
    "MadryLab, CIFAR": lambda state: madry_lab(spelled(state)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_each_layout_gives_the_librarys_logits(
    layout: str, net: nn.Module, tmp_path: Path
) -> None:
    torch.save(LAYOUTS[layout](net.state_dict()), tmp_path / "w.pth")
    told = (
        CONFIG
        if "normalizer" not in layout and "Madry" not in layout
        else CONFIG._replace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    )
    adopted = adopt(tmp_path / "w.pth", told)
    assert adopted.config == CONFIG
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net((x - VALUES[0].view(3, 1, 1)) / VALUES[1].view(3, 1, 1))
    torch.testing.assert_close(adopted(x), expected)


def test_what_the_user_says_counts_before_the_files_normalizer(
    net: nn.Module, tmp_path: Path
) -> None:
    layout = next(name for name in LAYOUTS if "normalizer" in name)
    torch.save(LAYOUTS[layout](net.state_dict()), tmp_path / "w.pth")
    said = (0.5, 0.25, 0.75)
    assert adopt(tmp_path / "w.pth", CONFIG, mean=said).config == CONFIG._replace(mean=said)
    assert adopt(tmp_path / "w.pth", CONFIG, std=said).config == CONFIG._replace(std=said)


def test_safetensors_without_our_metadata_are_read(tmp_path: Path) -> None:
    net = get_model("squeezenet1_1", weights=None, num_classes=5).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    config = ClassifierConfig("squeezenet1_1", 5, image_size=96, mean=(0, 0, 0), std=(1, 1, 1))
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(adopt(tmp_path / "w.safetensors", config)(x), net(x))


def test_timms_names_are_understood(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    net = timm.create_model("resnet10t", num_classes=5).eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    config = ClassifierConfig("timm:resnet10t", 5, image_size=64, mean=(0, 0, 0), std=(1, 1, 1))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(adopt(tmp_path / "w.pth", config)(x), net(x))


def test_googlenets_auxiliary_heads_are_left_out(tmp_path: Path) -> None:
    net = get_model("googlenet", num_classes=5, aux_logits=True, init_weights=True)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    adopted = adopt(tmp_path / "w.pth", ClassifierConfig("googlenet", 5, image_size=96))
    assert not [name for name in adopted.state_dict() if "aux" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 7}, r"fc\.weight.*expected \(7, 512\), found \(5, 512\).*--classes"),
        (
            {"image_size": 32},
            r"conv1\.weight.*\(64, 3, 3, 3\), found \(64, 3, 7, 7\).*--image-size",
        ),
        (
            {"arch": "resnet34"},
            r"lacks \d+ of the network's tensors, such as layer1\.2\.conv1\.weight",
        ),
        ({"arch": "resnet10"}, r"does not have, such as layer1\.1\.conv1\.weight: check --arch"),
        ({"arch": "squeezenet1_1"}, r"w\.pth"),
    ],
)
def test_weights_that_do_not_fit_name_the_layer_and_both_sizes(
    change: dict[str, Any], message: str, net: nn.Module, tmp_path: Path
) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        adopt(tmp_path / "w.pth", CONFIG._replace(**change))


class Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('sprung').touch()",)


def test_a_file_that_needs_unpickling_is_refused_unexecuted_with_the_way_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: nn.Module
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": net.state_dict(), "schedule": Trap()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth.*torch\.save\("):
        adopt(tmp_path / "w.pth", CONFIG)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"best": 0.5}}, [1, 2]])
def test_a_file_without_weights_says_what_it_holds(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth holds"):
        adopt(tmp_path / "w.pth", CONFIG)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        adopt(tmp_path / "none.pth", CONFIG)


def test_a_layer_that_is_missing_is_named_beside_what_the_file_has(
    net: nn.Module, tmp_path: Path
) -> None:
    state = {name.replace("downsample", "skip"): t for name, t in net.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    expected = (
        r"lacks 15 of the network's tensors, such as layer2\.0\.downsample\.0\.weight, and has"
        r" layer2\.0\.skip\.0\.weight and 17 more in their place: check --arch"
    )
    with pytest.raises(ValueError, match=expected):
        adopt(tmp_path / "w.pth", CONFIG)
    expected = r"layers of squeezenet1_1, such as features\.0\.weight\. It has conv1\.w"
    with pytest.raises(ValueError, match=expected):
        adopt(tmp_path / "w.pth", CONFIG._replace(arch="squeezenet1_1"))


def test_a_name_that_both_spellings_have_stays(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    torch.save(state | {"linear.weight": state["fc.weight"] + 1}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not have, such as linear\.weight"):
        adopt(tmp_path / "w.pth", CONFIG)


def changed(state: State, name: str, value: float) -> State:
    """`state` with one number of one tensor set, or with all where it is 0."""
    tensor = state[name].clone()
    tensor.view(-1)[: None if value == 0 else 1] = value
    return state | {name: tensor}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight", float("nan"), r"NaN or infinity in fc\.weight: .*an earlier checkpoint"),
        ("layer1.0.bn1.bias", float("inf"), r"NaN or infinity in layer1\.0\.bn1\.bias"),
        ("bn1.running_var", -1.0, r"variances below 0 in bn1\.running_var: the file is damaged"),
        ("layer2.0.conv1.weight", 0.0, r"nothing but 0 in layer2\.0\.conv1\.weight"),
    ],
)
def test_weights_that_no_training_leaves_are_refused(
    name: str, value: float, message: str, net: nn.Module, tmp_path: Path
) -> None:
    torch.save(changed(net.state_dict(), name, value), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth holds {message}"):
        adopt(tmp_path / "w.pth", CONFIG)


def test_all_that_is_wrong_with_weights_is_told_at_once(net: nn.Module, tmp_path: Path) -> None:
    state = changed(net.state_dict(), "layer1.0.bn1.bias", float("inf"))
    state = changed(changed(state, "bn1.running_var", -1.0), "layer2.0.conv1.weight", 0.0)
    del state["layer4.1.conv2.weight"]
    torch.save(prefixed(state, "model.") | norm(0.5, 0.0), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"^6 things to put right") as told:
        adopt(tmp_path / "w.pth", CONFIG._replace(classes=7))
    for fault in (
        "divides by a std of 0 or less",
        "lacks 1 of the network's tensors, such as layer4.1.conv2.weight, and has no other",
        "fc.weight does not fit resnet18: expected (7, 512), found (5, 512). Check --classes",
        "NaN or infinity in layer1.0.bn1.bias",
        "variances below 0 in bn1.running_var",
        "nothing but 0 in layer2.0.conv1.weight",
    ):
        assert fault in str(told.value)


def norm(mean: float, std: float) -> State:
    return {"normalize.mean": torch.full((3,), mean), "normalize.std": torch.full((3,), std)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((127.5, 51.0), (0.5, 0.2)),
        ((0.0, 255.0), (0.0, 1.0)),
        ((127.5, 1.0), (0.5, 0.003922)),
        ((0.5, 0.2), (0.5, 0.2)),
        ((0.0, 1.0), (0.0, 1.0)),
    ],
)
def test_a_normalizer_of_pixels_up_to_255_is_brought_to_1(
    found: tuple[float, float], expected: tuple[float, float], net: nn.Module, tmp_path: Path
) -> None:
    torch.save(prefixed(net.state_dict(), "model.") | norm(*found), tmp_path / "w.pth")
    classifier, lines = take(tmp_path / "w.pth", CONFIG)
    mean, std = ((value,) * 3 for value in expected)
    assert (classifier.config.mean, classifier.config.std) == (mean, std)
    divided = ", divided by 255" if found != expected else ""
    assert lines == [f"normalization of the file{divided}: mean {mean}, std {std}"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((0.5, 0.0), "divides by a std of 0 or less"),
        ((0.5, -0.2), "divides by a std of 0 or less"),
        ((float("nan"), 0.2), "is not finite"),
        ((-0.5, 0.2), "has a mean below 0"),
        ((900.0, 51.0), "is of pixels from 0 to 255"),
    ],
)
def test_an_implausible_normalizer_is_refused(
    found: tuple[float, float], message: str, net: nn.Module, tmp_path: Path
) -> None:
    torch.save(prefixed(net.state_dict(), "model.") | norm(*found), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"normalization in .*w\.pth.* {message}: pass"):
        adopt(tmp_path / "w.pth", CONFIG)


def test_a_normalization_that_is_passed_for_pixels_up_to_255_is_refused_with_the_right_one(
    net: nn.Module, tmp_path: Path
) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pth")
    expected = r"pass them divided by 255, mean \(0\.5, 0\.2, 0\.4\) and std \(0\.2, 0\.2, 0\.2\)"
    with pytest.raises(ValueError, match=expected):
        adopt(tmp_path / "w.pth", CONFIG, mean=(127.5, 51.0, 102.0), std=(51.0, 51.0, 51.0))
    with pytest.raises(ValueError, match=r"that is passed, .* divides by a std of 0"):
        adopt(tmp_path / "w.pth", CONFIG, std=(0.2, 0.0, 0.2))


def test_what_is_taken_is_told_and_an_average_that_is_not(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    torch.save({"model": state, "model_ema": state, "epoch": 3}, tmp_path / "w.pth")
    lines = take(tmp_path / "w.pth", CONFIG).lines
    assert lines[0] == "weights: entry model" and "model_ema, an average" in lines[1]
    assert lines[2] == f"normalization: mean {MEAN}, std {STD}"
    other = changed(state, "fc.bias", 7.0)
    torch.save({"ema": other, "epoch": 3}, tmp_path / "w.pth")
    classifier, lines = take(tmp_path / "w.pth", CONFIG)
    assert classifier.head.bias[0] == 7 and lines[0] == "weights: entry ema"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "git lfs pull"),
        (b"PK\x03\x04 cut", "not a torch.save file, or is truncated"),
        (b"<html>not found</html>", "not a torch.save file, or is truncated"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_weights_says_so(
    content: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    if suffix == ".safetensors" and "torch" in message:
        message = "is not a safetensors file"
    with pytest.raises(ValueError, match=rf"w{suffix} .*{message}"):
        adopt(file, CONFIG)


@pytest.mark.parametrize("entry", ["model", "net", "state_dict"])
def test_what_needs_unpickling_is_named_and_the_way_to_convert_it_works(
    entry: str, net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({entry: net.state_dict(), "best": Path("x")}, "w.pth")
    with pytest.raises(ValueError, match=r"unpickling pathlib\.") as caught:
        adopt(Path("w.pth"), CONFIG)
    command = (
        str(caught.value).partition("only its tensors: ")[2].partition(" in the environment")[0]
    )
    exec(command, {"torch": torch})
    assert adopt(Path("weights.pth"), CONFIG).config == CONFIG


def test_an_archive_of_something_else_says_so(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("document.xml", "<text/>")
    with pytest.raises(ValueError, match=r"w\.pth is not a torch\.save file, or is truncated"):
        adopt(tmp_path / "w.pth", CONFIG)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
def test_a_traced_network_says_what_to_save_instead(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)).save(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is TorchScript, .* save the state_dict\(\)"):
        adopt(tmp_path / "w.pt", CONFIG)
