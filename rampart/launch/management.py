"""The door to TorchServe's management: it wants a token, and is shut to web pages.

TorchServe itself listens on a unix socket that only its owner reaches. A browser on this machine
can be made to send requests to loopback, so a request must name this very address as its Host, and
as its Origin if it has one, before its token is looked at. All that a stranger sends is bounded.
"""

import contextlib
import hmac
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Self

BODY_BYTES, HEAD_BYTES = 1 << 20, 1 << 14
READ_SECONDS = 10.0  # for a whole request to arrive
ANSWER_SECONDS = 900.0  # TorchServe loads a model before it answers, if asked to
CONNECTIONS = 16
MESSAGES = {
    400: "This is not a request that TorchServe accepts.",
    401: "A bearer token is required: rampart serve printed how to read it.",
    403: "This address answers only to its own name, and not to web pages.",
    411: "The request needs a Content-Length.",
    413: "The body is too large.",
    503: "TorchServe does not answer, or there are too many requests.",
}


class UnixConnection(HTTPConnection):
    """To TorchServe at the unix socket `path`."""

    def __init__(self, path: Path, timeout: float = ANSWER_SECONDS) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(
    connection: HTTPConnection, target: str, *, method: str, body: bytes, headers: Mapping[str, str]
) -> tuple[int, str, bytes]:
    """Status, content type and body of a connection's answer. Raises OSError, HTTPException."""
    try:
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        kind = answer.headers.get("Content-Type", "application/json")
        return answer.status, kind, answer.read()
    finally:
        connection.close()


class _Bounded:
    """A request as it arrives; LineTooLong where its head is longer than it may be."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, HEAD_BYTES
        self.read, self.close = stream.read, stream.close

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("head")
        return line


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = READ_SECONDS
    server: "Door"

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = _Bounded(self.rfile)
        # A time-out of each read would let who sends a byte now and then stay.
        self._limit = threading.Timer(READ_SECONDS, self._give_up)
        self._limit.start()

    def finish(self) -> None:
        self._limit.cancel()
        super().finish()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def _forward(self) -> None:
        code, length = self._refusal(), self._length()
        # Of a refused one too: an answer to who is still sending would be lost with the connection.
        body = self.rfile.read(max(0, min(length, BODY_BYTES)))
        self._limit.cancel()
        if code or len(body) < length:
            self.send_error(code or 400)
            return
        kept = ("Authorization", "Content-Type")
        headers = {name: self.headers[name] for name in kept if name in self.headers}
        try:
            behind, verb = UnixConnection(self.server.path), self.command
            self._answer(*ask(behind, self.path, method=verb, body=body, headers=headers))
        except ValueError:  # what http.client does not send on
            self.send_error(400)
        except (OSError, HTTPException):
            self.send_error(503)

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = _forward

    def _refusal(self) -> int:
        """The status by which this request is refused, or 0."""
        port = self.server.server_address[1]
        names = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origins = self.headers.get_all("Origin", [])
        hosts = [host.lower() for host in self.headers.get_all("Host", [])]
        if len(hosts) != 1 or hosts[0] not in names:
            return 403
        if any(origin.lower() != f"http://{hosts[0]}" for origin in origins):
            return 403
        given = self.headers.get("Authorization", "").encode()
        if not any(hmac.compare_digest(given, b"Bearer " + key) for key in self.server.tokens()):
            return 401
        if "Transfer-Encoding" in self.headers:
            return 411
        if self._length() < 0 or not self.path.startswith("/"):
            return 400
        return 413 if self._length() > BODY_BYTES else 0

    def _length(self) -> int:
        """Of the body, -1 where it is no number."""
        length = self.headers.get("Content-Length", "0")
        return int(length) if re.fullmatch("[0-9]{1,18}", length) else -1

    def handle_expect_100(self) -> bool:
        """Let a body come only after its head was looked at."""
        code = self._refusal()
        if code:
            self.send_error(code)
            return False
        return super().handle_expect_100()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Say what is wrong as TorchServe would."""
        kind = http.client.responses.get(code, "Error").replace(" ", "") + "Exception"
        error = {
            "code": code,
            "type": kind,
            "message": MESSAGES.get(code, "This is not a valid request."),
        }
        self._answer(code, "application/json", json.dumps(error).encode() + b"\n")

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.close_connection = True
        self.send_response_only(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep nothing of a request."""


class Door(ThreadingHTTPServer):
    """Answers on 127.0.0.1:`port` for TorchServe at the unix socket `path`, in a `with` block.

    `keys` gives the tokens that open it, anew for each request. Raises OSError for a taken port.
    """

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, port: int, path: Path, keys: Callable[[], list[bytes]]) -> None:
        self.path, self.tokens = path, keys
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(("127.0.0.1", port), _Handler)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, name="management", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection where there is a place for it, else close it."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the place back at the end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that broke off is no news, and what it sent is private."""
