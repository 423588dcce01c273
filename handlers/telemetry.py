"""What an operator watches: figures of this worker, handed to TorchServe, which Prometheus asks.

Each figure that changes is a line that TorchServe's front end parses, so they are gathered and
handed over once a second. A histogram is kept as Prometheus keeps it: counters by upper bound `le`.
TorchServe takes the metrics that its `metrics_config` declares (deploy/metrics.yaml), no others.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from handlers.verdict import Verdict, drift, drift_by_chance

logger = logging.getLogger(__name__)

# Labels of each, besides `model`.
Labels = tuple[str, ...]
COUNTERS: dict[str, Labels] = {
    "rampart_requests_total": ("status",),
    "rampart_images_total": ("decision",),
    "rampart_errors_total": ("type",),
    "rampart_query_alerts_total": ("response",),
}
GAUGES: dict[str, Labels] = {
    "rampart_engine_info": ("device", "precision", "variant"),
    "rampart_false_alarm_rate": (),
    "rampart_drift": (),
    "rampart_drift_limit": (),
    "rampart_heartbeat_seconds": (),
    "rampart_query_store_up": (),
    "rampart_quarantine_up": (),
}
HISTOGRAMS: dict[str, Labels] = {
    "rampart_p_value": (),
    "rampart_batch_images": (),
    "rampart_stage_seconds": ("stage",),
}
BOUNDS = {
    "rampart_p_value": (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "rampart_batch_images": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    "rampart_stage_seconds": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
}
STUCK = 30.0  # seconds that a batch may take before its worker counts as hung
WINDOW, LEAST = 1000, 100  # images that drift is told of, and the fewest that it is told of

Key = tuple[str, Labels]  # name and label values


def declared() -> dict[str, dict[str, Labels]]:
    """The labels of every metric by name, by TorchServe's kind."""
    counters: dict[str, Labels] = {name: ("model", *labels) for name, labels in COUNTERS.items()}
    for name, labels in HISTOGRAMS.items():
        counters[f"{name}_bucket"] = ("model", *labels, "le")
        counters[f"{name}_sum"] = counters[f"{name}_count"] = ("model", *labels)
    gauges = {name: ("model", *labels) for name, labels in GAUGES.items()}
    return {"counter": counters, "gauge": gauges}


def buckets(values: list[float], bounds: tuple[float, ...]) -> dict[Labels, float]:
    """What the counters of a histogram grow by: each bucket, of which none is left out, or it would
    not exist until it fills; the sum; the count."""
    array = np.array(values)
    out: dict[Labels, float] = {
        ("bucket", f"{bound:g}"): float((array <= bound).sum()) for bound in bounds
    }
    return out | {
        ("bucket", "+Inf"): float(len(array)),
        ("sum",): float(array.sum()),
        ("count",): float(len(array)),
    }


class Metrics:
    """The figures of one worker. `cache` is TorchServe's; without our metrics in it, none is kept.

    `images` is how many calibration images p-values are ranked among.
    """

    def __init__(self, cache: Any, model: str, images: int) -> None:
        known = getattr(cache, "cache", {})
        self._sinks = {name: sink for kind in known.values() for name, sink in kind.items()}
        self.on = {name for kind in declared().values() for name in kind} <= set(self._sinks)
        self._model, self._images = model, images
        self._counts: dict[Key, float] = {}
        self._gauges: dict[Key, float] = {}
        self._observed: dict[Key, list[float]] = {}
        self._p_values: deque[float] = deque(maxlen=WINDOW)
        self._lock = threading.Lock()
        self._since: float | None = None  # when the batch at work began
        if not self.on:
            logger.warning(
                "No Rampart metrics: start TorchServe with metrics_config=deploy/metrics.yaml"
            )

    def count(self, name: str, *labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            if self.on:  # or nobody would ever take it
                self._counts[name, labels] = self._counts.get((name, labels), 0) + 1

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        with self._lock:
            if self.on:
                self._observed.setdefault((name, labels), []).append(value)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            if self.on:
                self._gauges[name, labels] = value

    def judged(self, verdict: Verdict, decision: str | None = None) -> None:
        """Count an image that got a verdict, under `decision` if that was not the verdict's own."""
        shadowed = verdict.detected and verdict.decision == "accept"
        own = "shadow" if shadowed else verdict.decision
        self.count("rampart_images_total", decision or own)
        if verdict.failed:  # then its p-value says nothing
            self.count("rampart_errors_total", "defence_failure")
            return
        self.observe("rampart_p_value", verdict.p_value)
        with self._lock:
            self._p_values.append(verdict.p_value)

    def hand_over(self) -> None:
        """Give TorchServe what has changed since."""
        with self._lock:
            changed, observed = self._counts | self._gauges, self._observed
            recent = np.array(self._p_values)
            self._counts, self._gauges, self._observed = {}, {}, {}
        for (name, labels), values in observed.items():
            for (part, *bound), value in buckets(values, BOUNDS[name]).items():
                changed[f"{name}_{part}", (*labels, *bound)] = value
        if changed and len(recent) >= LEAST:
            changed["rampart_drift", ()] = drift(recent)
            changed["rampart_drift_limit", ()] = drift_by_chance(len(recent), self._images)
        for (name, labels), value in changed.items():
            self._sinks[name].add_or_update(round(value, 6), [self._model, *labels])

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While this lasts, and for no more than STUCK seconds, the worker counts as alive."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def alive(self) -> bool:
        """Whether no batch has been at work for longer than STUCK seconds."""
        since = self._since
        return since is None or time.monotonic() - since < STUCK

    def start(self) -> None:
        """Hand over once a second, in a thread that ends with the process."""
        if self.on:
            threading.Thread(target=self._run, daemon=True, name="metrics").start()

    def _run(self) -> None:
        while True:
            if self.alive():
                self.set("rampart_heartbeat_seconds", int(time.time()))
            self.hand_over()
            time.sleep(1)
