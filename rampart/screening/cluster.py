"""A run over a store by the tasks of a Ray cluster: one a shard, each with one core.

Tasks, and not Ray Data: Ray takes a task up again whose process or node dies, and counts how often,
so a file that kills decoders ends its shard and not the run. Ray Data (2.60) tries such a file
without end, or drops its block and names none. No node needs the archive or the
folder of the verdicts: both go through Ray.
"""

import contextlib
import functools
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rampart.handlers.cores import available_cores
from rampart.handlers.service import Service
from rampart.screening import parts
from rampart.screening.parts import Tally
from rampart.screening.run import Bar
from rampart.screening.shards import Shard
from rampart.screening.worker import Screener, Setup

TRIES = 4  # for a shard whose processes or nodes end
PATIENCE = 10  # seconds for a cluster to answer
AHEAD = 2  # tasks a core that Ray knows of, so that none waits for this process
LEAST = 64  # tasks, which a cluster that grows by demand sees


class Screened(NamedTuple):
    """What a task sends back: the part of a shard, and flagged files by their names."""

    tally: Tally
    part: bytes
    copies: dict[str, bytes]


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """This process as a driver of the cluster at an address, or at `auto` of the one here.

    Raises ValueError where none answers, ModuleNotFoundError without Ray.
    """
    import ray

    try:
        _reach(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({error}): check --ray, or start one with"
            " `ray start --head`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError at once where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()


class Cluster:
    """The tasks of a run; use it where `connected`."""

    def __init__(self, setup: Setup, workers: int | None) -> None:
        import ray

        self._ray, self._setup = ray, setup
        cores = int(ray.cluster_resources().get("CPU", 0))
        self._ahead = workers or max(LEAST, AHEAD * cores)
        self._archive = ray.put(setup.archive.read_bytes())
        task = ray.remote(num_cpus=1, max_retries=TRIES - 1)
        self._task = task(_screen)
        self._refs: set[Any] = set()
        self._lock, self._halted = threading.Lock(), False

    def screened(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Tally | str]]:
        """Each shard with its tally, or why it has none, as they are done."""
        with ThreadPoolExecutor(self._ahead) as threads, Bar(shards) as bar:
            try:
                futures = {threads.submit(self._screen, shard): shard for shard in shards}
                yield from bar.watch(futures)
            finally:
                self._cancel()
                threads.shutdown(cancel_futures=True)

    def _cancel(self) -> None:
        with self._lock:
            self._halted = True
            for ref in self._refs:
                self._ray.cancel(ref, force=True)

    def _screen(self, shard: Shard) -> Tally | str:
        with self._lock:
            if self._halted:
                return "the run has ended"
            ref = self._task.remote([self._archive], self._setup, shard)
            self._refs.add(ref)
        try:
            return self._keep(shard, self._ray.get(ref))
        except self._ray.exceptions.RayTaskError as error:
            return f"{type(error.cause).__name__}: {error.cause}"
        except self._ray.exceptions.RayError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return f"its processes or nodes died {TRIES} times: {reason}"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._refs.discard(ref)

    def _keep(self, shard: Shard, screened: Screened) -> Tally:
        """Write what a task sent, the part last: a shard that has one is done."""
        for name, data in screened.copies.items():
            assert self._setup.copies is not None
            file = self._setup.copies / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        parts.place(self._setup.out / shard.part, screened.part)
        return screened.tally


@functools.lru_cache(1)
def _opened(archive: Any, setup: Setup) -> Service:
    """The service of a run, once in each process of a cluster."""
    import ray

    with tempfile.TemporaryDirectory(prefix="rampart-") as scratch:
        file = Path(scratch) / setup.archive.name
        file.write_bytes(ray.get(archive))
        # A task has one core, so as many could run here as there are.
        return setup._replace(archive=file, workers=available_cores()).open()


def _screen(archive: list[Any], setup: Setup, shard: Shard) -> Screened:
    """What a task does. `archive` is in a list, or Ray would fetch it for each task anew."""
    service = _opened(archive[0], setup)
    with tempfile.TemporaryDirectory(prefix="rampart-") as scratch:
        out = Path(scratch)
        copies = out / "copies"
        placed = setup._replace(out=out, copies=copies if setup.copies else None)
        tally = Screener(placed, service).screen(shard, lambda images: None)
        found = [file for file in copies.rglob("*") if file.is_file()]
        flagged = {str(file.relative_to(copies)): file.read_bytes() for file in found}
        return Screened(tally, (out / shard.part).read_bytes(), flagged)
