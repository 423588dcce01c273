"""The figures of all workers in Prometheus's format; each worker leaves its own in a folder."""

import json
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from rampart.handlers.telemetry import COUNTERS, GAUGES, HISTOGRAMS, Key, Metrics

Figures = dict[tuple[str, str, tuple[str, ...]], float]  # by model, name and labels
# How gauges of several workers become one: where nothing is said, the smallest is the worst.
TOGETHER: dict[str, Callable[[float, float], float]] = {
    "rampart_requests_in_flight": operator.add,
}

DRIFT, LIMIT = "rampart_drift", "rampart_drift_limit"  # of one worker, for they belong together


class Exposition:
    """One worker's view: its own figures as they stand, the others' as of a second ago."""

    KIND = CONTENT_TYPE_LATEST

    def __init__(self, metrics: Sequence[tuple[str, Metrics]], folder: Path) -> None:
        self._metrics, self._folder = metrics, folder
        # What each has had since the start; `take` gives what is new.
        self._known: list[dict[Key, float]] = [{} for _ in metrics]
        self._file = folder / f"{os.getpid()}.json"
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def save(self) -> None:
        """Leave this worker's figures where the others find them."""
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps([[*key, value] for key, value in self._own().items()]))
        draft.replace(self._file)

    def text(self) -> bytes:
        """Every figure, as Prometheus asks for them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client calls it."""
        workers = [self._own()]
        workers += [_left(file) for file in self._folder.glob("*.json") if file != self._file]
        total: Figures = {}
        for figures in workers:
            for key, value in figures.items():
                _add(total, key, value)
        total |= _drift(workers)
        families: dict[str, Metric] = {}
        for (model, name, labels), value in total.items():
            kind, family, names = _declared(name)
            metric = families.setdefault(family, Metric(family, family, kind))
            metric.add_sample(name, dict(zip(names, (model, *labels), strict=True)), value)
        return iter(families.values())

    def _own(self) -> Figures:
        total: Figures = {}
        for (model, metrics), known in zip(self._metrics, self._known, strict=True):
            for (name, labels), value in metrics.take().items():
                old = 0.0 if name in GAUGES else known.get((name, labels), 0.0)
                known[name, labels] = old + value
            for (name, labels), value in known.items():
                _add(total, (model, name, labels), value)
        return total


def _left(file: Path) -> Figures:
    """What another worker has left: counters of one that has ended count on, its gauges do not."""
    alive = Path(f"/proc/{file.stem}").exists()
    return {
        (model, name, tuple(labels)): value
        for model, name, labels, value in json.loads(file.read_text())
        if alive or name not in GAUGES
    }


def _drift(workers: Sequence[Figures]) -> Figures:
    """Each model's drift with its limit, of the worker that is furthest beyond its own."""
    worst: dict[str, tuple[float, Figures]] = {}
    for figures in workers:
        for model, name, labels in figures:
            if name == DRIFT:
                keys = ((model, one, labels) for one in (DRIFT, LIMIT))
                pair = {key: figures[key] for key in keys if key in figures}
                beyond = figures[model, DRIFT, labels] / pair.get((model, LIMIT, labels), 1.0)
                worst[model] = max(
                    worst.get(model, (-1.0, {})), (beyond, pair), key=lambda it: it[0]
                )
    return {key: value for _, pair in worst.values() for key, value in pair.items()}


def _add(total: Figures, key: tuple[str, str, tuple[str, ...]], value: float) -> None:
    _, name, _ = key
    together = TOGETHER.get(name, min) if name in GAUGES else operator.add
    total[key] = together(total[key], value) if key in total else value


def _declared(name: str) -> tuple[str, str, tuple[str, ...]]:
    """Kind, family and label names of a figure."""
    if name in COUNTERS:
        return "counter", name.removesuffix("_total"), ("model", *COUNTERS[name])
    if name in GAUGES:
        return "gauge", name, ("model", *GAUGES[name])
    family, _, part = name.rpartition("_")
    bound = ("le",) if part == "bucket" else ()
    return "histogram", family, ("model", *HISTOGRAMS[family], *bound)
