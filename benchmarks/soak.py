"""Half an hour of mixed load, and of outages: does the endpoint stay right, up and small?

    .venv/bin/python benchmarks/soak.py --minutes 30
    .venv/bin/python benchmarks/soak.py --minutes 30 --front torchserve
    .venv/bin/python benchmarks/soak.py --minutes 30 --store folder

Clients (load.py): four that send good images and compare each verdict with the one that the image
got at first, of which a fifth are flagged and kept; one that sends batches; two that send broken
bodies; eight slow ones that send a body bit by bit and mostly hang up; one that changes one image a
little each time, as an attack does. Outages (outages.py), one after the other, three times in 30
minutes: a worker is killed; the disk is full; Redis is gone; another version is swapped in; the
certificate is rotated. Needs `redis-server` and `openssl`, and the right to mount for a disk of its
own; what is missing is left out, and said.

Asked for: no wrong answer at any time. No request cut and no answer of 500 or above, but for 5 s
from a kill, and then one of each client at most: what was in flight. Once an outage is over, all is
right again within 20 s (disk, Redis), 30 s (kill) or 120 s (swap, certificate), and what was
recorded before is still there: quarantined images, the count of alerts, and queries, which near
ones still find. Disk and Redis are left alone for 6 s first, as workers do with what has failed. No
worker ends by itself. Nine in ten near queries are told outside of outages. Memory is flat: from
the first third to the last the median of all processes together grows by no more than 50 MB.
"""

import argparse
import contextlib
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import requests
from fuzz import processes
from load import Load, Slip, changed, told
from outages import OUTAGES, VERSIONS, Certificates, Disk, Site, Whole
from server import Redis, endpoint, pack, pngs

from rampart.export.build import sample_crops
from rampart.handlers.quarantine import FILES
from rampart.handlers.types import Pixels

GROWTH = 50.0  # MB
SIZE = 32
RATE = 0.2  # of clean images that are flagged: the quarantine fills within minutes
SAMPLES = 180  # of memory, in all
ROUND = 10.0  # minutes in which each outage comes once
WITNESSES = 5  # images asked before an outage, whose like must be told after it
SETTLED = 10.0  # seconds in which is loaded what is loaded once


class Outcome(NamedTuple):
    """What came of an outage; times by the monotonic clock, `back` in seconds after it ended."""

    name: str
    began: float
    ended: float
    back: float  # infinite where not all was right within the limit
    wrong: list[str]  # what is not right again, or was recorded before and is no more

    def excuses(self, slip: Slip) -> bool:
        """Whether what was lost may have been in flight."""
        return slip.lost and 0 <= slip.when - self.began <= OUTAGES[self.name].window

    def faults(self, cut: int, clients: int) -> list[str]:
        """All that is wrong with it."""
        return self.wrong + [f"{cut} requests cut of {clients} clients"] * (cut > clients)


class Record(NamedTuple):
    """What an endpoint has recorded at some time."""

    quarantined: set[str]
    alerts: float
    witnesses: Pixels  # (WITNESSES, SIZE, SIZE, 3)

    @classmethod
    def of(cls, site: Site, load: Load, noise: np.random.Generator) -> "Record":
        """Ask some images that nobody has asked, and look at the rest."""
        witnesses = noise.integers(0, 256, (WITNESSES, SIZE, SIZE, 3), dtype=np.uint8)
        for body in pngs(witnesses):
            load.ask(body)
        return cls(site.quarantined(), site.alerts(), witnesses)

    def gone(self, site: Site, load: Load, noise: np.random.Generator) -> list[str]:
        """What of it is no more."""
        found, now = [], site.quarantined()
        if missing := lost_images(self.quarantined, now):
            found.append(f"{missing} quarantined images are gone")
        near = pngs(np.stack([changed(image, noise) for image in self.witnesses]))
        known = sum(told(load.ask(body)) for body in near)
        if known <= WITNESSES // 2:
            found.append(f"{WITNESSES - known} of {WITNESSES} queries are forgotten")
        return found


def lost_images(before: set[str], now: set[str]) -> int:
    """How many quarantined images are gone, but for the oldest that made way for new ones."""
    missing = before - now
    full = len(now) >= 0.9 * FILES  # less what is being written
    return sum(not (full and name < min(now)) for name in missing)


