"""TorchServe's logs: where they are kept, what never enters them, and what they said last.

They outlive the server, so no log may hold a piece of a request: data/log4j2.xml turns off Netty
and TorchServe's HTTP and gRPC classes, which log exceptions that quote bodies and addresses.
"""

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import IO

SERVER, WORKER, JAVA = "torchserve.log", "worker.log", "java.log"
JAVA_BYTES = 1_000_000  # of java.log, and of the one before it
TAIL_BYTES = 65_536  # that are searched for the last words; log4j's own files grow to 10 MB
BEGIN = "rampart serve begins"


def place(chosen: Path | None, model: str, port: int, work: Path) -> Path:
    """The folder of the logs: the chosen one, else the user's own for such, else the work folder.

    Raises OSError where the chosen one cannot be made or written to.
    """
    if chosen:
        _begin(chosen.resolve())
        return chosen.resolve()
    name = re.sub(r"[^\w.-]", "_", model)
    with contextlib.suppress(OSError, RuntimeError):  # the latter where there is no home
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        folder = state.absolute() / "rampart" / f"{name}-{port}"
        _begin(folder)
        return folder
    _begin(work)
    return work


def _begin(folder: Path) -> None:
    """Make the folder, and mark in each log where this run begins; none but the owner may read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in (SERVER, WORKER, JAVA):
        with open(folder / name, "a", opener=private) as log:
            os.fchmod(log.fileno(), 0o600)
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')},000 | {BEGIN}\n")


def private(path: str, flags: int) -> int:
    """For open: a file that only its owner may read."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def read(folder: Path, name: str) -> str:
    """What this run has written into a log, no more than the end of it."""
    try:
        with (folder / name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            return log.read().decode(errors="replace").rpartition(f"{BEGIN}\n")[2]
    except OSError:
        return ""


def worker_failure(folder: Path) -> str | None:
    """The message of the exception that ended a worker last, if one ended."""
    _, died, traceback = read(folder, WORKER).rpartition("Backend worker process died.")
    lines = [line.partition(" | ")[2] for line in traceback.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if died and errors:
        return errors[0].partition(": ")[2] or errors[0]
    return None


def last_words(folder: Path) -> str:
    """The last line that says anything, of the server's or Java's log."""
    for name in (SERVER, JAVA):
        lines = [line for line in read(folder, name).splitlines() if line.strip() == line != ""]
        if lines:
            return lines[-1].rpartition(" | ")[2]
    return "it left no word"


def keep(output: IO[bytes], folder: Path) -> threading.Thread:
    """Copy what Java prints into java.log, which begins anew, the last one kept, when it is full.

    Java prints little, but each thread that ends by an exception prints it, and nothing else would
    bound that. Where the disk is full, lines are lost and Java is not held up.
    """

    def copy() -> None:
        path = folder / JAVA
        for line in iter(lambda: output.readline(4096), b""):
            with contextlib.suppress(OSError):
                if path.exists() and path.stat().st_size + len(line) > JAVA_BYTES:
                    path.replace(path.with_suffix(".1.log"))
                with open(path, "ab", opener=private) as log:
                    log.write(line)

    thread = threading.Thread(target=copy, name="java.log", daemon=True)
    thread.start()
    return thread
