"""Calls on TorchServe from the machine that it runs on, with the tokens that its key file holds."""

import json
import secrets
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from rampart.launch import logs, management
from rampart.launch.asking import trust_in
from rampart.launch.endpoint import Endpoint

Connect = Callable[[], HTTPConnection]
SOCKET, KEYS = "management.sock", "key_file.json"


class Client:
    """Asks an endpoint whose socket and key file are in the folder `work`."""

    def __init__(self, endpoint: Endpoint, work: Path) -> None:
        self.endpoint, self.socket, self.key_file = endpoint, work / SOCKET, work / KEYS
        if not endpoint.token_authorization:  # else TorchServe writes that file
            with open(self.key_file, "x", opener=logs.private) as file:
                json.dump({"management": {"key": secrets.token_urlsafe(24)}}, file)

    def keys(self) -> dict[str, str]:
        """The tokens by their use. Raises OSError or ValueError before TorchServe wrote them."""
        return {use: entry["key"] for use, entry in json.loads(self.key_file.read_text()).items()}

    def manager_keys(self) -> list[bytes]:
        """Those that open the management address; none before TorchServe wrote them."""
        try:
            keys = self.keys()
        except (OSError, ValueError):
            return []
        return [keys[use].encode() for use in ("management", "API") if use in keys]

    def manage(
        self, query: str = "", *, method: str = "GET", timeout: float = 60
    ) -> tuple[int, bytes]:
        """Status and body of one call on the model's management; 0 without an answer."""
        behind = partial(management.UnixConnection, self.socket, timeout)
        target = f"/models/{self.endpoint.name}{query}"
        status, body = self._ask(behind, target, "management", method=method)
        renewable = self.endpoint.token_authorization and status == 400
        if renewable and b"InvalidKeyException" in body:
            # The token's time is up, also for those who read it in the file: make the next.
            self._ask(behind, "/token?type=management", "API")
        return status, body

    def predict(self, picture: bytes) -> int:
        """Status of one prediction on a PNG; 0 without an answer."""
        use = "inference" if self.endpoint.token_authorization else ""
        target = f"/predictions/{self.endpoint.name}"
        return self._ask(self._connection, target, use, method="POST", body=picture)[0]

    def _ask(
        self, connect: Connect, target: str, use: str, *, method: str = "GET", body: bytes = b""
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": "image/png"} if body else {}
        try:
            if use:
                headers["Authorization"] = f"Bearer {self.keys()[use]}"
            send = partial(management.ask, connect(), target, method=method, headers=headers)
            status, _, answer = send(body=body)
            return status, answer
        except (OSError, ValueError, HTTPException):
            return 0, b""

    def _connection(self) -> HTTPConnection:
        """To the predictions."""
        host, port = self.endpoint.local_host, self.endpoint.port
        if not self.endpoint.tls:
            return HTTPConnection(host, port, timeout=60)
        trust = trust_in(self.endpoint.tls[0])
        return HTTPSConnection(host, port, timeout=60, context=trust)
