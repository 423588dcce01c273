import os
from pathlib import Path

import pytest

from rampart.handlers import private_folder


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file or folder belong to another user; without root we become another one."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        owner = path.stat().st_uid
        before = Path.lstat

        def lstat(self: Path) -> os.stat_result:
            found = before(self)
            return os.stat_result((*found[:4], owner + 1, *found[5:])) if self == path else found

        monkeypatch.setattr(Path, "lstat", lstat)


def test_a_folder_is_made_for_its_owner_alone_and_is_ours_again(tmp_path: Path) -> None:
    for _ in range(2):
        private_folder.claim(tmp_path / "a" / "b", "file")
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


def test_what_is_somebody_elses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder.claim(tmp_path / "a")
    give_away(tmp_path / "a", monkeypatch)
    with pytest.raises(ValueError, match=r"a belongs to somebody else: chmod 700 it"):
        private_folder.claim(tmp_path / "a")
