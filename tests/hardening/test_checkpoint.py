import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hardening import checkpoint
from hardening.models import Classifier, ClassifierConfig


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


def test_a_state_is_written_in_pieces_and_the_last_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", 1000)
    assert checkpoint.read_state(tmp_path) is None
    for step in range(12):
        state = {"weight": torch.full((900,), float(step)), "epoch": step}
        checkpoint.save_state(tmp_path, state)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) >= 4
    assert max(piece.stat().st_size for piece in folder.iterdir()) == 1000
    read = checkpoint.read_state(tmp_path)
    assert read is not None
    assert read["epoch"] == 11
    assert torch.equal(read["weight"], torch.full((900,), 11.0))


def test_a_crash_while_a_state_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, {"epoch": 1})
    (tmp_path / "state.partial").mkdir()
    (tmp_path / "state.partial" / "0001-of-0002").write_bytes(b"half")
    assert checkpoint.read_state(tmp_path) == {"epoch": 1}
    checkpoint.save_state(tmp_path, {"epoch": 2})
    assert checkpoint.read_state(tmp_path) == {"epoch": 2}


def test_a_state_that_lacks_pieces_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", 100)
    checkpoint.save_state(tmp_path, {"weight": torch.zeros(100)})
    next((tmp_path / "state-000000").glob("0002-*")).unlink()
    with pytest.raises(ValueError, match=r"state-000000 has \d+ of \d+ pieces"):
        checkpoint.read_state(tmp_path)


def test_the_digest_tells_weights_and_normalization_apart() -> None:
    config = ClassifierConfig("resnet10", 10, width=0.125)
    net, shifted, other = (
        Classifier(c) for c in (config, config._replace(mean=(0.0, 0.0, 0.0)), config)
    )
    shifted.load_state_dict(net.state_dict())
    assert checkpoint.digest(net) == checkpoint.digest(copy.deepcopy(net))
    assert len({checkpoint.digest(n) for n in (net, shifted, other)}) == 3
