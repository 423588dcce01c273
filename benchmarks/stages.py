"""Where the time of one request goes, within the endpoint and without its HTTP server.

    .venv/bin/python benchmarks/stages.py --plot docs/stages.png

Each shipped model answers its own sample picture, in the form that `make serve` serves, on one
thread. cProfile counts what every stage takes. It slows Python's own code and not the graph, so
the graph's true share is larger; the milliseconds are of the same requests without it. Half a
minute.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import ratios
import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from server import pack

from rampart.handlers.service import Service
from rampart.handlers.types import Incoming
from rampart.hardening.model.files import SAMPLE
from rampart.hardening.model.style import STYLE

MODELS = ("traffic-signs", "blood-cells")
# What a stage is, by the functions that begin it: (file, function). Their order is that of a bar.
STAGES = {
    "decode the picture": {("service.py", "_read"), ("service.py", "_decode")},
    "graph": {("engine.py", "run")},
    "verdict": {("verdict.py", "verdicts"), ("scenes.py", "of")},
    "JSON and metrics": {("service.py", "_answer"), ("service.py", "_reply")},
}
REST = "the rest"
LOOKS = ("#56B4E9", "#0072B2", "#E69F00", "#009E73", "#999999")
NARROW = 0.07  # a share that its number does not fit into


class Course(NamedTuple):
    """What requests to one model took."""

    milliseconds: float  # the median of a request, without the profiler
    shares: dict[str, float]  # of every stage and of the rest, in [0, 1]


def asked(model: Path, folder: Path) -> Callable[[], object]:
    """One request with the model's sample, to what `make serve` would serve."""
    archive = pack(model, folder / f"{model.name}.mar")
    with ZipFile(archive) as content:
        content.extractall(home := folder / model.name)
    settings = yaml.safe_load((home / "model-config.yaml").read_text())["rampart"]
    service = Service.open(home, settings | {"threads": 1})
    body = (model / SAMPLE).read_bytes()
    return lambda: service.answer([Incoming({}, [body])])


def course(ask: Callable[[], object], seconds: float) -> Course:
    """Requests for so many seconds without the profiler, and for as many with it."""
    ask()
    times, end = list[float](), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        ask()
        times.append(time.perf_counter() - began)
    with cProfile.Profile() as profile:
        for _ in times:
            ask()
    return Course(1e3 * float(np.median(times)), shares(pstats.Stats(profile)))


def shares(stats: pstats.Stats) -> dict[str, float]:
    """The share of `answer` that every stage takes, with all that it calls."""
    took = dict.fromkeys(STAGES, 0.0)
    whole = 0.0
    rows = stats.stats  # type: ignore[attr-defined]
    for (file, _, function), (*_, cumulative, _) in rows.items():
        place = (Path(file).name, function)
        whole += cumulative if place == ("service.py", "answer") else 0
        for name, starts in STAGES.items():
            took[name] += cumulative if place in starts else 0
    found = {name: seconds / whole for name, seconds in took.items()}
    return {**found, REST: 1 - sum(found.values())}


def figure(found: dict[str, Course]) -> Figure:
    """A bar a model, its stages side by side, each with its name and share."""
    with rc_context(STYLE):
        drawn = Figure(figsize=(8, 1.2 + 0.75 * len(found)), dpi=125, layout="constrained")
        axes: Axes = drawn.subplots()
        for row, one in enumerate(found.values()):
            left = 0.0
            for (name, share), colour in zip(one.shares.items(), LOOKS, strict=True):
                look = {"color": colour, "edgecolor": "white", "height": 0.62}
                axes.barh(row, share, left=left, label=None if row else name, **look)
                if share >= NARROW:
                    dark = colour in ("#0072B2", "#009E73")
                    place = (left + share / 2, row)
                    words = {"ha": "center", "va": "center", "color": "w" if dark else "k"}
                    axes.annotate(f"{share:.0%}", place, **words)
                left += share
        labels = [f"{name}\n{one.milliseconds:.1f} ms a request" for name, one in found.items()]
        axes.set_yticks(range(len(found)), labels)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xticks=[])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        title = "Where the time of one request goes, on one core without its HTTP server"
        axes.set_title(title, loc="left", fontsize=11, pad=28)
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.99), "ncols": len(LOOKS)}
        axes.legend(**place, handlelength=1, columnspacing=1.4)
    return drawn


def main() -> None:
    """Measure every model, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--seconds", type=float, default=5, help="for each model, twice")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    found: dict[str, Course] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            found[name] = course(asked(options.store / name, Path(scratch)), options.seconds)
            parts = ", ".join(f"{stage} {share:.0%}" for stage, share in found[name].shares.items())
            print(f"{name:14} {found[name].milliseconds:6.2f} ms a request: {parts}")
    print(ratios.machine())
    if options.plot:
        figure(found).savefig(options.plot)


if __name__ == "__main__":
    main()
