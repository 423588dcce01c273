"""KServe's real ModelServer with an archive as its model, in an environment of its own."""

import os
import sys
from pathlib import Path

from servers import free_port
from started import Started

PYTHON = Path(sys.prefix) / "kserve" / "bin" / "python"


class KServe(Started):
    """A process of rampart.kserve."""

    def __init__(self, archive: Path, folder: Path, *options: str, **variables: str) -> None:
        port = free_port()
        self.grpc = port + 1
        words = [PYTHON, "-m", "rampart.kserve", "--archive", archive]
        words += ["--http_port", str(port), "--grpc_port", str(self.grpc), *options]
        own = os.environ | {"PYTHONPATH": str(Path.cwd()), "TMPDIR": str(folder)} | variables
        super().__init__(words, port, folder, own)
