"""Who may ask: tokens by name, from a file that may change while the server runs."""

import hmac
import re
import time
from pathlib import Path

from rampart.handlers.errors import ImageError

NO_TOKEN = ImageError(
    401, "no_token", "send a token that this endpoint knows: Authorization: Bearer TOKEN"
)
LEAST = 16  # characters of a token
LINE = re.compile(r"(?P<name>[\w.-]{1,64})\s+(?P<token>[!-~]+)")
AGE = 1.0  # seconds after which the file is looked at again


class Tokens:
    """The lines `NAME TOKEN` of a file. A line that is added or taken away counts within a second.

    Raises ValueError for a file without a token, or with a line that is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = 0.0
        self._state: tuple[int, int] | None = None
        self._holders: dict[bytes, str] = {}
        self._load()

    def holder(self, authorization: bytes) -> str | None:
        """The name of who sent this header; the time that takes tells nothing of the tokens."""
        if time.monotonic() - self._looked > AGE:
            self._reload()
        scheme, _, token = authorization.partition(b" ")
        name = None
        for known, holder in self._holders.items():
            if hmac.compare_digest(known, token.strip()) and scheme.lower() == b"bearer":
                name = holder
        return name

    def _reload(self) -> None:
        """Read the file anew where it has changed; one that cannot be read changes nothing."""
        self._looked = time.monotonic()
        try:
            if self._stamp() != self._state:
                self._load()
        except (OSError, ValueError):
            return

    def _stamp(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_ino

    def _load(self) -> None:
        state = self._stamp()
        self._holders = read_tokens(self._path)
        self._state, self._looked = state, time.monotonic()


def read_tokens(path: Path) -> dict[bytes, str]:
    """Names by token. Raises ValueError of one line that does not quote a token."""
    holders = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match or len(match["token"]) < LEAST:
            raise ValueError(
                f"{path}, line {number}: write a name and a token of {LEAST} characters or more,"
                " as `openssl rand -hex 16` makes one"
            )
        holders[match["token"].encode()] = match["name"]
    if not holders:
        raise ValueError(f"{path} holds no token: write lines of a name and a token")
    return holders
