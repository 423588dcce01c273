"""One defended graph in every engine of this machine, side by side: images/s and milliseconds.

    .venv/bin/python benchmarks/engines.py
    .venv/bin/python benchmarks/engines.py --model model_store/traffic-signs
    .venv/bin/python benchmarks/engines.py --model model_store/blood-cells

Sides, in turns: the largest variant (`full`, or `guarded` where the model has no purifier) in
PyTorch (eager, torch.compile) and in OpenVINO (fp32, bf16, int8); every variant in ONNX Runtime
(fp32, int8), of which `lean` is the classifier and little more; with a purifier also `lean` on
twice as many images, as in `full`, and the purifier alone. Expected in ONNX Runtime: int8 at least
1.7 times as fast as fp32, 2 times for `lean`, 1.5 for `guarded`; `guarded` at least a third as fast
as `lean` in the same precision; fp32 at least 1.5 times as fast as eager at batch 1; the parts of
`full` at least 1/1.1 of its time. About 6 minutes on 2 cores. Without ranges of `rampart quantize`
they are taken from crops of a photograph, which serves for timing.

Of an object detector: the `lean` pipeline in PyTorch (eager) and in ONNX Runtime (fp32, int8), and
the detector alone, which scores no suspicion, in both. Expected: either graph at least 1.5 times as
fast as eager, and the defence at most a tenth of its time. All give candidates, of which boxes that
overlap are not cut yet. About 3 minutes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino
import ratios
import torch
from torch import nn
from tqdm import tqdm

from rampart.export import scenes
from rampart.export.build import sample_crops
from rampart.export.quantize import quantize
from rampart.export.to_onnx import export, to_onnx
from rampart.handlers.cores import available_cores
from rampart.handlers.engine import Engine, SceneEngine
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.files import ranges_file
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects import defended
from rampart.hardening.objects.boxes import Candidates
from rampart.hardening.objects.detector import TASK, ObjectDetector
from rampart.models import task_of

BATCHES, SCENE_BATCHES = (1, 8, 32), (1, 8)
VARIANTS: tuple[Variant, ...] = ("lean", "guarded", "full")  # the largest last
GAINS = {"lean": 2.0, "guarded": 1.5, "full": 1.7}  # of int8 over fp32
PURIFIER = "purifier"
Run = Callable[[int], object]  # runs a batch of so many images


def graphs(model: Path, folder: Path) -> dict[str, Path]:
    """The exported graphs by name, in `folder`, the largest variant last."""
    whole, _ = pipelines.load_whole(model / "weights.safetensors")
    crops = sample_crops(whole.classifier.config.image_size)
    out = {}
    for variant in VARIANTS if whole.purifier is not None else VARIANTS[:-1]:
        pipeline = pipelines.as_variant(whole, variant)
        out[variant] = to_onnx(pipeline, folder / f"{variant}.onnx")
        out[f"{variant} int8"] = in_int8(out[variant], model, variant, crops.numpy())
    if whole.purifier is not None:
        x = {"x": torch.zeros(2, *crops.shape[3:], *crops.shape[1:3])}
        out[PURIFIER] = export(whole.purifier, x, ("g",), folder / "purifier.onnx")
    return out


def in_int8(graph: Path, model: Path, variant: Variant, images: np.ndarray) -> Path:
    """A graph in int8, beside it: by the ranges of its model, or of `images` if it has none."""
    kept, out = ranges_file(model, variant), graph.with_stem(f"{graph.stem}-int8")
    if kept.is_file():
        return quantize(graph, kept, out)
    return quantize(graph, ranges_file(graph.parent, variant), out, images)


def runtime(path: Path, images: np.ndarray, *, times: int = 1) -> Run:
    """ONNX Runtime on `times` the batch."""
    engine = Engine(path)
    many = np.concatenate([images] * times)
    return lambda batch: engine.run(many[: batch * times])


def alone(path: Path, name: str, values: np.ndarray) -> Run:
    """A graph of one input `name`, with the threads that `Engine` gives all other sides."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: values[:batch]})


def eager(module: nn.Module, images: np.ndarray) -> Run:
    """A pipeline in PyTorch."""
    image = torch.from_numpy(images)

    def run(batch: int) -> object:
        with torch.no_grad():  # consistency takes gradients, which inference_mode forbids
            return module(image[:batch])

    return run


def other(path: Path, images: np.ndarray, precision: str = "f32") -> Run:
    """The same graph in OpenVINO, which left alone computes in bf16 where the CPU can."""
    core = openvino.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(path), "CPU", hints)
    request = compiled.create_infer_request()
    return lambda batch: request.infer({"image": images[:batch]})


