"""The management address: a token opens it, a web page cannot, and little holds it up."""

import contextlib
import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest
import requests
from servers import Server, free_port

from rampart.launch import management
from rampart.launch.client import Client
from rampart.launch.endpoint import Endpoint

KEY = "the-key"
TOKEN = {"Authorization": f"Bearer {KEY}"}


class Echo(BaseHTTPRequestHandler):
    """Answers as TorchServe would, with what it was asked."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = [self.command, self.path, body.decode(), self.headers.get("Authorization")]
        content = json.dumps(seen).encode()
        self.send_response(207)
        self.send_header("Content-Type", "text/x-echo")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_DELETE = do_POST

    def address_string(self) -> str:
        return ""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A door at this port, before a server that echoes."""
    path = tmp_path_factory.mktemp("door") / "s"
    with ThreadingUnixStreamServer(str(path), Echo) as behind:
        threading.Thread(target=behind.serve_forever, args=(0.02,), daemon=True).start()
        port = free_port()
        with management.Door(port, path, lambda: [KEY.encode(), b"another"]):
            yield port
        behind.shutdown()


def test_method_path_query_body_and_answer_go_through(door: int) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = requests.request(
            method, f"http://127.0.0.1:{door}/a/b?c=d%20e", data="body", headers=TOKEN, timeout=5
        )
        assert answer.json() == [method, "/a/b?c=d%20e", "body", f"Bearer {KEY}"]
        assert answer.status_code == 207 and answer.headers["Content-Type"] == "text/x-echo"


@pytest.mark.parametrize("given", [None, "", KEY, "Bearer ", "Bearer wrong", f"Basic {KEY}"])
def test_without_a_token_nothing_is_told(door: int, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for path in ("/", "/models", "/api-description", "/token"):
        answer = requests.post(f"http://127.0.0.1:{door}{path}", "x", headers=headers, timeout=5)
        assert answer.status_code == 401 and answer.json()["code"] == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "127.0.0.1"},
        {"Host": ""},
        {"Origin": "http://rebound.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{door}"},
    ],
)
def test_another_host_or_origin_is_refused_though_the_token_is_right(
    door: int, headers: dict[str, str]
) -> None:
    own = {name: value.format(door=door) for name, value in headers.items()}
    answer = requests.get(f"http://127.0.0.1:{door}/models", headers=TOKEN | own, timeout=5)
    assert answer.status_code == 403 and answer.json()["code"] == 403


def test_its_own_names_are_no_other_host_or_origin(door: int) -> None:
    for name in ("127.0.0.1", "localhost"):
        own = {"Host": f"{name}:{door}", "Origin": f"http://{name}:{door}"}
        answer = requests.get(f"http://127.0.0.1:{door}/models", headers=TOKEN | own, timeout=5)
        assert answer.status_code == 207


def spoken(door: int, request: bytes) -> bytes:
    """What comes back for raw bytes."""
    with socket.create_connection(("127.0.0.1", door), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(4096):
                answer += more
        return answer


def test_what_is_too_large_or_malformed_is_refused(door: int) -> None:
    head = f"POST /x HTTP/1.1\r\nHost: 127.0.0.1:{door}\r\nAuthorization: Bearer {KEY}\r\n"
    for lines, status in (
        (f"Content-Length: {management.BODY_BYTES + 1}\r\nExpect: 100-continue\r\n", 413),
        ("Content-Length: -1\r\n", 400),
        ("Content-Length: 1_0\r\n", 400),
        ("Transfer-Encoding: chunked\r\n", 411),
        (f"X: {'x' * management.HEAD_BYTES}\r\n", 431),
        ("Host: 127.0.0.1\r\n", 403),
    ):
        answer = spoken(door, f"{head}{lines}\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    absolute = f"GET http://127.0.0.1:{door}/x HTTP/1.1\r\n" + head.partition("\r\n")[2] + "\r\n"
    assert spoken(door, absolute.encode()).startswith(b"HTTP/1.1 400 ")
    large = b"x" * management.BODY_BYTES
    answer = requests.post(f"http://127.0.0.1:{door}/x", large, headers=TOKEN, timeout=5)
    assert answer.status_code == 207


def test_who_sends_slowly_or_many_at_once_hold_nobody_up_for_long(
    door: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(management, "READ_SECONDS", 2.0)
    ended: list[float] = []

    def drip() -> None:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", door), timeout=20) as one:
            one.sendall(b"GET /x HTTP/1.1\r\nX: ")
            with contextlib.suppress(OSError):
                while time.monotonic() - began < 10:
                    one.sendall(b"x")
                    time.sleep(0.2)
        ended.append(time.monotonic() - began)

    slow = [threading.Thread(target=drip) for _ in range(2 * management.CONNECTIONS)]
    for one in slow:
        one.start()
    time.sleep(0.5)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{door}/x", headers=TOKEN, timeout=5)
    time.sleep(2.5)
    answer = requests.get(f"http://127.0.0.1:{door}/x", headers=TOKEN, timeout=5)
    assert answer.status_code == 207
    for one in slow:
        one.join()
    assert len(ended) == len(slow) and max(ended) < 5


def test_without_a_server_behind_it_says_so(tmp_path: Path) -> None:
    port = free_port()
    with management.Door(port, tmp_path / "none", lambda: [KEY.encode()]):
        answer = requests.get(f"http://127.0.0.1:{port}/models", headers=TOKEN, timeout=5)
    assert answer.status_code == 503


def test_the_server_wants_its_token_which_only_its_owner_can_read(server: Server) -> None:
    assert requests.get(server.management, timeout=30).status_code == 401
    assert requests.get(server.management, headers=server.token, timeout=30).status_code == 200
    keys = server.work / "key_file.json"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.work.stat().st_mode) == 0o700
    assert len(server.keys["management"]["key"]) >= 32


def test_the_launcher_renews_its_token_when_that_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_archive: Path
) -> None:
    asked = []
    keys = {name: {"key": name} for name in ("management", "API", "inference")}
    (tmp_path / "key_file.json").write_text(json.dumps(keys))

    def ask(connection: object, target: str, **options: object) -> tuple[int, str, bytes]:
        asked.append((target, options["headers"]))
        return 400, "application/json", b'{"type": "InvalidKeyException"}'

    monkeypatch.setattr(management, "ask", ask)
    Client(Endpoint(tiny_archive, token_authorization=True), tmp_path).manage()
    assert asked == [
        ("/models/tiny", {"Authorization": "Bearer management"}),
        ("/token?type=management", {"Authorization": "Bearer API"}),
    ]


def test_where_tmpdir_is_too_long_for_sockets_a_short_folder_is_taken(
    launch: Callable[..., Server], tiny_archive: Path, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    server = launch(tiny_archive, {"TMPDIR": str(long)})
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    function = next(line for line in server.lines if "rampart_key()" in line)
    work = Path(
        function.partition(" /tmp/rampart-")[1].strip()
        + function.split("/tmp/rampart-")[1].split("/")[0]
    )
    assert work.is_dir() and not list(long.iterdir())
    assert server.end() == 0 and not work.exists()
