"""What a server listens on: what was asked for, and nothing else."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from servers import Server

from rampart.launch.listeners import shut_listeners

CODE = "import socket, time; s = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)];"
CODE += "print(*(one.getsockname()[1] for one in s), flush=True); time.sleep(60)"


def listening(process: psutil.Process) -> set[int]:
    return {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_java_listens_on_no_port_that_nobody_asked_for(
    launch: Callable[..., Server], tiny_archive: Path, server: Server
) -> None:
    assert listening(server.java()) == {server.port, server.port + 2, server.grpc}
    plain = launch(tiny_archive)
    assert "Rampart is ready" in plain.read(until="  curl '"), plain.lines
    java = plain.java()
    assert listening(java) == {plain.port, plain.port + 2}
    before = sum(java.cpu_times()[:2])
    size = (plain.logs / "torchserve.log").stat().st_size
    time.sleep(5)
    assert sum(java.cpu_times()[:2]) - before < 1  # it does not spin on what was closed
    assert (plain.logs / "torchserve.log").stat().st_size == size
    began = time.monotonic()
    assert plain.end() == 0 and time.monotonic() - began < 10


@pytest.fixture
def other() -> Iterator[tuple[int, list[int]]]:
    """A process of ours that listens on two ports."""
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.pid, [int(port) for port in process.stdout.readline().split()]
        process.kill()


def test_connections_to_a_listener_that_was_shut_are_refused(other: tuple[int, list[int]]) -> None:
    pid, (kept, shut) = other
    assert shut_listeners(pid, {kept}) == []
    socket.create_connection(("127.0.0.1", kept), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", shut), timeout=5)


def test_ports_that_the_system_keeps_open_are_named(
    other: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError("as under seccomp")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    pid, (kept, shut) = other
    assert shut_listeners(pid, {kept}) == [shut]
