from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from rampart.hardening.model.classifier import ClassifierConfig
from rampart.hardening.model.foreign import adopt

State = dict[str, Tensor]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CONFIG = ClassifierConfig("resnet18", 5, image_size=96, mean=MEAN, std=STD)
VALUES = torch.tensor([MEAN, STD])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return get_model("resnet18", weights=None, num_classes=5).eval()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


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
        ({"arch": "resnet34"}, r"lacks \d+ of the network's tensors, as layer1\.2\.conv1\.weight"),
        ({"arch": "resnet10"}, r"no place for, as layer1\.1\.conv1\.weight: check --arch"),
        ({"arch": "vgg11"}, r"w\.pth"),
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
