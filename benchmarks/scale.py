"""What throughput depends on: workers, batch size, image size, detectors; and Python's own share.

    .venv/bin/python benchmarks/scale.py --plot scale.png

workers, batch   the `full` archive in fp32, over HTTP, 32 clients (needs `wrk`)
size, detectors  graphs in process, batches of 8; sizes with untrained weights
Python           milliseconds that the handler takes beside the graph, by batch: decoding, verdict,
                 JSON, metrics; at most 0.5 ms a request is wanted; of the archive that `make serve`
                 serves, and of `full`, whose graph leaves less in the CPU's caches
Sides take turns. About 5 minutes on 2 cores.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import ratios
import torch
import yaml
from endpoint import DONE, SCRIPT, load_with_wrk
from engines import timed
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from server import endpoint, pack, pngs
from tqdm import tqdm
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from rampart.export.archive import archive
from rampart.export.build import sample_crops
from rampart.export.to_onnx import to_onnx
from rampart.handlers.defended import DefendedHandler
from rampart.handlers.engine import Engine
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.detectors import FULL
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.purifier import Purifier
from rampart.hardening.model.style import STYLE
from rampart.launch.java import METRICS

WORKERS, BATCHES, SIZES = (1, 2), (1, 2, 8, 32), (32, 64, 96, 128, 224)
CLIENTS, BATCH = 32, 8

Rate = Callable[[], float]
Panel = dict[int, Rate]


def served(model: Path, folder: Path, stack: ExitStack, seconds: int) -> dict[str, Panel]:
    """Requests/s by workers, and by TorchServe's batch size."""
    for number, body in enumerate(pngs(sample_crops(32).numpy()), 1):
        (folder / str(number)).write_bytes(body)
    load = SCRIPT.replace("COUNT", str(number)).replace("FOLDER", str(folder))
    script = folder / "load.lua"
    script.write_text(load.replace("KIND", "image/png") + DONE)

    def side(name: str, *options: str, **settings: int) -> Rate:
        packed = folder / f"{name}.mar"
        archive(model, packed, settings=settings)
        url = stack.enter_context(endpoint(packed, *options))
        load_with_wrk(url, script, CLIENTS, 3)
        return lambda: load_with_wrk(url, script, CLIENTS, seconds).rate

    most = max(WORKERS)
    return {
        "workers": {n: side(f"w{n}", "--workers", str(n), maxWorkers=most) for n in WORKERS},
        "batch": {n: side(f"b{n}", batchSize=n) for n in BATCHES},
    }


def in_process(model: Path, folder: Path, seconds: float) -> dict[str, Panel]:
    """Images/s of graphs by image size, and by number of detectors."""
    known, _ = pipelines.load(model / "weights.safetensors", "full")
    assert known.purifier is not None
    config, purifier = known.classifier.config, known.purifier.config

    def side(name: str, made: DefendedClassifier, size: int) -> Rate:
        engine = Engine(to_onnx(made.eval().requires_grad_(False), folder / f"{name}.onnx"))
        images = torch.randint(0, 256, (BATCH, size, size, 3), dtype=torch.uint8).numpy()
        return lambda: timed(lambda batch: engine.run(images[:batch]), BATCH, seconds)

    def sized(size: int) -> DefendedClassifier:
        classifier = Classifier(config._replace(image_size=size))
        return DefendedClassifier(classifier, Purifier(purifier), FULL)

    def watched(count: int) -> DefendedClassifier:
        made = DefendedClassifier(known.classifier, known.purifier, FULL[:count])
        made.detectors.take(known.detectors)
        return made

    counts = range(1, len(FULL) + 1)
    return {
        "size": {size: side(f"s{size}", sized(size), size) for size in SIZES},
        "detectors": {n: side(f"d{n}", watched(n), config.image_size) for n in counts},
    }


