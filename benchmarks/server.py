"""Endpoints as contexts, and PNG bodies to send to them; shared by the benchmarks."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image


def free_ports() -> int:
    """The first of three consecutive free ports on loopback."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for offset in (1, 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except (OSError, OverflowError):
                continue
            return port


def pack(model: Path, out: Path, *options: str) -> Path:
    """Build the archive of a model folder that `make serve` serves."""
    command = [sys.executable, "-m", "rampart", "archive", str(model), "--out", str(out)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return out


@contextlib.contextmanager
def endpoint(
    archive: Path, *options: str, port: int = 0, log: Path | None = None, **environment: str
) -> Iterator[str]:
    """Serve `archive` with `rampart serve`; yields the URL of its predictions once it is ready.

    What it says of mistakes goes to `log`, or where ours goes. `environment` is added to ours.
    """
    port = port or free_ports()
    command = [sys.executable, "-m", "rampart", "serve", "--archive", str(archive)]
    command += ["--port", str(port), "--device", "cpu", *options]
    with (
        Path(log or os.devnull).open("w") as said,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said if log else None,
            text=True,
            env=os.environ | environment,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if not any("Rampart is ready" in line for line in process.stdout):
                raise RuntimeError(f"no endpoint for {archive}: see the message above")
            scheme = "https" if "--certificate" in options else "http"
            yield f"{scheme}://127.0.0.1:{port}/predictions/{archive.stem}"
        finally:
            process.terminate()


class Redis:
    """A real Redis on loopback, its files in `folder`, running until `stop`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._port = free_ports()
        self._command = ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1"]
        self._command += ["--save", "", "--dir", str(folder), *options]
        self.address = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        """Begin, or begin anew with what its files hold."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port)) as connection,
            ):
                connection.sendall(b"PING\r\n")
                if connection.recv(100).startswith(b"+PONG"):
                    return
            if self._process.poll() is not None:
                raise RuntimeError("redis-server ended: see the message above")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it as its own administrator would."""
        self._process.terminate()
        self._process.wait()


@contextlib.contextmanager
def triton(archive: Path, folder: Path) -> Iterator[str]:
    """Serve `archive` with a real Triton's Python backend, its files in `folder`; yields the URL.

    The server comes from `make .venv/triton`, started as the tests start it.
    """
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from triton_server import Triton

    command = [sys.executable, "-m", "rampart", "export", str(archive), "--backend", "python"]
    made = [*command, "--triton", str(folder / "models")]
    subprocess.run(made, check=True, capture_output=True)
    (work := folder / "work").mkdir()
    server = Triton(folder / "models", work, free_ports())
    try:
        server.wait()
        yield f"{server.root}/v2/models/{archive.stem}/infer"
    finally:
        server.end()


def pngs(images: np.ndarray) -> list[bytes]:
    """Each image of uint8 (N, H, W, 3) as a PNG body."""
    bodies = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        bodies.append(buffer.getvalue())
    return bodies
