"""Half an hour of mixed load: does the endpoint stay right, up and small?

    .venv/bin/python benchmarks/soak.py --minutes 30

Clients: four that send good images and compare each verdict with the first one that the image got;
one that sends batches; two that send broken bodies; eight slow ones that send a body bit by bit and
mostly hang up; one that changes one image a little each time, as an attack does. The archive
is the served one, with a query store and a quarantine. Asked for: no wrong answer, no answer of 500
or above, no worker that died, and memory that is flat: from the first third to the last neither the
worker's nor Java's median grows by more than 50 MB.
"""

import argparse
import base64
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
from fuzz import mutated, seeds
from server import endpoint, pngs
from tqdm import tqdm

from rampart.export.build import sample_crops

GROWTH = 50.0  # MB


class Load:
    """Clients that run until `stop`; `seen` counts answers by status, `wrong` keeps surprises."""

    def __init__(self, url: str, images: np.ndarray) -> None:
        self.url, self.images = url, images
        self.bodies = pngs(images)
        self.expected: dict[int, tuple[str, str, float]] = {}
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def start(self, pause: float) -> list[threading.Thread]:
        """All clients; each waits `pause` seconds between requests."""
        kinds: list[Callable[[random.Random, float], None]] = [self.good] * 4
        kinds += [self.batch, self.broken, self.broken, self.near, *[self.slow] * 8]
        threads = [
            threading.Thread(target=self._run, args=(kind, random.Random(number), pause))
            for number, kind in enumerate(kinds)
        ]
        for thread in threads:
            thread.start()
        return threads

    def _run(
        self, kind: Callable[[random.Random, float], None], draw: random.Random, pause: float
    ) -> None:
        """One client, whose end before the time is a surprise."""
        try:
            kind(draw, pause)
        except Exception as error:
            self._surprise(f"a client ended: {kind.__name__}: {error!r}")

    def good(self, draw: random.Random, pause: float) -> None:
        """One image a request."""
        with requests.Session() as session:
            while not self.stop.wait(pause):
                number = draw.randrange(len(self.bodies))
                answer = session.post(self.url, self.bodies[number], timeout=60)
                self._count("good", answer)
                self._check(number, answer.json())

    def batch(self, draw: random.Random, pause: float) -> None:
        """Sixteen images a request, of which one is broken."""
        with requests.Session() as session:
            while not self.stop.wait(4 * pause):
                numbers = [draw.randrange(len(self.bodies)) for _ in range(15)]
                known = [base64.b64encode(self.bodies[number]).decode() for number in numbers]
                instances = [{"b64": text} for text in [*known, "AAAA"]]
                answer = session.post(self.url, json={"instances": instances}, timeout=60)
                self._count("batch", answer)
                *verdicts, error = answer.json()["predictions"]
                for number, verdict in zip(numbers, verdicts, strict=True):
                    self._check(number, verdict)
                if error.get("code") != 415:
                    self._surprise(f"no error for a broken image but {error}")

    def broken(self, draw: random.Random, pause: float) -> None:
        """Mutated bodies."""
        known = seeds()
        with requests.Session() as session:
            while not self.stop.wait(pause):
                body = mutated(draw.choice(known), known, draw)
                answer = session.post(self.url, body, timeout=60)
                self._count("broken", answer)

    def near(self, draw: random.Random, pause: float) -> None:
        """One image, a little different each time: nine in ten must be told."""
        noise = np.random.default_rng(0)
        with requests.Session() as session:
            while not self.stop.wait(4 * pause):
                change = noise.integers(-8, 9, self.images[0].shape)
                change *= noise.random(change.shape) < 0.02
                image = np.clip(self.images[0] + change, 0, 255).astype(np.uint8)
                answer = session.post(self.url, pngs(image[None])[0], timeout=60)
                self._count("near", answer)
                with self._lock:
                    self.seen["near, told"] += "similar_query" in answer.json().get("detail", {})

    def slow(self, draw: random.Random, pause: float) -> None:
        """A body byte by byte; three in four hang up before its end."""
        parts = urlsplit(self.url)
        while not self.stop.is_set():
            number = draw.randrange(len(self.bodies))
            body = self.bodies[number][:200] if draw.random() < 0.75 else self.bodies[number]
            head = f"POST {parts.path} HTTP/1.1\r\nHost: x\r\nContent-Length: "
            head += f"{len(self.bodies[number])}\r\n\r\n"
            try:
                address = (str(parts.hostname), int(parts.port or 80))
                with socket.create_connection(address, timeout=60) as connection:
                    connection.sendall(head.encode())
                    for start in range(0, len(body), 50):
                        connection.sendall(body[start : start + 50])
                        if self.stop.wait(0.1):
                            return
                    if len(body) == len(self.bodies[number]):
                        status = connection.recv(100).split(b" ")[1].decode()
                        with self._lock:
                            self.seen[f"slow {status}"] += 1
            except OSError as error:
                self._surprise(f"a slow client was cut: {error}")
                self.stop.wait(1)

    def _count(self, kind: str, answer: requests.Response) -> None:
        with self._lock:
            self.seen[f"{kind} {answer.status_code}"] += 1
        if answer.status_code >= 500:
            self._surprise(f"{kind}: {answer.status_code} {answer.text[:200]}")

    def _check(self, number: int, verdict: dict[str, Any]) -> None:
        """Labels and decisions must not change; confidences may in their last digits, with the
        number of images in a run."""
        if "label" not in verdict:
            self._surprise(f"image {number} got {verdict}")
            return
        found = (str(verdict["label"]), str(verdict["decision"]), float(verdict["confidence"]))
        with self._lock:
            known = self.expected.setdefault(number, found)
        if known[:2] != found[:2] or abs(known[2] - found[2]) > 0.01:
            self._surprise(f"image {number} was {known} and is {found}")

    def _surprise(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)


