"""A server of somebody else's, as a process that answers Open Inference's health check."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests


class Started:
    """A process of `words`, whose HTTP is on `port`; what it says goes into `folder`."""

    def __init__(
        self, words: Sequence[object], port: int, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.port, self.root, self._log = port, f"http://127.0.0.1:{port}", folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                list(map(str, words)), stdout=log, stderr=log, cwd=folder, env=dict(environment)
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, verify: bool | str = True) -> None:
        """Return when it is ready."""
        end = time.monotonic() + 120
        while True:
            try:
                if requests.get(f"{self.root}/v2/health/ready", timeout=5, verify=verify).ok:
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

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def end(self) -> int:
        """Its exit code after SIGTERM."""
        self.terminate()
        return self.finish()
