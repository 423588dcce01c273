"""The metrics that an operator watches, of one model in one process.

A histogram has the form that it has in Prometheus: counters by upper bound `le`.
"""

import contextlib
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import accumulate

import numpy as np

from rampart.handlers.scenes import SceneVerdict
from rampart.handlers.verdict import Verdict, drift, drift_by_chance

Labels = tuple[str, ...]
# Labels of each metric, besides `model`.
COUNTERS: dict[str, Labels] = {
    "rampart_requests_total": ("status",),
    "rampart_images_total": ("decision",),
    "rampart_errors_total": ("type",),
    "rampart_query_alerts_total": ("response",),
    "rampart_quarantine_dropped_total": (),
}
GAUGES: dict[str, Labels] = {
    "rampart_engine_info": ("device", "precision", "variant"),
    "rampart_false_alarm_rate": (),
    "rampart_drift": (),
    "rampart_drift_limit": (),
    "rampart_heartbeat_seconds": (),
    "rampart_requests_in_flight": (),  # of servers that queue in this process
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
WINDOW, LEAST = 1000, 100  # most and fewest images that drift is measured on

Key = tuple[str, Labels]  # name and label values


def declared() -> dict[str, dict[str, Labels]]:
    """The labels of every metric by name, counters and gauges apart."""
    counters: dict[str, Labels] = {name: ("model", *labels) for name, labels in COUNTERS.items()}
    for name, labels in HISTOGRAMS.items():
        counters[f"{name}_bucket"] = ("model", *labels, "le")
        counters[f"{name}_sum"] = counters[f"{name}_count"] = ("model", *labels)
    gauges = {name: ("model", *labels) for name, labels in GAUGES.items()}
    return {"counter": counters, "gauge": gauges}


class Histogram:
    """How many values there were up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._sum = bounds, 0.0
        self._counts = [0] * (len(bounds) + 1)  # of the values between two bounds

    def add(self, value: float) -> None:
        """Count one value; each request does so several times, so this has to be fast."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def counters(self) -> dict[Labels, float]:
        """Every bucket, the empty ones too, so that each exists from the start; sum; count."""
        names = (*(f"{bound:g}" for bound in self._bounds), "+Inf")
        counts = map(float, accumulate(self._counts))
        out: dict[Labels, float] = {("bucket", name): next(counts) for name in names}
        return out | {("sum",): self._sum, ("count",): out["bucket", "+Inf"]}


def flat(histograms: Mapping[Key, Histogram]) -> dict[Key, float]:
    """Histograms as the counters that they are for Prometheus."""
    return {
        (f"{name}_{part}", (*labels, *bound)): value
        for (name, labels), histogram in histograms.items()
        for (part, *bound), value in histogram.counters().items()
    }


class Metrics:
    """What changed in the metrics of a model since they were last taken.

    `calibration_images` is how many images p-values are ranked among; drift is judged by it.
    """

    def __init__(self) -> None:
        self.calibration_images = 1
        self._values: dict[Key, float] = {}
        self._histograms: dict[Key, Histogram] = {}
        self._p_values: deque[float] = deque(maxlen=WINDOW)
        self._lock = threading.Lock()

    def count(self, name: str, *labels: str, times: int = 1) -> None:
        """Add one to a counter, or more."""
        with self._lock:
            self._values[name, labels] = self._values.get((name, labels), 0) + times

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        with self._lock:
            if (name, labels) not in self._histograms:
                self._histograms[name, labels] = Histogram(BOUNDS[name])
            self._histograms[name, labels].add(value)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name, labels] = value

    def count_verdict(self, verdict: Verdict | SceneVerdict, decision: str | None = None) -> None:
        """Count a judged image, under `decision` where that is not the verdict's own."""
        shadowed = verdict.detected and verdict.decision == "accept"
        own = "shadow" if shadowed else verdict.decision
        self.count("rampart_images_total", decision or own)
        if verdict.failed:  # its p-value says nothing
            self.count("rampart_errors_total", "defence_failure")
            return
        self.observe("rampart_p_value", verdict.p_value)
        with self._lock:
            self._p_values.append(verdict.p_value)

    def take(self) -> dict[Key, float]:
        """What counters grew by since the last call, and gauges that were set."""
        with self._lock:
            changes = self._values | flat(self._histograms)
            self._values, self._histograms = {}, {}
            return changes | self._drift() if changes else {}

    def _drift(self) -> dict[Key, float]:
        count = len(self._p_values)
        if count < LEAST:
            return {}
        return {
            ("rampart_drift", ()): drift(np.array(self._p_values)),
            ("rampart_drift_limit", ()): drift_by_chance(count, self.calibration_images),
        }


class Pulse:
    """Whether a worker is alive: a batch may take STUCK seconds, no more."""

    def __init__(self) -> None:
        self._began: float | None = None  # when the worker took its batch

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While this lasts, the worker answers a batch."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def alive(self) -> bool:
        """Whether the worker waits for a batch, or took its own less than STUCK seconds ago."""
        began = self._began
        return began is None or time.monotonic() - began < STUCK
