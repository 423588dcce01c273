"""A model that can answer no more ends the server, and nothing else does."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import CODE, Server

from rampart.export.archive import archive
from rampart.launch.watch import Watch


def described(*workers: dict[str, Any], **changes: Any) -> tuple[int, bytes]:
    model = {"minWorkers": 1, "maxRetryTimeoutInSec": 0, "workers": workers} | changes
    return 200, json.dumps([model]).encode()


def worker(status: str, pid: int = 0) -> dict[str, Any]:
    return {"status": status, "pid": pid, "gpu": False}


def failure(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, bytes]) -> str | None:
    """What a watch says after these answers, an hour apart."""
    hours = iter(range(0, 3600 * 100, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(hours)))
    left = list(answers)
    seen = Watch(lambda: left.pop(0))
    said = [seen.failure() for _ in answers]
    assert not left
    return said[-1]


@pytest.mark.parametrize(
    "answer",
    [
        described(worker("READY")),
        described(worker("UNLOADING"), worker("READY")),
        (404, b"{}"),  # the operator removed it
        described(minWorkers=0),  # or put it to rest
    ],
)
def test_what_works_or_what_the_operator_wished_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, bytes]
) -> None:
    assert failure(monkeypatch, answer, answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        described(worker("UNLOADING")),
        described(),
        (0, b""),
        (200, b"no JSON"),
    ],
)
def test_no_worker_for_longer_than_torchserve_tries_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, bytes]
) -> None:
    assert failure(monkeypatch, described(worker("READY")), answer)


def test_a_worker_that_still_starts_is_left_to_torchserve(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    (pid,) = server.worker_pids()
    starts = described(worker("UNLOADING", pid))
    assert failure(monkeypatch, starts) is None
    other = described(worker("UNLOADING", os.getpid()))  # a number that was given anew
    assert failure(monkeypatch, other)


@pytest.mark.slow
def test_a_worker_that_cannot_start_again_ends_the_server_with_the_reason(
    launch: Callable[..., Server],
    wait_gone: Callable[[list[psutil.Process]], list[psutil.Process]],
    tiny_shipped: Path,
    tmp_path: Path,
) -> None:
    archive(tiny_shipped, tmp_path / "tiny.mar", settings={"maxRetryTimeoutInSec": 2})
    code = "from rampart.launch import watch\nwatch.MARGIN = 3.0\n" + CODE
    server = launch(tmp_path / "tiny.mar", code=code)
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    family = server.family()
    for table in server.work.rglob("calibration.json"):
        table.write_text("{}")
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    began = time.monotonic()
    assert server.finish() == 1 and time.monotonic() - began < 60
    assert "error: tiny cannot answer, no worker has been ready for" in server.lines[-1]
    assert "calibration.json is not the file that was packed" in server.lines[-1]
    assert wait_gone(family) == []
