"""Clients of all kinds that ask an endpoint at once, and what they did not get as they should."""

import base64
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import requests
from fuzz import mutated, seeds
from server import pngs

from rampart.handlers.types import Pixels

TIMEOUT = 60  # seconds for an answer
CONFIDENCE = 0.01  # that may change with the number of images in a run
REFUSED = 415  # the error in the place of a broken image


class Slip(NamedTuple):
    """What a client did not get as it should, and when it knew, by the monotonic clock.

    `lost` is a request that was cut or answered with 500 or above. All others are answers that are
    wrong, which no fault excuses.
    """

    when: float
    lost: bool
    what: str


class Load:
    """Clients of an endpoint, until `stop`. `seen` counts answers by client and status, `near` says
    when an image like one of before was asked, and whether it was told.

    With `trust`, a file of certificates, the endpoint must show one that these have signed.
    """

    def __init__(self, url: str, images: Pixels, pause: float, trust: Path | None = None) -> None:
        self.url, self.images, self.pause = url, images, pause
        self.verify = str(trust) if trust else True
        self.tls = ssl.create_default_context(cafile=trust) if trust else None
        self.bodies = pngs(images)
        self.expected: list[dict[str, Any]] = []
        self.seen: Counter[str] = Counter()
        self.near: list[tuple[float, bool]] = []
        self.slips: list[Slip] = []
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Learn what is right from the endpoint while it is alone; then all clients begin."""
        self.expected = [self.ask(body) for body in self.bodies]
        kinds: list[Callable[[random.Random], None]] = [self._good] * 4
        kinds += [self._batch, self._broken, self._broken, self._near, *[self._slow] * 8]
        for number, kind in enumerate(kinds):
            draw = random.Random(number)
            self.threads.append(threading.Thread(target=self._run, args=(kind, draw)))
            self.threads[-1].start()

    def end(self) -> None:
        """Stop all clients, each after what it waits for."""
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def ask(self, body: bytes) -> dict[str, Any]:
        """The verdict on a picture, over a new connection. Raises RequestException without one."""
        answer = requests.post(self.url, body, verify=self.verify, timeout=TIMEOUT)
        answer.raise_for_status()
        verdict: dict[str, Any] = answer.json()
        return verdict

    def wrong(self, number: int, verdict: Mapping[str, Any]) -> str | None:
        """What is wrong with the verdict on a picture, if anything is."""
        known = self.expected[number]
        names = ("label", "decision")
        same = all(verdict.get(name) == known[name] for name in names)
        if same and abs(verdict["confidence"] - known["confidence"]) <= CONFIDENCE:
            return None
        return f"image {number} was {known} and is {verdict}"

    def _run(self, kind: Callable[[random.Random], None], draw: random.Random) -> None:
        """One client, whose end before the time is a slip."""
        try:
            kind(draw)
        except Exception as error:
            self._slip(f"a client ended: {kind.__name__}: {error!r}")

    def _good(self, draw: random.Random) -> None:
        """One image a request."""
        with self._session() as session:
            while not self.stop.wait(self.pause):
                number = draw.randrange(len(self.bodies))
                answer = self._post(session, "good", data=self.bodies[number])
                if answer is not None:
                    self._check(number, answer.json())

    def _batch(self, draw: random.Random) -> None:
        """Sixteen images a request, of which one is broken."""
        with self._session() as session:
            while not self.stop.wait(4 * self.pause):
                numbers = [draw.randrange(len(self.bodies)) for _ in range(15)]
                known = [base64.b64encode(self.bodies[number]).decode() for number in numbers]
                instances = [{"b64": text} for text in [*known, "AAAA"]]
                answer = self._post(session, "batch", json={"instances": instances})
                if answer is None:
                    continue
                *verdicts, error = answer.json()["predictions"]
                for number, verdict in zip(numbers, verdicts, strict=True):
                    self._check(number, verdict)
                if error.get("code") != REFUSED:
                    self._slip(f"no error for a broken image but {error}")

    def _broken(self, draw: random.Random) -> None:
        """Mutated bodies."""
        known = seeds().all
        with self._session() as session:
            while not self.stop.wait(self.pause):
                self._post(session, "broken", data=mutated(draw.choice(known), known, draw))

    def _near(self, draw: random.Random) -> None:
        """One image, a little different each time."""
        noise = np.random.default_rng(0)
        with self._session() as session:
            while not self.stop.wait(4 * self.pause):
                body = pngs(changed(self.images[0], noise)[None])[0]
                answer = self._post(session, "near", data=body)
                if answer is not None:
                    self.near.append((time.monotonic(), told(answer.json())))

    def _slow(self, draw: random.Random) -> None:
        """A body bit by bit; three in four hang up before its end."""
        while not self.stop.is_set():
            body = draw.choice(self.bodies)
            sent = body[:200] if draw.random() < 0.75 else body
            try:
                if (status := self._dribble(body, sent)) is not None:
                    self._count("slow", status)
            except OSError as error:
                self._slip(f"a slow client was cut: {error!r}", lost=True)
                self.stop.wait(1)

    def _dribble(self, body: bytes, sent: bytes) -> int | None:
        """Status of the answer to `body`, of which `sent` is sent; None where that is not all."""
        parts = urlsplit(self.url)
        host, port = str(parts.hostname), int(parts.port or 80)
        head = f"POST {parts.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, port), timeout=TIMEOUT) as plain:
            link = self.tls.wrap_socket(plain, server_hostname=host) if self.tls else plain
            with link:
                link.sendall(head.encode())
                for start in range(0, len(sent), 50):
                    link.sendall(sent[start : start + 50])
                    if self.stop.wait(0.1):
                        return None
                if sent != body:
                    return None
                line = link.recv(100)
                if not line:
                    raise ConnectionError("closed without an answer")
                return int(line.split(b" ")[1])

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # it may name other authorities, or proxies
        session.verify = self.verify
        return session

    def _post(self, session: requests.Session, kind: str, **body: Any) -> requests.Response | None:
        """An answer, counted; None where there is none, or one of 500 and above."""
        try:
            answer = session.post(self.url, timeout=TIMEOUT, **body)
        except requests.RequestException as error:
            self._slip(f"{kind}: {error!r}", lost=True)
            return None
        return answer if self._count(kind, answer.status_code, answer.text) else None

    def _count(self, kind: str, status: int, text: str = "") -> bool:
        """Count an answer; whether it is below 500."""
        with self._lock:
            self.seen[f"{kind} {status}"] += 1
        if status >= 500:
            self._slip(f"{kind}: {status} {text[:200]}", lost=True)
        return status < 500

    def _check(self, number: int, verdict: Mapping[str, Any]) -> None:
        if what := self.wrong(number, verdict):
            self._slip(what)

    def _slip(self, what: str, *, lost: bool = False) -> None:
        self.slips.append(Slip(time.monotonic(), lost, what))


def told(verdict: Mapping[str, Any]) -> bool:
    """Whether a verdict tells of images like this one before."""
    return "similar_query" in verdict.get("detail", {})


def changed(image: Pixels, noise: np.random.Generator) -> Pixels:
    """An image like `image` (H, W, 3), as the next query of an attack."""
    change = noise.integers(-8, 9, image.shape)
    change *= noise.random(image.shape) < 0.02
    return np.clip(image + change, 0, 255).astype(np.uint8)
