"""The certificate that a server of ours shows: a copy, which changes once a new pair fits together.

Workers read the copy. So a pair that is half replaced or away stops nobody, whenever a worker has
to begin anew.
"""

import ssl
from pathlib import Path

from rampart.launch.archives import stamp_of
from rampart.launch.console import say
from rampart.launch.endpoint import LaunchError


class Certificate:
    """A certificate chain and its key, PEM, in one file that only this user reads.

    Raises LaunchError where the two cannot be read, do not belong together or cannot be copied.
    """

    def __init__(self, pair: tuple[Path, Path], folder: Path) -> None:
        self._pair, self.copy = pair, folder / "certificate.pem"
        self._seen = self._served = [stamp_of(path) for path in pair]
        if failure := self._take():
            raise LaunchError(failure)

    def renew(self) -> bool:
        """Take up a pair that has changed since; whether there is one. Call it once a second.

        One that does not fit together is told and left.
        """
        before, self._seen = self._seen, [stamp_of(path) for path in self._pair]
        if self._seen != before or self._seen == self._served or None in self._seen:
            return False
        self._served = self._seen
        if failure := self._take():
            say(f"error: {failure}: the old certificate stays in service")
            return False
        return True

    def _take(self) -> str | None:
        """Copy the pair; why that cannot be, if so."""
        chain, key = self._pair
        draft = self.copy.with_suffix(".new")
        try:
            draft.touch(0o600)
            # One file is replaced at once: no worker finds a chain with another one's key.
            draft.write_bytes(key.read_bytes() + b"\n" + chain.read_bytes())
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(chain, key, password="")  # or it would ask for one
            context.load_cert_chain(draft, password="")  # one may have changed before it was read
            draft.replace(self.copy)
        except (OSError, ValueError) as error:
            draft.unlink(missing_ok=True)
            return f"{chain} and {key} are not a PEM certificate chain and its key: {error}"
        return None
