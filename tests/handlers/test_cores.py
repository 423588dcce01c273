"""How many cores there are, and how many of them a container may use."""

import os
from pathlib import Path

import pytest

from rampart.handlers import cores
from rampart.handlers.cores import available_cores, quota


@pytest.mark.parametrize(
    ("written", "most"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)]
)
@pytest.mark.parametrize("group", ["", "system.slice/x.service"])
def test_a_quota_is_that_of_the_own_group_rounded_up(
    tmp_path: Path, group: str, written: str, most: int | None
) -> None:
    (tmp_path / "own").write_text(f"0::/{group}\n")
    (tmp_path / group).mkdir(parents=True, exist_ok=True)
    (tmp_path / group / "cpu.max").write_text(f"{written}\n")
    assert quota(tmp_path / "own", tmp_path) == most


def test_without_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path / "none", tmp_path) is None
    (tmp_path / "own").write_text("12:cpu,cpuacct:/x\n")
    assert quota(tmp_path / "own", tmp_path) is None


def test_neither_quota_nor_cores_are_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for most, expected in ((2, 2), (64, 8), (None, 8)):
        monkeypatch.setattr(cores, "quota", lambda *_, most=most: most)
        assert available_cores() == expected