class Soak:
    """An endpoint under load, with what has come of its outages and what it weighed."""

    def __init__(self, site: Site, load: Load) -> None:
        self.site, self.load, self.noise = site, load, np.random.default_rng(1)
        self.outcomes: list[Outcome] = []
        self.sizes = [megabytes()]  # MB of all processes together
        self.ended: list[str] = []  # workers that nobody killed, or all
        self._known = set(processes())

    def watch(self, until: float, pause: float) -> None:
        """Weigh the processes now and then; note where a worker ended."""
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, pause))
            self.sizes.append(megabytes())
            self._look("between outages")

    def suffer(self, name: str) -> None:
        """One outage, and how long it takes until all is right."""
        outage = OUTAGES[name]
        before = Record.of(self.site, self.load, self.noise)
        began = time.monotonic()
        whole = outage.act(self.site)
        ended = time.monotonic()
        back, late = recovery(lambda: self._missing(whole, before, ended), outage.limit)
        gone = ["no answer"]
        with contextlib.suppress(requests.RequestException):
            gone = before.gone(self.site, self.load, self.noise)
        self.outcomes.append(Outcome(name, began, ended, back, late + gone))
        if not outage.renews:
            self._look(f"at {name}")
        self._known = set(processes())

    def _missing(self, whole: Whole, before: Record, ended: float) -> str:
        """What is not right since an outage `ended`, if anything."""
        numbers = random.sample(range(len(self.load.bodies)), 5)
        try:
            if not whole():
                return "what it changed"
            if len(processes()) != self.site.workers:
                return "the number of workers"
            if not any(known and when > ended for when, known in self.load.near[-1:]):
                return "the answer to the last near query"
            if self.site.alerts() < before.alerts:
                return "the count of alerts"
            verdicts = [(number, self.load.ask(self.load.bodies[number])) for number in numbers]
        except (OSError, psutil.Error) as error:  # of requests too
            return repr(error)
        return "".join(filter(None, (self.load.wrong(*verdict) for verdict in verdicts)))

    def _look(self, when: str) -> None:
        if gone := self._known - set(processes()):
            self.ended.append(f"{len(gone)} workers ended {when}")
            self._known -= gone


def recovery(missing: Callable[[], str], limit: float) -> tuple[float, list[str]]:
    """Seconds until nothing is `missing`; infinity, and what was, beyond `limit` seconds."""
    began = time.monotonic()
    while what := missing():
        if time.monotonic() - began > limit:
            break
        time.sleep(0.2)
    back = time.monotonic() - began
    if what or back > limit:
        return math.inf, [f"not right within {limit:g} s: {what or f'only after {back:.1f} s'}"]
    return back, []


