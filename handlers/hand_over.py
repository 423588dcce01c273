"""Hands metrics to TorchServe, from which Prometheus reads them.

TorchServe's front end parses one line for each change, so changes are gathered for a second.
TorchServe takes only the metrics that its `metrics_config` declares (deploy/metrics.yaml).
"""

import logging
import threading
import time
from typing import Any

from rampart.handlers.telemetry import GAUGES, Key, Metrics, Pulse, declared

logger = logging.getLogger(__name__)


class HandOver:
    """Gives one worker's metrics to TorchServe's `cache`, if that declares them.

    Counters of several workers add up; a gauge is of the `worker` that is named beside it. Who
    `forgets` gets gauges again each time.
    """

    def __init__(
        self,
        metrics: Metrics,
        cache: Any,
        model: str,
        *,
        worker: str | None = None,
        forgets: bool = False,
    ) -> None:
        kinds = getattr(cache, "cache", {})
        self._sinks = {name: sink for kind in kinds.values() for name, sink in kind.items()}
        self._is_declared = {name for kind in declared().values() for name in kind} <= set(
            self._sinks
        )
        self._metrics, self._model = metrics, model
        self._of_gauges = () if worker is None else (worker,)
        self._forgets = forgets
        self._kept: dict[Key, float] = {}  # gauges
        self.pulse = Pulse()
        if not self._is_declared:
            logger.warning(
                "No Rampart metrics: start TorchServe with metrics_config=deploy/metrics.yaml"
            )

    def run_once(self) -> None:
        """Give TorchServe what has changed since the last call."""
        changes = self._kept | self._metrics.take()
        if self._forgets:
            self._kept = {key: value for key, value in changes.items() if key[0] in GAUGES}
        for (name, labels), value in changes.items():
            if self._is_declared:
                more = self._of_gauges if name in GAUGES else ()
                self._sinks[name].add_or_update(round(value, 6), [self._model, *labels, *more])

    def start(self) -> None:
        """Hand over every second, in a thread that ends with the process."""
        if self._is_declared:
            threading.Thread(target=self._run, daemon=True, name="metrics").start()

    def _run(self) -> None:
        while True:
            if self.pulse.alive():
                self._metrics.set("rampart_heartbeat_seconds", int(time.time()))
            self.run_once()
            time.sleep(1)
