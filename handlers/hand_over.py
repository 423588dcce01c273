"""Figures on their way to TorchServe, which Prometheus asks.

Each figure that changes is a line that TorchServe's front end parses, so they are gathered and
handed over once a second. TorchServe takes the metrics that its `metrics_config` declares
(deploy/metrics.yaml), no others.
"""

import logging
import threading
import time
from typing import Any

from rampart.handlers.telemetry import Metrics, Pulse, declared

logger = logging.getLogger(__name__)


class HandOver:
    """Gives one worker's figures to TorchServe's `cache`; where that lacks our metrics, none."""

    def __init__(self, metrics: Metrics, cache: Any, model: str) -> None:
        kinds = getattr(cache, "cache", {})
        self._sinks = {name: sink for kind in kinds.values() for name, sink in kind.items()}
        self._on = {name for kind in declared().values() for name in kind} <= set(self._sinks)
        self._metrics, self._model = metrics, model
        self.pulse = Pulse()
        if not self._on:
            logger.warning(
                "No Rampart metrics: start TorchServe with metrics_config=deploy/metrics.yaml"
            )

    def run_once(self) -> None:
        """Give TorchServe what has changed since."""
        for (name, labels), value in self._metrics.take().items():
            if self._on:
                self._sinks[name].add_or_update(round(value, 6), [self._model, *labels])

    def start(self) -> None:
        """Hand over once a second, in a thread that ends with the process."""
        if self._on:
            threading.Thread(target=self._run, daemon=True, name="metrics").start()

    def _run(self) -> None:
        while True:
            if self.pulse.alive():
                self._metrics.set("rampart_heartbeat_seconds", int(time.time()))
            self.run_once()
            time.sleep(1)