def megabytes() -> float:
    """Of the server and its workers together, resident."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss / 1e6 if process.name() != "redis-server" else 0
    return total


def growth(sizes: Sequence[float]) -> float:
    """From the median of the first third to that of the last."""
    third = max(1, len(sizes) // 3)
    return statistics.median(sizes[-third:]) - statistics.median(sizes[:third])


def near_told(near: Sequence[tuple[float, bool]], outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """How many near queries were told, of how many that were asked outside of outages."""
    quiet = [
        known
        for when, known in near
        if not any(one.began <= when <= one.ended + one.back for one in outcomes)
    ]
    return sum(quiet), len(quiet)


def report(soak: Soak, start: float) -> tuple[list[str], bool]:
    """The lines to print, and whether all held."""
    load, clients = soak.load, len(soak.load.threads)
    lines = [f"{kind:12} {count:7}" for kind, count in sorted(load.seen.items())]
    wrong = [
        f"{slip.when - start:.0f} s: {slip.what}"
        for slip in load.slips
        if not any(outcome.excuses(slip) for outcome in soak.outcomes)
    ] + soak.ended
    known, asked = near_told(load.near, soak.outcomes)
    if not asked or known < 0.9 * asked:
        wrong.append(f"of {asked} images near one of before {known} were told")
    lines += [f"wrong or failed: {len(wrong)}", *(f"  {one}" for one in wrong[:10])]
    more = growth(soak.sizes)
    lines.append(f"{soak.sizes[-1]:.0f} MB at the end, {more:+.1f} MB from first third to last")
    lines.append(f"{'fault':12} {'at, s':>6} {'cut in flight':>14} {'back after, s':>14}  verdict")
    for outcome in soak.outcomes:
        cut = sum(map(outcome.excuses, load.slips))
        found = outcome.faults(cut, clients)
        wrong += found
        at = f"{outcome.name:12} {outcome.began - start:6.0f} {cut:14}"
        lines.append(f"{at} {outcome.back:14.1f}  {'; '.join(found) or 'right'}")
    return lines, not wrong and more <= GROWTH


@contextlib.contextmanager
def built(options: argparse.Namespace, scratch: Path) -> Iterator[Site]:
    """What an endpoint needs, in a folder; says what is left out, and why."""
    name = f"{options.model.resolve().name}.mar"  # of the model too
    archives = {}
    for version in VERSIONS:
        (folder := scratch / version).mkdir()
        asked = ("--model-version", version, "--rate", str(RATE))
        archives[version] = pack(options.model, folder / name, *asked)
    (scratch / "store").mkdir()
    served = Path(shutil.copyfile(archives[VERSIONS[0]], scratch / "store" / name))
    disk = redis = certificates = None
    with contextlib.ExitStack() as stack:
        try:
            disk = Disk(scratch / "disk")
            stack.callback(disk.close)
        except (OSError, subprocess.CalledProcessError):
            print("left out: disk, because we may not mount one")
        if options.store == "redis" and shutil.which("redis-server"):
            (scratch / "redis").mkdir()
            redis = Redis(scratch / "redis", "--appendonly", "yes")
            stack.callback(redis.stop)
        else:
            print("left out: redis, without redis-server or with --store folder")
        if options.front == "http":
            certificates = Certificates(scratch / "tls")
        else:
            print("left out: certificates, because TorchServe reads them only at its start")
        kept = (disk, redis, certificates)
        yield Site(options.front, options.workers, archives, served, scratch, *kept)


def names(site: Site, minutes: float, chosen: Sequence[str]) -> list[str]:
    """The outages of a run, in order."""
    has = {"disk": site.disk, "redis": site.redis, "certificates": site.certificates}
    return [name for name in chosen if has.get(name, True)] * max(1, round(minutes / ROUND))


def outages(soak: Soak, start: float, options: argparse.Namespace) -> None:
    """All outages, evenly over the minutes. Raises RequestException where one finds no endpoint."""
    whole, todo = 60 * options.minutes, names(soak.site, options.minutes, options.faults)
    time.sleep(min(SETTLED, whole / 6))
    for number, name in enumerate(todo, 1):
        soak.watch(start + whole * number / (len(todo) + 1), whole / SAMPLES)
        soak.suffer(name)
        print(f"{time.monotonic() - start:.0f} s: {name} is over", file=sys.stderr)
    soak.watch(start + whole, whole / SAMPLES)


def run(options: argparse.Namespace, site: Site) -> tuple[list[str], bool]:
    """Serve, load, break, judge."""
    noise = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    images = np.concatenate([sample_crops(SIZE, count=180).numpy(), noise])
    (site.work / "tmp").mkdir()
    log, tmp = site.work / "log", str(site.work / "tmp")
    with endpoint(site.served, *site.options(), log=log, TMPDIR=tmp) as site.url:
        load = Load(site.url, images, options.pause, site.trusted)
        load.start()
        soak, start = Soak(site, load), time.monotonic()
        try:
            outages(soak, start, options)
        except requests.RequestException as error:
            soak.ended.append(f"the endpoint answers no more: {error!r}")
        finally:
            load.end()
    return report(soak, start)


def main() -> None:
    """Print what was found; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--front", choices=("http", "torchserve"), default="http")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--faults", nargs="*", choices=tuple(OUTAGES), default=list(OUTAGES))
    parser.add_argument("--store", choices=("redis", "folder"), default="redis")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between requests")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        built(options, Path(scratch)) as site,
    ):
        lines, held = run(options, site)
        print("\n".join(lines))
    sys.exit(not held)


if __name__ == "__main__":
    main()
