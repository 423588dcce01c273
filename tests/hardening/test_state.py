from pathlib import Path

import pytest
import torch

from rampart.hardening.train import state as states


def test_the_state_written_last_comes_back_alone(tmp_path: Path) -> None:
    assert states.read(tmp_path) is None
    for step in range(3):
        states.save(tmp_path, {"weight": torch.full((900,), float(step)), "epoch": step})
    state = states.read(tmp_path)
    assert state is not None and state["epoch"] == 2
    assert torch.equal(state["weight"], torch.full((900,), 2.0))
    assert [file.name for file in tmp_path.iterdir()] == [states.FILE]


def test_a_crash_while_a_state_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    states.save(tmp_path, {"epoch": 1})
    (tmp_path / "state.partial").write_bytes(b"half")
    assert states.read(tmp_path) == {"epoch": 1}
    states.save(tmp_path, {"epoch": 2})
    assert states.read(tmp_path) == {"epoch": 2}


def test_a_state_that_was_cut_on_its_way_says_so(tmp_path: Path) -> None:
    states.save(tmp_path, {"weight": torch.zeros(1000)})
    file = tmp_path / states.FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        states.read(tmp_path)


def test_the_pieces_of_an_older_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "state-000004").mkdir()
    with pytest.raises(ValueError, match=r"state-000004 is the state of a run of an older Rampart"):
        states.read(tmp_path)
