"""The probe against a real server whose worker is alive, hangs, or was never there."""

import re
import shutil
import signal
import socket
import threading
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

    def await_life() -> None:
        """A sign of it may still be on its way."""
        deadline = time.monotonic() + 60
        while True:
            try:
                assert set(probe(address, 4)) == {"tiny"}
                return
            except RuntimeError:
                assert time.monotonic() < deadline
                time.sleep(0.5)

    await_life()
    worker = psutil.Process(server.worker_pids()[0])
    worker.send_signal(signal.SIGSTOP)
    try:
        time.sleep(5)
        with pytest.raises(RuntimeError, match=r"tiny has been silent for \d+ s"):
            probe(address, 4)
    finally:
        worker.send_signal(signal.SIGCONT)
    await_life()


def test_no_server_and_no_model_are_each_told(server: Server) -> None:
    with pytest.raises(RuntimeError, match=re.escape("no metrics at http://127.0.0.1:1/")):
        probe("http://127.0.0.1:1/metrics", 5)
    with pytest.raises(RuntimeError, match="shows no Rampart model"):
        probe(f"{server.root}/ping", 5)
    with pytest.raises(RuntimeError, match="shows no model other"):
        probe(f"http://127.0.0.1:{server.port + 2}/metrics", 5, "other")


def test_what_does_not_speak_http_is_no_server_with_metrics() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x00\x12\x04 as gRPC does\r\n")

        other = threading.Thread(target=answer)
        other.start()
        with pytest.raises(RuntimeError, match=r"no metrics at .* \(this is no HTTP\): start"):
            probe(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics", 5)
        other.join()


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
    end = time.monotonic() + 60
    while "trial" not in requests.get(address, timeout=30).text:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert requests.delete(trial, headers=server.token, timeout=30).status_code == 200
    time.sleep(8)
    with pytest.raises(RuntimeError, match=r"trial has been silent .* choose another with --name"):
        probe(address, 7, "trial")
    assert set(probe(address, 30, "tiny")) == {"tiny"}
    server.end()