def beside_the_graph(packed: Path) -> Panel:
    """Milliseconds a request that the handler of an archive takes beside the graph, by batch."""
    place = packed.with_suffix("")
    with ZipFile(packed) as mar:
        mar.extractall(place)
    settings = yaml.safe_load((place / "model-config.yaml").read_text())
    figures = MetricsCacheYamlImpl(str(METRICS))
    figures.initialize_cache()
    logging.disable(logging.INFO)  # a worker's lines go to Java
    manifest = {"model": {"modelVersion": "1.0"}}
    made = Context("m", str(place), manifest, 8, None, "0.12.0", model_yaml_config=settings)
    made.metrics = figures
    handler, bodies = DefendedHandler(), pngs(sample_crops(32, count=max(BATCHES)).numpy())
    handler.initialize(made)
    graph, spent = handler._service._engine.run, [0.0]

    def run(images: NDArray[np.uint8]) -> object:
        began = time.perf_counter()
        try:
            return graph(images)
        finally:
            spent[0] += time.perf_counter() - began

    handler._service._engine.run = run

    def took(batch: int) -> float:
        data = [{"body": body} for body in bodies[:batch]]
        rounds, spent[0], began = 100, 0.0, time.perf_counter()
        for _ in range(rounds):
            made.request_processor = [RequestProcessor({"Content-Type": "image/png"}) for _ in data]
            handler.handle(data, made)
        return (time.perf_counter() - began - spent[0]) / rounds / batch * 1e3

    return {batch: partial(took, batch) for batch in BATCHES}


class Axis(NamedTuple):
    """What a panel shows."""

    title: str
    x: str
    y: str


# What has few sides, or sides that are all alike, is printed and not drawn.
AXES = {
    "batch": Axis("Do batches help?", "largest batch of TorchServe", "requests/s (more is better)"),
    "size": Axis(
        "What do pixels cost?",
        "pixels a side (from 96 on, the network first shrinks the picture)",
        "images/s (more is better)",
    ),
    "Python": Axis(
        "How long does Python take?", "requests in a batch", "ms a request (less is better)"
    ),
}
TARGET = 0.5  # ms of Python a request
LINES = {  # (colour, marker, line, name) where a panel has two
    "Python": ("#0072B2", "o", "-", "lean int8, as served"),
    "Python, full": ("#D55E00", "s", "--", "full fp32"),
}


def picture(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Draw the panels of AXES, as a PNG: medians, and bars from the least to the most."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), dpi=120, layout="constrained")
        panels = dict(zip(AXES, figure.subplots(1, 3).flat, strict=True))
        said = (
            "Left and middle: full in fp32, the middle with untrained weights and without a server."
        )
        figure.supxlabel(f"{said} Points: medians of the rounds; bars: extremes.", fontsize=9)
        for name, sides in found.items():
            if not (axes := panels.get(name.partition(",")[0])):
                continue
            *look, label = LINES.get(name, LINES["Python"])
            middle = np.array([np.median(values) for values in sides.values()])
            least, most = ([of(values) for values in sides.values()] for of in (min, max))
            spread = (middle - least, most - middle)
            options = dict(zip(("color", "marker", "ls"), look, strict=True))
            axes.errorbar(range(len(sides)), middle, spread, **options, capsize=2, label=label)
            axes.set_xticks(range(len(sides)), [str(side) for side in sides])
        for name, axes in panels.items():
            axes.set_title(AXES[name].title, fontsize=10, loc="left")
            axes.set(xlabel=AXES[name].x, ylabel=AXES[name].y, ylim=(0, None))
            axes.grid(visible=False, axis="x")
        panels["Python"].axhline(TARGET, color="#555555", lw=1, ls=":", label="target, at most")
        panels["Python"].legend()
        figure.savefig(path)


def main() -> None:
    """Start all sides, alternate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=2, help="of each side in each round")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        panels = served(options.model, folder, stack, options.seconds)
        panels |= in_process(options.model, folder, 0.5)
        panels["Python"] = beside_the_graph(pack(options.model, folder / "served.mar"))
        archive(options.model, folder / "full.mar")
        panels["Python, full"] = beside_the_graph(folder / "full.mar")
        found = {name: {at: list[float]() for at in sides} for name, sides in panels.items()}
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for name, sides in panels.items():
                for at, rate in sides.items():
                    found[name][at].append(rate())
    for name, results in found.items():
        for at, values in results.items():
            spread = f"({min(values):.2f} to {max(values):.2f})"
            print(f"{name:10} {at:4}  {np.median(values):8.2f} {spread}")
    print(ratios.machine())
    if options.plot:
        picture(found, options.plot)


if __name__ == "__main__":
    main()
