"""Whether a served model still has a worker that can answer, or one that is about to.

TorchServe gives up a worker that has failed to start for `maxRetryTimeoutInSec`, and lives on while
requests hang. So the launcher asks for the model's description from time to time.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERVAL = 2.0  # seconds between two looks
GPU_INTERVAL = 10.0  # there TorchServe starts nvidia-smi for each description
MARGIN = 30.0  # seconds beyond those for which TorchServe itself tries
RETRY = 60.0  # seconds for which it does, as long as it has not said

Describe = Callable[[], tuple[int, bytes]]


class Watch:
    """Looks at a model now and then; `describe` gives the status and body of its description."""

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._good = self._looked = time.monotonic()
        self._interval, self._retry = INTERVAL, RETRY

    def failure(self) -> str | None:
        """Why the model answers no more, if it does not; it is asked no oftener than needed."""
        now = time.monotonic()
        if now - self._looked < self._interval:
            return None
        status, body = self._describe()
        self._looked = now = time.monotonic()
        try:
            model: dict[str, Any] = json.loads(body)[0] if status == 200 else {}
        except (ValueError, LookupError):
            model = {}
        workers = model.get("workers", [])
        self._retry = model.get("maxRetryTimeoutInSec", self._retry)
        self._interval = GPU_INTERVAL if any(one["gpu"] for one in workers) else INTERVAL
        ready = any(one["status"] == "READY" for one in workers)
        unwanted = status == 404 or model.get("minWorkers") == 0  # as the operator wishes
        if ready or unwanted:
            self._good = now
        silent = now - self._good
        if silent <= self._retry + MARGIN or any(_runs(one["pid"]) for one in workers):
            return None
        if not model:
            return f"TorchServe has not answered the launcher for {silent:.0f} s"
        return f"no worker has been ready for {silent:.0f} s"


def _runs(pid: int) -> bool:
    """Whether a worker's process is there: it may start for minutes, as TensorRT builds a plan."""
    try:
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
