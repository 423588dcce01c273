"""The copies of archives that workers open."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rampart.launch.archives import Archives
from rampart.launch.endpoint import LaunchError
from rampart.launch.job import Job


@contextmanager
def full(size: int) -> Iterator[None]:
    """As on a disk that takes no file of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_an_archive_that_finds_no_room_at_the_start_is_told(job: Job) -> None:
    with full(50_000), pytest.raises(LaunchError, match=r"File too large\. Set TMPDIR"):
        Archives(job)
