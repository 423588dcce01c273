"""Does a small queueing simulation predict the endpoint's p99 before the load comes?

    .venv/bin/python benchmarks/capacity.py [--images cifar10-test.npz] [--rounds 5] [--json FILE]

Rampart's own server makes a batch of what has come while the graph ran. So one queue and one server
describe it, whose service time depends on the size of the batch. Each round takes that time from
the batches that the endpoint counts under closed load (1 to 64 clients), and from one client's
latencies how it scatters. From these alone the simulation predicts the latencies of Poisson
arrivals at 50, 70 and 90% of the highest rate; then they are sent. Claims: predicted p99 within 20%
of the one seen. It simulates no refusals: an endpoint refuses what comes while 100 wait, and a
round in which that happens says so. The endpoint has one core, and what sends has the others, so
that neither waits for the other. About a minute a round; other work on the machine spoils it, since
the rate may change in between.
"""

import argparse
import os
import re
import select
import socket
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import ratios
import requests
from server import endpoint, pack, pngs

from rampart.export.build import sample_crops
from rampart.handlers.http.lane import LARGEST
from rampart.hardening.train.data import load

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.5, 0.7, 0.9)  # of the highest rate
WITHIN = 0.2  # of the p99 that was seen
CLOSED, OPEN = 2.0, 10.0  # seconds of each load
SIMULATED = 200_000  # arrivals
MOST = 800  # requests on their way at once; `select` takes no more than 1,024
KEPT = 30.0  # seconds for which an idle connection is used again; the endpoint closes it after 75
HANDED_OVER = 1.5  # seconds until figures are at /metrics
Floats = np.ndarray  # (N,)