def sides(model: Path, folder: Path) -> dict[str, Run]:
    """What is measured, by name."""
    made = graphs(model, folder)
    purifier = made.pop(PURIFIER, None)
    images = sample_crops(Engine(made["lean"]).image_shape[0], count=max(BATCHES)).numpy()
    largest = [variant for variant in VARIANTS if variant in made][-1]
    pipeline, _ = pipelines.load(model / "weights.safetensors", largest)
    out = {
        "eager": eager(pipeline, images),
        "torch.compile": eager(torch.compile(pipeline), images),
        **{name: runtime(path, images) for name, path in made.items()},
        "OpenVINO": other(made[largest], images),
        "OpenVINO bf16": other(made[largest], images, "bf16"),
        "OpenVINO int8": other(made[f"{largest} int8"], images),
    }
    if purifier is not None:
        x = (images / np.float32(255)).transpose(0, 3, 1, 2)
        out |= {"lean, twice": runtime(made["lean"], images, times=2)}
        out |= {PURIFIER: alone(purifier, "x", x)}
    return out


class Undefended(nn.Module):
    """An object detector without scores of suspicion, as one would export it."""

    def __init__(self, detector: ObjectDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> Candidates:
        """Candidates of uint8 (N, S, S, 3)."""
        return self.detector.candidates(to_float(image))


def scene_sides(model: Path, folder: Path) -> dict[str, Run]:
    """What is measured of an object detector, by name."""
    pipeline, _ = defended.load(model / "weights.safetensors", "lean")
    bare, size = Undefended(pipeline.detector).eval(), pipeline.image_size
    images = sample_crops(size, count=max(SCENE_BATCHES)).numpy()
    whole = scenes.to_onnx(pipeline, folder / "lean.onnx")
    engine, narrow = SceneEngine(whole), SceneEngine(in_int8(whole, model, "lean", images))
    example = {"image": torch.from_numpy(images[:2])}
    graph = export(bare, example, Candidates._fields, folder / "bare.onnx")
    return {
        "eager": eager(pipeline, images),
        "bare, eager": eager(bare, images),
        "ONNX Runtime": lambda batch: engine.run(images[:batch]),
        "int8": lambda batch: narrow.run(images[:batch]),
        "bare": alone(graph, "image", images),
    }


def timed(run: Run, batch: int, seconds: float) -> float:
    """Images/s over about `seconds`."""
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        run(batch)
        count += 1
    return batch * count / spent


def claims_of(rates: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    """What is claimed at one batch size, from images/s of every side by round."""
    made = [variant for variant in VARIANTS if variant in rates]

    def over(name: str, peer: str, target: float) -> dict[str, Any]:
        return ratios.claim(f"{name} / {peer}", f"batch {batch}", rates[name], rates[peer], target)

    out = [over(f"{variant} int8", variant, GAINS[variant]) for variant in made]
    out += [over(f"guarded{form}", f"lean{form}", 1 / 3) for form in ("", " int8")]
    if batch == 1:
        out.append(over(made[-1], "eager", 1.5))
    if "full" in made:
        passes = zip(rates["lean, twice"], rates[PURIFIER], strict=True)
        rates = rates | {"its parts": [1 / (1 / twice + 1 / alone) for twice, alone in passes]}
        out.append(over("full", "its parts", 1 / 1.1))
    return out


def scene_claims_of(rates: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    """What is claimed of an object detector at one batch size."""
    setting, graph = f"batch {batch}", rates["ONNX Runtime"]
    return [
        ratios.claim("detector, graph / eager", setting, graph, rates["eager"], 1.5),
        ratios.claim("detector, int8 / eager", setting, rates["int8"], rates["eager"], 1.5),
        ratios.claim("detector, graph / bare", setting, graph, rates["bare"], 1 / 1.1),
    ]


def main() -> int:
    """Measure in turns, print; the exit code says whether all claims hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--rounds", type=int, default=35)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each side in each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    claims: list[dict[str, Any]] = []
    finds_objects = task_of(options.model / "weights.safetensors") == TASK
    batches, measured = (SCENE_BATCHES, scene_sides) if finds_objects else (BATCHES, sides)
    claimed = scene_claims_of if finds_objects else claims_of
    with tempfile.TemporaryDirectory() as scratch:
        runs = measured(options.model, Path(scratch))
        for batch in batches:
            rates: dict[str, list[float]] = {name: [] for name in runs}
            for run in runs.values():  # compile, allocate
                timed(run, batch, 0.2)
            for _ in tqdm(range(options.rounds), desc=f"batch {batch}", leave=False):
                for name, run in runs.items():
                    rates[name].append(timed(run, batch, options.seconds))
            claims += report(rates, batch, claimed(rates, batch))
    failed = sum(not made["holds"] for made in claims)
    print(f"\n{ratios.machine()}; {len(claims) - failed} of {len(claims)} targets hold")
    if options.json:
        ratios.write(options.json, claims)
    return 1 if failed else 0


def report(
    rates: dict[str, list[float]], batch: int, claims: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Print one batch size; returns its claims."""
    print(f"\nbatch {batch}")
    for name, values in rates.items():
        rate = float(np.median(values))
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"  {name:18} {rate:7.0f} images/s ({spread:>14}) {batch / rate * 1e3:7.2f} ms")
    for made in claims:
        print(ratios.in_words(made))
    return claims


if __name__ == "__main__":
    sys.exit(main())
