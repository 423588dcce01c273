"""A worker of the HTTP server, beside what it answers."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from rampart.handlers.http.exposition import Exposition
from rampart.handlers.telemetry import Metrics
from rampart.launch import worker
from rampart.launch.share import Share


def test_a_folder_that_cannot_be_written_for_a_while_ends_no_watch_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same watch ends a worker whose batch hangs, and lets its heart beat."""
    folder = tmp_path / "figures"
    looks = 0

    async def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            folder.mkdir()
        if looks == 5:
            assert (folder / f"{os.getpid()}.json").exists()
            shutil.rmtree(folder)
        if looks == 7:
            raise asyncio.CancelledError

    monkeypatch.setattr(worker.asyncio, "sleep", sleep)
    exposition, share = Exposition([("tiny", Metrics())], folder), Share(folder)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(worker._watch({}, [], exposition, share))
    assert looks == 7
    told = "Cannot leave figures for other workers: No such file or directory"
    assert caplog.messages == [told, told]  # before the folder was there, and after
