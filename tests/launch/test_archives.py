"""The copies of archives that workers open."""

import shutil
import threading
from pathlib import Path

import pytest
from full_disk import full

from rampart.export.archive import archive as pack
from rampart.launch.archives import Archives
from rampart.launch.endpoint import LaunchError, read_model
from rampart.launch.job import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "a.mar").write_bytes(bytes(100_000))
    (folder := tmp_path / "job").mkdir()
    return Job([str(tmp_path / "a.mar")], str(folder), 1)


def test_a_new_archive_that_finds_no_room_leaves_the_old_one_and_nothing_else(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    archives = Archives(job)
    Path(job.archives[0]).write_bytes(bytes(200_000))
    with full(150_000):
        assert [archives.renew(threading.Event()) for _ in range(2)] == [False, False]
    said = capfd.readouterr().out
    assert f"error: {job.archives[0]} cannot be copied to {job.folder}: File too large." in said
    assert "the old archive stays in service" in said
    assert [file.stat().st_size for file in Path(job.folder).iterdir()] == [100_000]


def test_an_archive_that_would_change_what_addresses_mean_is_not_taken(
    tiny_archive: Path,
    tiny_shipped: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder := tmp_path / "job").mkdir()
    first, second = (Path(shutil.copy(tiny_archive, tmp_path / f"{name}.mar")) for name in "ab")
    newer = tmp_path / "newer" / "tiny.mar"
    newer.parent.mkdir()
    pack(tiny_shipped, newer, version="2.0")
    shutil.copy(newer, second)
    job = Job([str(first), str(second)], str(folder), 1)
    for name, value in job.environment().items():
        monkeypatch.setenv(name, value)
    archives = Archives(job)

    def renewed() -> list[bool]:
        return [archives.renew(threading.Event()) for _ in range(2)]

    other = pack_as("other", tiny_shipped, tmp_path)
    shutil.copy(other, first)
    assert renewed() == [False, False]
    said = capfd.readouterr().out
    assert f"error: {first} has the model other, and clients ask for tiny: restart" in said
    assert f"{first} is not taken: the old archive stays in service" in said
    shutil.copy(newer, first)
    assert renewed() == [False, False]
    assert "name and version of another archive here, tiny 2.0: give" in capfd.readouterr().out
    assert [read_model(job.copy_of(i)) for i in (0, 1)] == [("tiny", "1.0"), ("tiny", "2.0")]


def pack_as(name: str, shipped: Path, folder: Path) -> Path:
    """An archive of the same model under another name."""
    home = Path(shutil.copytree(shipped, folder / name))
    pack(home, folder / f"{name}.mar")
    return folder / f"{name}.mar"


def test_an_archive_that_finds_no_room_at_the_start_is_told(job: Job) -> None:
    with full(50_000), pytest.raises(LaunchError, match=r"File too large\. Set TMPDIR"):
        Archives(job)
