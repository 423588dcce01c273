"""A real HTTP server of ours on the tiny archive."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Server

CODE = """
import json, sys
from pathlib import Path
from rampart.launch.http import Front, serve
options = json.loads(sys.argv[2])
for name in ("tokens", "tls", "quarantine"):
    if options.get(name):
        value = options[name]
        options[name] = Path(value) if isinstance(value, str) else tuple(map(Path, value))
sys.exit(serve(Front(archives=tuple(map(Path, sys.argv[1].split(":"))), **options)))
"""


@pytest.fixture(scope="session")
def start(launch: Callable[..., Server]) -> Callable[..., Server]:
    """Starts servers of one archive, or of several."""

    def begin(*archives: Path, **options: object) -> Server:
        return launch(Path(os.pathsep.join(map(str, archives))), code=CODE, **options)

    return begin


@pytest.fixture(scope="session")
def front(start: Callable[..., Server], tiny_archive: Path) -> Server:
    """One server with two workers that most tests share."""
    server = start(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(), server.lines
    return server