class Sender:
    """One process that sends pictures over kept connections, and takes times."""

    def __init__(self, url: str, bodies: Sequence[bytes]) -> None:
        place = urlsplit(url)
        self._address = (place.hostname, place.port)
        head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: image/png\r\n"
        self._requests = [
            f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies
        ]
        self._idle: list[tuple[socket.socket, float]] = []  # and since when
        self._began: dict[socket.socket, float] = {}  # when what is open was due
        self._sent = self.refused = 0

    def _send(self, due: float) -> None:
        connection = self._connection()
        self._began[connection] = due
        connection.sendall(self._requests[self._sent % len(self._requests)])
        self._sent += 1

    def _connection(self) -> socket.socket:
        while self._idle:
            connection, since = self._idle.pop()
            if time.perf_counter() - since < KEPT:
                return connection
            connection.close()
        connection = socket.create_connection(self._address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _receive(self, seconds: float) -> list[float]:
        """The times of the answers that come within so many seconds."""
        ready, _, _ = select.select(list(self._began), [], [], max(0.0, seconds))
        times = []
        for connection in ready:
            answer = b""
            while not _whole(answer):
                if not (more := connection.recv(65536)):
                    raise RuntimeError(f"the server ended a connection after {answer[:300]!r}")
                answer += more
            passed = time.perf_counter() - self._began.pop(connection)
            if b"\r\nconnection: close" in answer.partition(b"\r\n\r\n")[0].lower():
                connection.close()  # as where too many wait
            else:
                self._idle.append((connection, time.perf_counter()))
            if answer.startswith(b"HTTP/1.1 200"):
                times.append(passed)
            elif answer.startswith(b"HTTP/1.1 503"):  # too many wait
                self.refused += 1
            else:
                raise RuntimeError(f"a request failed: {answer[:300].decode(errors='replace')}")
        return times

    def closed(self, clients: int, seconds: float) -> Floats:
        """Latencies where each of so many clients waits for its answer."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            while len(self._began) < clients:
                self._send(time.perf_counter())
            times += self._receive(1.0)
        self._drain()
        if self.refused:
            raise RuntimeError(f"{clients} clients are too many for this endpoint: it refuses some")
        return np.array(times)

    def open(self, arrivals: Floats) -> tuple[Floats, float]:
        """Latencies of requests that come at these seconds, counted from when they were due, and
        the share that was refused.
        """
        times: list[float] = []
        self.refused = 0
        left, began = deque(arrivals), time.perf_counter() + 0.05
        while left:
            now = time.perf_counter() - began
            while left and left[0] <= now:
                due = began + left.popleft()
                if len(self._began) < MOST:
                    self._send(due)
                else:
                    self.refused += 1
            wait = left[0] - (time.perf_counter() - began) if left else 0.0
            times += self._receive(wait)
        latencies = np.array([*times, *self._drain()])
        self.refused, refused = 0, self.refused
        return latencies, refused / len(arrivals)

    def close(self) -> None:
        """Close all connections, which are idle."""
        while self._idle:
            self._idle.pop()[0].close()

    def _drain(self) -> list[float]:
        times: list[float] = []
        while self._began:
            times += self._receive(1.0)
        return times


def _whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])


class Service(NamedTuple):
    """What closed load shows: seconds of batches by their size, and how those of one scatter."""

    sizes: Floats
    seconds: Floats
    scatter: Floats

    def mean(self, size: int) -> float:
        """Seconds from the begin of a batch of so many to where the next one may begin."""
        return float(np.interp(size, self.sizes, self.seconds))


def batches(root: str) -> tuple[float, float]:
    """What /metrics has counted: runs of the graph, and their pictures."""
    time.sleep(HANDED_OVER)
    text = requests.get(f"{root}/metrics", timeout=10).text

    def summed(name: str) -> float:
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    return summed("rampart_batch_images_count"), summed("rampart_batch_images_sum")


def measured(sender: Sender, root: str) -> tuple[Service, float]:
    """The service times under closed load, and the highest rate: that of the largest batches.

    A client asks again as soon as it is answered, so the server never rests: one batch after the
    other, each with all that the server reads and writes for it.
    """
    sizes, seconds, first = [], [], np.zeros(0)
    before = batches(root)
    for clients in CLIENTS:
        began = time.perf_counter()
        times = sender.closed(clients, CLOSED)
        passed = time.perf_counter() - began
        after = batches(root)
        runs, images = (b - a for a, b in zip(before, after, strict=True))
        before = after
        sizes.append(images / runs)
        seconds.append(passed / runs)
        if clients == 1:  # which waits for nobody
            first = times
    order = np.argsort(sizes)
    columns = [np.array(values)[order] for values in (sizes, seconds)]
    return Service(*columns, first - first.mean()), len(times) / passed


def simulated(service: Service, arrivals: Floats, draws: np.random.Generator) -> Floats:
    """Latencies of such arrivals: what has come while a batch ran is the next one."""
    latencies = np.empty(len(arrivals))
    means = np.array([service.mean(size) for size in range(LARGEST + 1)])
    # Interruptions come as often in a second of any batch, so that variances add up with its time.
    scales = np.sqrt(means / means[1])
    at, free = 0, 0.0
    while at < len(arrivals):
        start = max(free, float(arrivals[at]))
        size = min(int(np.searchsorted(arrivals, start, "right")) - at, LARGEST)
        off = scales[size] * service.scatter[draws.integers(len(service.scatter))]
        free = start + max(means[size] / 2, means[size] + off)
        latencies[at : at + size] = free - arrivals[at : at + size]
        at += size
    return latencies


def poisson(rate: float, count: int, draws: np.random.Generator) -> Floats:
    """Seconds at which so many requests come."""
    return np.cumsum(draws.exponential(1 / rate, count))


class Seen(NamedTuple):
    """A load of one round: what was predicted and what came, in milliseconds."""

    rate: float
    predicted: tuple[float, float]  # p50, p99
    seen: tuple[float, float]
    refused: float


def percentiles(latencies: Floats) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return float(p50), float(p99)


def one_round(sender: Sender, root: str, number: int) -> tuple[Service, dict[float, Seen]]:
    """Measure, predict, then send."""
    draws = np.random.default_rng(number)
    service, highest = measured(sender, root)
    found = {}
    for share in SHARES:
        rate = share * highest
        predicted = percentiles(simulated(service, poisson(rate, SIMULATED, draws), draws))
        sent, refused = sender.open(poisson(rate, int(rate * OPEN), draws))
        found[share] = Seen(rate, predicted, percentiles(sent), refused)
    return service, found


def report(rounds: Sequence[tuple[Service, dict[float, Seen]]]) -> list[dict[str, object]]:
    """Print all rounds; the claims."""
    claims = []
    service = rounds[-1][0]
    columns = zip(service.sizes, service.seconds * 1e3, strict=True)
    by_size = ", ".join(f"{size:.1f}: {ms:.2f}" for size, ms in columns)
    print(f"ms of a batch by its size, in the last round: {by_size}")
    print(f"{'load':>5} {'per s':>7} {'refused':>8} {'p50 predicted, seen':>22} {'p99':>22}  ms")
    for share in SHARES:
        rows = [found[share] for _, found in rounds]
        rate, refused = (np.median([getattr(r, n) for r in rows]) for n in ("rate", "refused"))
        (p50, p99), (own50, own99) = (
            np.median([getattr(row, name) for row in rows], axis=0)
            for name in ("predicted", "seen")
        )
        told = f"{p50:11.2f} {own50:10.2f} {p99:11.2f} {own99:10.2f}"
        print(f"{share:5.0%} {rate:7.0f} {refused:8.1%} {told}")
        tails = [[row.predicted[1] for row in rows], [row.seen[1] for row in rows]]
        setting = f"{share:.0%} of the highest rate"
        made = [
            ratios.claim("p99 predicted / seen", setting, *tails, 1 - WITHIN),
            ratios.claim("p99 seen / predicted", setting, *tails[::-1], 1 / (1 + WITHIN)),
        ]
        print("\n".join(map(ratios.in_words, made)))
        claims += made
    print(f"{sum(bool(one['holds']) for one in claims)} of {len(claims)} targets hold")
    return claims


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--images", type=Path, help=".npz; without it crops of a photograph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    images = (load(given.images).image[:64] if given.images else sample_crops(32)).numpy()
    with tempfile.TemporaryDirectory() as scratch:
        archive = pack(given.model, Path(scratch) / "served.mar")
        one, *others = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {one})  # which the endpoint inherits
        with endpoint(archive, "--server", "http") as url:
            os.sched_setaffinity(0, others or {one})
            root = url.rpartition("/predictions/")[0]
            sender = Sender(url, pngs(images))
            sender.closed(8, 3)  # to warm it up
            rounds = [one_round(sender, root, number) for number in range(given.rounds)]
            sender.close()
    print(ratios.machine())
    claims = report(rounds)
    if given.json:
        ratios.write(given.json, claims)


if __name__ == "__main__":
    main()
