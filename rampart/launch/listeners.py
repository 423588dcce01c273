"""Close listening sockets of a process that we started, from outside.

TorchServe opens gRPC for inference and for management whatever its settings say, and no setting
names a socket that only its owner reaches. So the launcher takes a duplicate of such a listener and
shuts that down: from then on the kernel refuses connections. Java does not notice.
"""

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Collection
from pathlib import Path

PIDFD_GETFD = 438  # of Linux 5.6 and later, on every architecture
LISTENING = "0A"


def shut_listeners(pid: int, wanted: Collection[int]) -> list[int]:
    """Shut a process's TCP listeners but those on `wanted` ports; returns the ports left open.

    Raises OSError where the system does not let us look.
    """
    if sys.platform != "linux":
        raise OSError("listeners can be closed only on Linux")
    left = []
    for number, port in _listeners(pid):
        if port in wanted:
            continue
        try:
            _shut(pid, number)
        except (OSError, AttributeError):  # the latter where Python was built on an old system
            left.append(port)
    return left


def _listeners(pid: int) -> list[tuple[int, int]]:
    """(descriptor, port) of each listening TCP socket."""
    ports = {}
    for table in ("tcp", "tcp6"):
        file = Path(f"/proc/{pid}/net/{table}")
        rows = file.read_text().splitlines()[1:] if file.exists() else []  # none without IPv6
        for _, local, _, state, *_, inode in (row.split()[:10] for row in rows):
            if state == LISTENING:
                ports[f"socket:[{inode}]"] = int(local.rpartition(":")[2], 16)
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if port := ports.get(str(entry.readlink())):
                found.append((int(entry.name), port))
    return found


def _shut(pid: int, number: int) -> None:
    process = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        duplicate = libc.syscall(*map(ctypes.c_long, (PIDFD_GETFD, process, number, 0)))
        if duplicate < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(process)
    with socket.socket(fileno=duplicate) as listener:
        listener.shutdown(socket.SHUT_RDWR)
