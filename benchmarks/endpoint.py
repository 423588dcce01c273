"""Requests per second of a Rampart endpoint and of TorchServe's stock classifier, side by side.

    .venv/bin/python benchmarks/endpoint.py --images cifar10-test.npz

Sides, alternated round by round in one run on one machine, one PNG a request:
    rampart   the `full` archive: purifier, detectors, two classifier passes (fp32)
    stock     TorchServe's image_classifier, eager, same weights, only its transform changed
    graph     the `full` graph in this process, on decoded pixels: the floor, without HTTP
    bare      the `lean` graph likewise: one classifier pass, which is what the budget counts in
Needs `wrk` (a package of every Linux distribution). About 9 minutes on 2 cores.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ratios
import torch
from server import endpoint, pngs

from export.archive import export_variant, sample_crops
from handlers.engine import Engine
from hardening import pipeline as pipelines
from hardening.data import load

CONCURRENCY = (1, 8, 32)
# Sends the bodies in turn; wrk is written in C, so the load costs the server little CPU.
SCRIPT = """
local bodies, at = {}, 0
for i = 1, COUNT do
  local file = io.open("FOLDER/" .. i .. ".png", "rb")
  bodies[i] = file:read("*a"); file:close()
end
request = function()
  at = at % COUNT + 1
  return wrk.format("POST", nil, {["Content-Type"] = "image/png"}, bodies[at])
end
"""
# How wrk prints what `load_with_wrk` reads.
DONE = """
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format("RESULT %f %f %f %d\\n", summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
"""
STOCK_MODEL = """
from hardening.models import Classifier, ClassifierConfig


class Stock(Classifier):
    def __init__(self):
        super().__init__(ClassifierConfig(**CONFIG))
"""
STOCK_HANDLER = """
from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class Small(ImageClassifier):
    image_processing = transforms.Compose(
        [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    )
"""


class Round(NamedTuple):
    """What one side did in one round: requests/s (images/s for the graph), milliseconds."""

    rate: float
    p50: float
    p99: float


def stock_archive(model: Path, folder: Path) -> Path:
    """The same classifier for TorchServe's own image_classifier."""
    classifier = pipelines.load_classifier(model / "weights.safetensors")
    torch.save(classifier.state_dict(), folder / "weights.pt")
    config = classifier.config
    (folder / "stock.py").write_text(STOCK_MODEL.replace("CONFIG", repr(config._asdict())))
    size = str(config.image_size)
    (folder / "small.py").write_text(STOCK_HANDLER.replace("SIZE", size))
    command = [str(Path(sys.executable).with_name("torch-model-archiver"))]
    command += ["--model-name", "stock", "--version", "1.0", "--export-path", str(folder)]
    command += ["--model-file", str(folder / "stock.py"), "--handler", str(folder / "small.py")]
    command += ["--serialized-file", str(folder / "weights.pt")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "stock.mar"


def load_with_wrk(url: str, script: Path, concurrency: int, seconds: int) -> Round:
    """One round of closed-loop load. Raises RuntimeError where a request failed."""
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "--timeout", "30s"]
    out = subprocess.run(
        [*command, "-s", str(script), url], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"RESULT (\S+) (\S+) (\S+) (\d+)", out)
    if found is None or found[4] != "0":
        raise RuntimeError(f"{url}: requests failed: {out}")
    return Round(float(found[1]), float(found[2]), float(found[3]))


def run_graph(engine: Engine, images: np.ndarray, batch: int, seconds: float) -> Round:
    """The graph alone, `batch` images a run."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        engine.run(images[:batch])
        times.append(time.perf_counter() - start)
    batch = len(images[:batch])
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return Round(batch * len(times) / sum(times), float(p50), float(p99))


def table(results: dict[int, dict[str, list[Round]]]) -> tuple[str, list[dict[str, Any]]]:
    """The printed table, and the claims for --json."""
    lines = [f"{'c':>3}  {'side':8} {'per s':>7} {'spread':>14} {'p50 ms':>7} {'p99 ms':>7}"]
    claims: list[dict[str, Any]] = []
    for concurrency, sides in results.items():
        for side, rounds in sides.items():
            rate, p50, p99 = np.median(np.array(rounds), axis=0)
            low, high = min(r.rate for r in rounds), max(r.rate for r in rounds)
            lines.append(
                f"{concurrency:3}  {side:8} {rate:7.0f} {low:6.0f} .. {high:4.0f}"
                f" {p50:7.1f} {p99:7.1f}"
            )
        rampart, graph = ([r.rate for r in sides[name]] for name in ("rampart", "graph"))
        pairs = (
            ("full over HTTP / stock", rampart, "stock", 1.2),
            ("full over HTTP / its graph", rampart, "graph", 0.85),
            ("full graph / bare graph", graph, "bare", 1 / 2.5),
        )
        for claim, rates, peer, target in pairs:
            peers = [r.rate for r in sides[peer]]
            claims.append(ratios.claim(claim, f"c={concurrency}", rates, peers, target))
            lines.append(ratios.in_words(claims[-1]))
    return "\n".join(lines), claims


def measure(sides: Callable[[str, int], Round], rounds: int) -> dict[int, dict[str, list[Round]]]:
    """Every side at every concurrency, alternating within each round."""
    names = ("rampart", "stock", "graph", "bare")
    results: dict[int, dict[str, list[Round]]] = {
        c: {name: [] for name in names} for c in CONCURRENCY
    }
    for number in range(rounds):
        for concurrency in CONCURRENCY:
            for name in names:
                results[concurrency][name].append(sides(name, concurrency))
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return results


def main() -> None:
    """Start both servers, alternate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--images", type=Path, help=".npz; without it crops of a photograph")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("this benchmark drives its load with wrk: install the package wrk")
    images = (load(options.images).image[:64] if options.images else sample_crops(32)).numpy()
    archive = options.model.with_suffix(".mar")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, body in enumerate(pngs(images), 1):
            (folder / f"{number}.png").write_bytes(body)
        script = folder / "load.lua"
        load_script = SCRIPT.replace("COUNT", str(len(images))).replace("FOLDER", scratch)
        script.write_text(load_script + DONE)
        with zipfile.ZipFile(archive) as mar:
            mar.extract("graph.onnx", folder)
        export_variant(options.model, "lean", folder / "lean.onnx")
        graphs = {name: Engine(folder / f"{name}.onnx", "cpu") for name in ("graph", "lean")}
        graphs["bare"] = graphs.pop("lean")
        with endpoint(archive) as ours, endpoint(stock_archive(options.model, folder)) as stock:
            urls = {"rampart": ours, "stock": stock}

            def side(name: str, concurrency: int) -> Round:
                if name in graphs:
                    return run_graph(graphs[name], images, concurrency, options.seconds)
                return load_with_wrk(urls[name], script, concurrency, options.seconds)

            for name in urls:  # warm both up before anything counts
                load_with_wrk(urls[name], script, 8, 3)
            text, claims = table(measure(side, options.rounds))
    print(text)
    if options.json:
        ratios.write(options.json, claims)


if __name__ == "__main__":
    main()