def processes() -> list[psutil.Process]:
    """Java and its worker, below this process; fewer where one has died."""
    family = psutil.Process().children(recursive=True)
    java = [one for one in family if one.name() == "java"]
    return java + [one for one in family if "model_service_worker" in " ".join(one.cmdline())]


def watch(load: Load, minutes: float) -> tuple[np.ndarray, bool]:
    """MB of Java and the worker, (seconds / 10, 2), and whether both are those of the beginning."""
    first = processes()
    time.sleep(10)  # what is loaded once
    sizes = [[one.memory_info().rss / 1e6 for one in first]]
    for _ in tqdm(range(int(minutes * 6)), desc="10 s each"):
        time.sleep(10)
        try:
            sizes.append([one.memory_info().rss / 1e6 for one in first])
        except psutil.NoSuchProcess:
            return np.array(sizes), False
    return np.array(sizes), processes() == first


def main() -> None:
    """Serve, load, watch, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=Path("model_store/cifar10.mar"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between requests")
    options = parser.parse_args()
    images = sample_crops(32, count=200).numpy()
    with tempfile.TemporaryDirectory() as scratch:
        extra = ["--query-store", f"{scratch}/queries", "--quarantine", f"{scratch}/aside"]
        with endpoint(options.archive, *extra) as url:
            load = Load(url, images)
            threads = load.start(options.pause)
            try:
                sizes, same = watch(load, options.minutes)
            finally:
                load.stop.set()
                for thread in threads:
                    thread.join()
    third = max(1, len(sizes) // 3)
    growth = np.median(sizes[-third:], axis=0) - np.median(sizes[:third], axis=0)
    print("\n".join(f"{kind:12} {count:7}" for kind, count in sorted(load.seen.items())))
    asked, told = (load.seen[kind] for kind in ("near 200", "near, told"))
    if told < 0.9 * asked or not asked:
        load.wrong.append(f"of {asked} images near one of before {told} were told")
    print(f"wrong or failed: {len(load.wrong)}", *load.wrong[:10], sep="\n  ")
    for name, change, last in zip(("Java", "worker"), growth, sizes[-1], strict=True):
        print(f"{name}: {last:.0f} MB at the end, {change:+.1f} MB from first third to last")
    print("the same processes all the time" if same else "a process died")
    sys.exit(bool(load.wrong) or not same or bool((growth > GROWTH).any()))


if __name__ == "__main__":
    main()
