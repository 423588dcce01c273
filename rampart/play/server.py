"""Start the playground, and show it in a browser."""

import os
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import uvicorn

from rampart import scenes
from rampart.launch.connection import Connection
from rampart.launch.http import listen
from rampart.model import twin_of
from rampart.models import load
from rampart.play.application import application
from rampart.play.bench import Bench
from rampart.play.pictures import offered
from rampart.play.scene_bench import SceneBench
from rampart.scenes import SceneModel

HOST = "127.0.0.1"


class Server(uvicorn.Server):
    """As uvicorn's; a signal that ends it ends an attack first, for which it would wait."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn calls it."""
        self.config.app.state.end()  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def play(
    folder: Path,
    picture: Path | None = None,
    *,
    twin: Path | None = None,
    rate: float | None = None,
    port: int = 8090,
    browser: bool = True,
) -> None:
    """Show the playground of a model's folder until Ctrl-C; port 0 takes one that is free.

    `picture` stands first among those on offer. Raises LaunchError for a port that is taken.
    """
    with listen(HOST, port) as listener:
        bench = bench_of(folder, twin, rate)
        listener.listen()
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        print(f"The playground of {bench.name}: {address} (Ctrl-C ends it)", flush=True)
        if browser and has_screen(os.environ):
            webbrowser.open(address)
        config = uvicorn.Config(
            application(bench, offered(bench.model, picture)),
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        try:
            Server(config).run([listener])
        except KeyboardInterrupt:  # which uvicorn passes on once it has ended
            return


def bench_of(folder: Path, twin: Path | None, rate: float | None) -> Bench | SceneBench:
    """A folder's model, whatever its task, with its twin. Raises FileNotFoundError, ValueError."""
    model = load(folder)
    if isinstance(model, SceneModel):
        return SceneBench(model, scenes.twin_of(model, twin), rate=rate)
    return Bench(model, twin_of(model, twin), rate=rate)


def has_screen(environment: Mapping[str, str]) -> bool:
    """Whether a browser would have a window: one in the terminal would hide what we print."""
    return sys.platform != "linux" or any(
        environment.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY")
    )
