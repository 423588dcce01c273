"""A real TorchServe on the tiny archive, started as `rampart serve` starts it; a real Redis.

The fixtures here are those of the whole suite, so that one server is enough for a process.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

CODE = """
import json, sys
from pathlib import Path
from rampart.launch.endpoint import Endpoint
from rampart.launch.torchserve import serve
options = json.loads(sys.argv[2])
for name in ("log_folder", "quarantine"):
    if options.get(name):
        options[name] = Path(options[name])
if options.get("tls"):
    options["tls"] = tuple(map(Path, options["tls"]))
sys.exit(serve(Endpoint(Path(sys.argv[1]), **options)))
"""


def free_port() -> int:
    """The first of four neighbouring ports that nobody uses, in this test process's own range."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = 20_000 + worker * 2_000 + os.getpid() % 400 * 4
    for port in range(first, first + 2_000, 4):
        try:
            for offset in range(4):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise OSError("no four neighbouring ports are free")


def certificate_and_key(folder: Path) -> tuple[Path, Path]:
    """c.pem and k.pem of this machine, which nobody has signed but itself."""
    certificate, key = folder / "c.pem", folder / "k.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def peak_memory(pid: int) -> int:
    """The most that a process held in memory since its peak was forgotten, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def forget_peak(pid: int) -> int:
    """Let a process's peak start from what it holds now, in KiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_memory(pid)


@dataclass
class Server:
    """A launcher at work: its process, what it has printed, and where it serves."""

    process: subprocess.Popen[str]
    port: int
    temp: Path
    state: Path  # where logs are kept
    lines: list[str]
    grpc: int = 0

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predictions/tiny"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.port + 1}/models/tiny"

    @property
    def keys(self) -> dict[str, dict[str, str]]:
        """The tokens of this server."""
        return json.loads(next(self.temp.glob("rampart-*/key_file.json")).read_text())

    @property
    def token(self) -> dict[str, str]:
        """The header that opens management."""
        return {"Authorization": f"Bearer {self.keys['management']['key']}"}

    @property
    def work(self) -> Path:
        return next(self.temp.glob("rampart-*"))

    @property
    def logs(self) -> Path:
        return next(self.state.glob("rampart/*"))

    def worker_pids(self) -> list[int]:
        answer = requests.get(self.management, headers=self.token, timeout=30)
        return [worker["pid"] for worker in answer.json()[0]["workers"]]

    def java(self) -> psutil.Process:
        own = psutil.Process(self.process.pid).children()
        (java,) = (child for child in own if child.name() == "java")  # another one guards it
        return java

    def read(self, until: str = "Rampart is ready") -> list[str]:
        """Lines up to the one that begins with `until`, or to the end; waits 5 minutes."""
        assert self.process.stdout is not None
        timer = threading.Timer(300, self.process.kill)
        timer.start()
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(until):
                break
        timer.cancel()
        return self.lines

    def family(self) -> list[psutil.Process]:
        """The launcher and all its descendants."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def finish(self) -> int:
        """Read to the end; the exit code."""
        assert self.process.stdout is not None
        if not self.process.stdout.closed:
            self.read(until="\0")
        return self.process.wait(timeout=60)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, then finish."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.finish()


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Server]]:
    """Starts launchers, each with a temporary folder of its own, and ends what is left of them."""
    servers: list[Server] = []

    def start(
        archive: Path, environment: Mapping[str, str] = {}, code: str = CODE, **options: object
    ) -> Server:
        options.setdefault("port", free_port())
        temp, state = (Path(tempfile.mkdtemp(prefix="t-", dir="/tmp")) for _ in range(2))
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(archive), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"TMPDIR": str(temp), "XDG_STATE_HOME": str(state), "PYTHONPATH": str(Path.cwd())}
            | environment,
            # Under nohup SIGHUP arrives ignored, and the launcher leaves it so.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        port, grpc = (int(str(options.get(name, 0))) for name in ("port", "grpc_port"))
        servers.append(Server(process, port, temp, state, [], grpc))
        return servers[-1]

    yield start
    litter = []
    for server in servers:
        server.end()
        assert server.process.stdout is not None
        server.process.stdout.close()
        litter += server.temp.iterdir()
        shutil.rmtree(server.temp)
        shutil.rmtree(server.state)
    assert litter == []


@pytest.fixture(scope="session")
def server(launch: Callable[..., Server], tiny_archive: Path) -> Server:
    """One server with one worker that all HTTP tests share."""
    port = free_port()
    server = launch(tiny_archive, port=port, grpc_port=port + 3)
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    return server


class Redis:
    """A Redis server of our own, which keeps nothing on disk."""

    def __init__(self, program: str) -> None:
        self._program, self.port = program, free_port()
        self.address = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen([self._program, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self._say(b"PING\r\n").startswith(b"+PONG"):
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.05)

    def flush(self) -> None:
        assert self._say(b"FLUSHALL\r\n").startswith(b"+OK")

    def set(self, name: str, value: str) -> None:
        assert self._say(f"CONFIG SET {name} {value}\r\n".encode()).startswith(b"+OK")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)

    def halt(self) -> None:
        """Let it hang."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _say(self, line: bytes) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(line)
                return connection.recv(100)
        except OSError:
            return b""


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """One Redis server that all tests share, running at the start of each."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server")
    server = Redis(program)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def unpacked(tiny_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of tiny.mar."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(tiny_archive) as content:
        content.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def repack(tiny_archive: Path) -> Callable[[Path, Mapping[str, bytes | None]], Path]:
    """Writes a copy of tiny.mar with some files changed, or left out where None."""

    def write(folder: Path, changes: Mapping[str, bytes | None]) -> Path:
        out = folder / "tiny.mar"
        with zipfile.ZipFile(tiny_archive) as source, zipfile.ZipFile(out, "w") as target:
            content: dict[str, bytes | None] = {
                name: source.read(name) for name in source.namelist()
            }
            for name, data in (content | dict(changes)).items():
                if data is not None:
                    target.writestr(name, data)
        return out

    return write


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Encodes pixels or a Pillow image: encode(image, "PNG", **options)."""

    def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> bytes:
        out = BytesIO()
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(out, format, **options)
        return out.getvalue()

    return encoded


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """A smooth 32x32 RGB picture without colours at the ends of the range."""
    rows, columns = np.mgrid[0:32, 0:32]
    return np.stack([40 + 5 * rows, 60 + 4 * columns, 200 - 3 * rows], -1).astype(np.uint8)


@pytest.fixture(scope="session")
def wait_gone() -> Callable[[list[psutil.Process]], list[psutil.Process]]:
    """Which of the processes still run after a few seconds."""

    def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = [one for one in processes if one.is_running() and one.status() != "zombie"]
            if not left:
                return []
            time.sleep(0.1)
        return left

    return alive
