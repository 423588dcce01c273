"""A run over a store: processes that share the cores, shards that are done once."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rampart.handlers.service import Service
from rampart.screening import parts
from rampart.screening.parts import Tally
from rampart.screening.shards import Shard, Store
from rampart.screening.worker import Screener, Setup

FILE, PARTS = "screen.json", "verdicts"
TRIES = 2  # for a shard whose process ends
POLL = 0.5  # seconds between two looks at what was done
# Screens shards, and gives each with its tally, or why it has none, as they are done.
Screened = Callable[[Sequence[Shard]], Iterator[tuple[Shard, Tally | str]]]


class Outcome(NamedTuple):
    """What a run came to, those before it included."""

    tally: Tally
    shards: int
    failed: dict[str, str]  # shards without verdicts, and why
    seconds: float  # of this run
    screened: int  # images of this run


class Halted(Exception):
    """The run ends before its shards do."""


def settings(service: Service, store: str, setup: Setup) -> dict[str, Any]:
    """What all verdicts of one folder have in common."""
    hashes = service.summary["sha256"]
    return {
        "source": store,
        "graph": hashes.get("graph.onnx"),
        "calibration": hashes.get("calibration.json"),
        "policy": asdict(service.policy),
        "only_flagged": setup.only_flagged,
        "near_duplicates": setup.fingerprints,
        "copies": str(setup.copies.absolute()) if setup.copies else None,
    }


@contextlib.contextmanager
def claimed(out: Path, content: dict[str, Any]) -> Iterator[Path]:
    """The folder of the parts, for this run alone. Raises ValueError for one of another run."""
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another run writes to {out}: wait for it, or choose another"
            ) from error
        file.seek(0)
        if (text := file.read()) != (line := json.dumps(content, indent=1)):
            _check_own(out, text, content)
            file.truncate(0)  # it is empty, or a write of it failed
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        yield out / PARTS


def _check_own(out: Path, text: str, content: dict[str, Any]) -> None:
    """Raise ValueError where verdicts in `out` are of another run, which `text` describes."""
    try:
        old: dict[str, Any] = json.loads(text)
    except ValueError:
        old = {}
    unlike = ", ".join(name for name in content if old.get(name) != content[name])
    if old and unlike:
        raise ValueError(f"{out} belongs to another run ({unlike}): choose another --out")
    if not old and any((out / PARTS).glob("*.parquet")):
        raise ValueError(
            f"{out} has verdicts, but its {FILE} is damaged: choose another --out, or remove {out}"
        )


def run(store: Store, out: Path, screened: Screened) -> Outcome:
    """Screen all shards of a store but those that have their part in `out` already."""
    for left in out.glob("*.unfinished"):
        left.unlink()
    total, todo = Tally(), []
    for shard in store.shards:
        tally = parts.read(out / shard.part, shard.digest)
        # What could not be read may be there now.
        if tally is None or tally.errors["unreadable"]:
            todo.append(shard)
        else:
            total.add(tally)
    for gone in {file.name for file in out.glob("*.parquet")} - {s.part for s in store.shards}:
        (out / gone).unlink()
    began, failed = time.monotonic(), dict[str, str]()
    done = Tally()
    for shard, result in screened(todo):
        if isinstance(result, Tally):
            done.add(result)
        else:
            failed[shard.address] = result
    total.add(done)
    return Outcome(total, len(store.shards), failed, time.monotonic() - began, done.images)


class Processes:
    """The processes of a run, each with an engine of its own."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._context, self._setup = context, setup
        self._done = context.Value("q", 0)
        self._halt = context.Event()
        self._idle: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()

    def screened(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Tally | str]]:
        """Each shard with its tally, or why it has none, as they are done."""
        count = min(self._setup.workers, len(shards))
        pools = [self._begin() for _ in range(count)]
        for pool in pools:
            self._idle.put(pool)
        bar = Bar(shards, lambda: self._done.value)
        with ThreadPoolExecutor(max(1, count), initializer=_block_ctrl_c) as threads, bar:
            try:
                futures = {threads.submit(self._screen, shard): shard for shard in shards}
                yield from bar.watch(futures)
            finally:
                self._halt.set()
                threads.shutdown(cancel_futures=True)
                while not self._idle.empty():
                    self._idle.get().shutdown()

    def _begin(self) -> ProcessPoolExecutor:
        given = (self._setup, self._done, self._halt)
        return ProcessPoolExecutor(1, self._context, _begin, given)

    def _screen(self, shard: Shard) -> Tally | str:
        pool = self._idle.get()
        try:
            for _ in range(TRIES):
                try:
                    return pool.submit(_screen, shard).result()
                except BrokenProcessPool:  # a decoder that crashed, or no memory
                    pool.shutdown()
                    pool = self._begin()
            return f"its process died {TRIES} times: memory ran out, or one of its files kills it"
        except Halted:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self._idle.put(pool)


class Bar:
    """Progress in images; how many there are is estimated by the weights of what is done.

    `done` counts the images of shards that are not done yet as well, where that is known.
    """

    def __init__(self, shards: Sequence[Shard], done: Callable[[], int] | None = None) -> None:
        self._all = sum(shard.weight for shard in shards)
        self._done, self._weight, self._images = done, 0, 0
        self._bar = tqdm(unit=" images", disable=None if shards else True, smoothing=0.05)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def watch(
        self, futures: dict["Future[Tally | str]", Shard]
    ) -> Iterator[tuple[Shard, Tally | str]]:
        """Each shard with what came of it, and the bar kept up meanwhile."""
        left = set(futures)
        while left:
            ended, left = wait(left, POLL, "FIRST_COMPLETED")
            for future in ended:
                shard, tally = futures.pop(future), future.result()
                self._weight += shard.weight
                self._images += tally.images if isinstance(tally, Tally) else 0
                yield shard, tally
            if self._images:
                self._bar.total = round(self._images / self._weight * self._all)
            self._bar.update((self._done() if self._done else self._images) - self._bar.n)


_screener: Screener
_told: Any
_halted: Any


def _block_ctrl_c() -> None:
    """In each thread: a process that it starts knows no Ctrl-C, also while it is still starting."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _begin(setup: Setup, done: Any, halt: Any) -> None:
    """In each process, once."""
    global _screener, _told, _halted
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _screener, _told, _halted = Screener(setup, setup.open()), done, halt


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _screen(shard: Shard) -> Tally:
    return _screener.screen(shard, _progress)


def _progress(images: int) -> None:
    if _halted.is_set():
        raise Halted
    with _told.get_lock():
        _told.value += images
