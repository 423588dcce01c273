"""Endpoints as contexts, and PNG bodies to send to them; shared by the benchmarks."""

import contextlib
import io
import os
import socket
import subprocess
import sys
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
def endpoint(archive: Path, *options: str, port: int = 0, log: Path | None = None) -> Iterator[str]:
    """Serve `archive` with `rampart serve`; yields the URL of its predictions once it is ready.

    What it says of mistakes goes to `log`, or where ours goes.
    """
    port = port or free_ports()
    command = [sys.executable, "-m", "rampart", "serve", "--archive", str(archive)]
    command += ["--port", str(port), "--device", "cpu", *options]
    with (
        Path(log or os.devnull).open("w") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said if log else None, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if not any("Rampart is ready" in line for line in process.stdout):
                raise RuntimeError(f"no endpoint for {archive}: see the message above")
            yield f"http://127.0.0.1:{port}/predictions/{archive.stem}"
        finally:
            process.terminate()


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
