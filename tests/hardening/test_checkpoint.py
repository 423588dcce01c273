import copy
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig


def test_state_and_config_come_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    checkpoint.save(tmp_path / "a.safetensors", layer, {"size": [3, 2]})
    config, state = checkpoint.read(tmp_path / "a.safetensors")
    assert config == {"size": [3, 2]}
    assert torch.equal(state["weight"], layer.weight)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rampart train"):
        checkpoint.read(tmp_path / "none.safetensors")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.read(tmp_path / "a.safetensors")


def test_somebody_elses_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no Rampart config"):
        checkpoint.read(tmp_path / "a.safetensors")


def test_the_digest_tells_weights_and_normalization_apart() -> None:
    config = ClassifierConfig("resnet10", 10, width=0.125)
    net, shifted, other = (
        Classifier(c) for c in (config, config._replace(mean=(0.0, 0.0, 0.0)), config)
    )
    shifted.load_state_dict(net.state_dict())
    assert checkpoint.digest(net) == checkpoint.digest(copy.deepcopy(net))
    assert len({checkpoint.digest(n) for n in (net, shifted, other)}) == 3


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / "w.safetensors", torch.nn.Linear(1, 1), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == mode
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_same_weights_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(12)]
    layer = torch.nn.Linear(3, 2)
    for file in files:
        checkpoint.save(file, layer, {"size": [3, 2]})
    assert len({file.read_bytes() for file in files}) == 1
