"""The probe against a real server whose worker is alive, hangs, or was never there."""

import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests
from servers import Server

from rampart.launch.probe import probe


@pytest.mark.slow
def test_a_worker_that_hangs_is_told_from_one_that_lives(server: Server) -> None:
    address = f"http://127.0.0.1:{server.port + 2}/metrics"
    deadline = time.monotonic() + 10
    while True:  # the first sign of life may still be on its way
        try:
            assert set(probe(address, 5)) == {"tiny"}
            break
        except RuntimeError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    worker = psutil.Process(server.worker_pids()[0])
    worker.send_signal(signal.SIGSTOP)
    try:
        time.sleep(5)
        with pytest.raises(RuntimeError, match=r"tiny has been silent for \d+ s"):
            probe(address, 4)
    finally:
        worker.send_signal(signal.SIGCONT)
    time.sleep(2.5)
    assert probe(address, 4)["tiny"] < 4


def test_no_server_and_no_model_are_each_told(server: Server) -> None:
    with pytest.raises(RuntimeError, match=re.escape("no metrics at http://127.0.0.1:1/")):
        probe("http://127.0.0.1:1/metrics", 5)
    with pytest.raises(RuntimeError, match="shows no Rampart model"):
        probe(f"{server.root}/ping", 5)
    with pytest.raises(RuntimeError, match="shows no model other"):
        probe(f"http://127.0.0.1:{server.port + 2}/metrics", 5, "other")


@pytest.mark.slow
def test_a_model_that_was_removed_does_not_make_another_one_dead(
    launch: Callable[..., Server], tiny_archive: Path
) -> None:
    store = tiny_archive.parent / "removed"
    store.mkdir()
    for name in ("tiny", "trial"):
        shutil.copy(tiny_archive, store / f"{name}.mar")
    server = launch(store / "tiny.mar", model_api=True)
    server.read()
    trial = f"http://127.0.0.1:{server.port + 1}/models/trial"
    options = {"url": "trial.mar", "model_name": "trial", "initial_workers": "1"}
    made = requests.post(
        trial.rpartition("/")[0],
        params=options | {"synchronous": "true"},
        headers=server.token,
        timeout=60,
    )
    assert made.status_code == 200
    address = f"http://127.0.0.1:{server.port + 2}/metrics"
    while "trial" not in requests.get(address, timeout=30).text:
        time.sleep(0.2)
    assert requests.delete(trial, headers=server.token, timeout=30).status_code == 200
    time.sleep(3)
    with pytest.raises(RuntimeError, match=r"trial has been silent .* choose another with --name"):
        probe(address, 2)
    assert set(probe(address, 3, "tiny")) == {"tiny"}
    server.end()
