"""KServe's real ModelServer with an archive as its model, in an environment of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import requests
from servers import free_port

PYTHON = Path(sys.prefix) / "kserve" / "bin" / "python"


class KServe:
    """A process of rampart.kserve."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.port = free_port()
        self.grpc = self.port + 1
        self.root = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        words = [PYTHON, "-m", "rampart.kserve", "--archive", archive]
        words += ["--http_port", str(self.port), "--grpc_port", str(self.grpc)]
        with self._log.open("w") as log:
            own = os.environ | {"PYTHONPATH": str(Path.cwd()), "TMPDIR": str(folder)}
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env=own)

    def wait(self) -> None:
        """Return when it is ready."""
        end = time.monotonic() + 120
        while True:
            try:
                if requests.get(f"{self.root}/v2/health/ready", timeout=5).ok:
                    return
            except requests.ConnectionError:
                pass
            assert self._process.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.2)

    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text()

    def finish(self) -> int:
        """Its exit code, once it ends by itself."""
        return self._process.wait(60)

    def end(self) -> int:
        """Its exit code after SIGTERM."""
        self._process.terminate()
        return self.finish()
