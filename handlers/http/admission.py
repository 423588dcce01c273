"""Who may ask, and how often: one bucket of requests for each name, shared by all workers."""

import fcntl
import hashlib
import math
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

from rampart.handlers.errors import ImageError
from rampart.handlers.http.tokens import Rate, Tokens
from rampart.handlers.telemetry import Metrics

NO_TOKEN = ImageError(
    401, "no_token", "send a token that this endpoint knows: Authorization: Bearer TOKEN"
)
TOO_MANY = ImageError(
    429,
    "too_many_requests",
    "this token has sent more requests than its rate allows: wait as long as Retry-After says",
)
STATE = struct.Struct("dd")  # when a bucket is full again, and the rate by which it is


class Refusal(NamedTuple):
    """What one who is not let in is told, with headers or metadata."""

    error: ImageError
    headers: dict[str, str]


class Admission:
    """Lets requests in by their tokens; the buckets are in `folder`, which all workers have.

    Refused requests count in `metrics`.
    """

    def __init__(self, tokens: Tokens, folder: Path, metrics: Metrics) -> None:
        self._tokens, self._buckets, self._metrics = tokens, Buckets(folder), metrics

    def refusal(self, authorization: bytes, cost: int = 1) -> Refusal | None:
        """Why who sent this header is not let in; None lets a request in, and counts it as `cost`
        of them.
        """
        refusal = self._judge(authorization, cost)
        if refusal:
            self._metrics.count("rampart_requests_total", str(refusal.error.code))
        return refusal

    def _judge(self, authorization: bytes, cost: int) -> Refusal | None:
        name = self._tokens.holder(authorization)
        if name is None:
            return Refusal(NO_TOKEN, {"www-authenticate": "Bearer"})
        rate = self._tokens.rate(name)
        wait = self._buckets.take(name, rate, cost) if rate else 0.0
        return Refusal(TOO_MANY, {"retry-after": str(math.ceil(wait))}) if wait else None


class Buckets:
    """A file a name holds the time at which its bucket will be full again.

    Source: the generic cell rate algorithm, ITU-T I.371, as a virtual schedule. All processes of a
    machine have the same monotonic clock.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}

    def take(self, name: str, rate: Rate, cost: int = 1) -> float:
        """Take `cost` requests out of a bucket: 0, or the seconds until there are as many to take.

        One that never holds so many gives them when it is full, and owes the rest.
        """
        file = self._files.get(name) or self._open(name)
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            now = time.monotonic()
            kept = os.pread(file, STATE.size, 0) or STATE.pack(now, rate.per_second)
            full, before = STATE.unpack(kept)
            # What is owed is so many requests, at whatever rate they come back.
            owed = max(0.0, full - now) * before / rate.per_second
            full = now + owed + cost / rate.per_second
            wait: float = full - now - max(rate.burst, cost) / rate.per_second
            if wait > 1e-6:
                return wait
            os.pwrite(file, STATE.pack(full, rate.per_second), 0)
            return 0.0
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _open(self, name: str) -> int:
        # A name may be longer than that of a file.
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.bucket"
        self._files[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._files[name]
