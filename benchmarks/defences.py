"""A defended decision in Rampart's graph and in ART's components, in process: images/s.

    .venv/bin/python benchmarks/defences.py

full, full int8   Rampart's graphs: two classifier passes, the purifier and seven detectors
ART               its PyTorchClassifier on the image, on FeatureSqueezing (5 bits) and on
                  SpatialSmoothing (3x3), as classic feature squeezing wants, and a
                  BinaryInputDetector as large as our purifier, in whose place it stands: ART has
                  none that takes one pass (SpatialSmoothingPyTorch, which needs kornia besides,
                  was no faster)
ART bare          its PyTorchClassifier on the image alone
Images are uint8 on both sides, the answer is a label and whether to reject. Expected: ten times
ART's images/s. About 3 minutes on 2 cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ratios
import torch
from art.defences.detector.evasion import BinaryInputDetector
from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing
from art.estimators.classification import PyTorchClassifier
from engines import BATCHES, Run, timed
from torch import nn
from tqdm import tqdm

from rampart.export.archive import export_variant
from rampart.export.build import sample_crops
from rampart.handlers.engine import Engine
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.model import pipeline as pipelines

ART = ("ART", "ART bare")


class Suspicion(nn.Module):
    """A detector of our purifier's size: clean or adversarial, from the image."""

    def __init__(self, purifier: nn.Module) -> None:
        super().__init__()
        self.purifier = purifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) to (N, 2)."""
        return self.purifier(x).mean(dim=(2, 3))[:, :2]


def wrapped(net: nn.Module, size: int, classes: int) -> PyTorchClassifier:
    """ART's wrapper, for inference on the CPU."""
    common = {"input_shape": (3, size, size), "nb_classes": classes, "clip_values": (0.0, 1.0)}
    return PyTorchClassifier(net.eval(), nn.CrossEntropyLoss(), device_type="cpu", **common)


def art(model: Path, images: np.ndarray) -> dict[str, Run]:
    """What ART takes for it, by name."""
    pipeline, classes = pipelines.load(model / "weights.safetensors", "full")
    assert pipeline.purifier is not None
    size = images.shape[1]
    classifier = wrapped(pipeline.classifier, size, len(classes))
    detector = BinaryInputDetector(wrapped(Suspicion(pipeline.purifier), size, 2))
    squeeze = FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=5)

    def pixels(batch: int) -> np.ndarray:
        return images[:batch].transpose(0, 3, 1, 2).astype(np.float32) / 255  # (N, 3, H, W)

    smooth = SpatialSmoothing(window_size=3, channels_first=True, clip_values=(0.0, 1.0))

    def defended(batch: int) -> object:
        x = pixels(batch)
        views = x, squeeze(x)[0], smooth(x)[0]
        # ART leaves some of them in float64, which the network would not take.
        logits = [classifier.predict(view.astype(np.float32)) for view in views]
        moved = max(np.abs(logits[0] - other).sum(axis=1).max() for other in logits[1:])
        return logits[0].argmax(axis=1), moved, detector.detect(x)

    def bare(batch: int) -> object:
        return classifier.predict(pixels(batch)).argmax(axis=1)

    return {"ART": defended, "ART bare": bare}


def ours(model: Path, folder: Path, images: np.ndarray) -> dict[str, Run]:
    """The exported graphs with the verdict on what they say, by name."""
    out: dict[str, Run] = {}
    for name, precision, kept in (("full", "fp32", "full"), ("full int8", "int8", "full-int8")):
        path = folder / f"{kept}.onnx"
        export_variant(model, "full", path, precision=precision)
        engine, calibration = Engine(path), Calibration.load(model / f"calibration-{kept}.json")

        def run(batch: int, engine: Engine = engine, known: Calibration = calibration) -> object:
            seen = engine.run(images[:batch])
            return seen.logits.argmax(axis=1), p_values(seen.scores, known) < 0.01

        out[name] = run
    return out


def main() -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1, help="of each side in each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = pipelines.load_classifier(options.model / "weights.safetensors").config.image_size
    images = sample_crops(size, count=max(BATCHES)).numpy()
    claims: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        sides = ours(options.model, Path(scratch), images) | art(options.model, images)
        for batch in BATCHES:
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for run in sides.values():  # allocate
                timed(run, batch, 0.2)
            for _ in tqdm(range(options.rounds), desc=f"batch {batch}", leave=False):
                for name, run in sides.items():
                    rates[name].append(timed(run, batch, options.seconds))
            claims += report(rates, batch)
    if options.json:
        ratios.write(options.json, claims)


def report(rates: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    """Print one batch size; what is claimed of it."""
    print(f"\nbatch {batch}")
    for name, values in rates.items():
        spread = f"({min(values):.0f} to {max(values):.0f})"
        print(f"  {name:16} {np.median(values):6.0f} images/s {spread}")
    claims = [
        ratios.claim(f"{name} / ART", f"batch {batch}", own, rates["ART"], 10)
        for name, own in rates.items()
        if name not in ART
    ]
    for made in claims:
        print(ratios.in_words(made))
    return claims


if __name__ == "__main__":
    main()
