"""Tokens by name and their rates, from a file that may change while the server runs."""

import hmac
import logging
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

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

    A line that is none lets nobody in, and the log has it: what an operator took out must not stay
    for it, nor may it keep a worker from its start. `read_tokens` is for those who can be told.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = 0.0
        self._state: tuple[int, ...] | None = None
        self._told = ""  # of a file that cannot be read
        self._reload()

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
            if (state := self._stamp()) == self._state:
                return
            self._known, faults = parsed(self._path)
        except (OSError, ValueError) as error:
            if str(error) != self._told:
                logger.error("%s cannot be read, so tokens of before count: %s", self._path, error)
            self._told = str(error)
            return
        self._state, self._told = state, ""
        for fault in faults:
            logger.error("%s", fault)

    def _stamp(self) -> tuple[int, ...]:
        status = self._path.stat()  # whose clock may stand still for some milliseconds
        return status.st_mtime_ns, status.st_ino, status.st_size


def read_tokens(path: Path) -> Known:
    """What a file says; a name's last rate counts. Raises ValueError, which quotes no token."""
    known, faults = parsed(path)
    if faults:
        raise ValueError(faults[0])
    return known


def parsed(path: Path) -> tuple[Known, list[str]]:
    """What the good lines of a file say, and what is wrong with the others."""
    known, faults = Known({}, {}), list[str]()
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match or len(match["token"]) < LEAST:
            faults.append(
                f"{path}, line {number}: write NAME TOKEN, or NAME TOKEN REQUESTS_PER_SECOND BURST."
                f" A token needs {LEAST} characters or more: `openssl rand -hex 16` makes one"
            )
            continue
        rate = _rate(match["rate"], match["burst"]) if match["rate"] else None
        if rate and not (rate.per_second and rate.burst):
            faults.append(f"{path}, line {number}: a rate of 0 allows no request: remove this line")
            continue
        known.names[match["token"].encode()] = match["name"]
        if rate:
            known.rates[match["name"]] = rate
    if not known.names and not faults:
        faults.append(f"{path} contains no token: write lines with a name and a token")
    return known, faults


def _rate(text: str, burst: str | None) -> Rate:
    return Rate(float(text), int(burst) if burst else max(1, math.ceil(float(text))))
