"""Tokens by name and their rates, from a file that may change while the server runs."""

import hmac
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

LEAST = 16  # characters of a token
LINE = re.compile(
    r"(?P<name>[\w.-]{1,64})\s+(?P<token>[!-~]+)"
    r"(\s+(?P<rate>[0-9]{1,6}(\.[0-9]{1,3})?)(\s+(?P<burst>[0-9]{1,6}))?)?"
)
AGE = 1.0  # seconds after which the file is looked at again


class Rate(NamedTuple):
    """How often one may ask: on the long run, and how often at once after a rest."""

    per_second: float
    burst: int


class Known(NamedTuple):
    """Names by token, and the rates of those that have one, by name."""

    names: dict[bytes, str]
    rates: dict[str, Rate]


class Tokens:
    """The lines `NAME TOKEN [RATE [BURST]]` of a file. A change counts within a second.

    Raises ValueError for a file without a token, or with a line that is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = 0.0
        self._state: tuple[int, ...] | None = None
        self._known = Known({}, {})
        self._load()

    def holder(self, authorization: bytes) -> str | None:
        """The name of who sent this header; the time that takes tells nothing of the tokens."""
        if time.monotonic() - self._looked > AGE:
            self._reload()
        scheme, _, token = authorization.partition(b" ")
        name = None
        for known, holder in self._known.names.items():
            if hmac.compare_digest(known, token.strip()) and scheme.lower() == b"bearer":
                name = holder
        return name

    def rate(self, name: str) -> Rate | None:
        """How often all requests of a name may come, if that is bounded."""
        return self._known.rates.get(name)

    def _reload(self) -> None:
        """Read the file anew where it has changed; one that cannot be read changes nothing."""
        self._looked = time.monotonic()
        try:
            if self._stamp() != self._state:
                self._load()
        except (OSError, ValueError):
            return

    def _stamp(self) -> tuple[int, ...]:
        status = self._path.stat()  # whose clock may stand still for some milliseconds
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _load(self) -> None:
        state = self._stamp()
        self._known = read_tokens(self._path)
        self._state, self._looked = state, time.monotonic()


def read_tokens(path: Path) -> Known:
    """What a file says; a name's last rate counts. Raises ValueError, which quotes no token."""
    known = Known({}, {})
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match or len(match["token"]) < LEAST:
            raise ValueError(
                f"{path}, line {number}: write NAME TOKEN, or NAME TOKEN REQUESTS_PER_SECOND BURST."
                f" A token needs {LEAST} characters or more: `openssl rand -hex 16` makes one"
            )
        known.names[match["token"].encode()] = match["name"]
        if match["rate"]:
            known.rates[match["name"]] = _rate(match["rate"], match["burst"], path, number)
    if not known.names:
        raise ValueError(f"{path} contains no token: write lines with a name and a token")
    return known


def _rate(text: str, burst: str | None, path: Path, number: int) -> Rate:
    rate = Rate(float(text), int(burst) if burst else max(1, math.ceil(float(text))))
    if not (rate.per_second and rate.burst):
        raise ValueError(f"{path}, line {number}: a rate of 0 allows no request: remove this line")
    return rate
