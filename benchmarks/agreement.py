"""Every test image as a PNG over HTTP: does the endpoint answer as the torch pipeline does?

    .venv/bin/python benchmarks/agreement.py --data cifar10-test.npz

`--model` is a folder with its archive beside it, which `make serve` builds. Expected: in fp32 the
label equals torch's on every image, in fp16 on 99.5%, in int8 on 98%; the clean flag rate at the
archive's false-alarm rate of 1% is at most 2%. About a minute on 2 cores.

    .venv/bin/python benchmarks/agreement.py --data cifar10-test.npz --before OLD.mar

compares the archive with one that was packed before, in this process: every label and every p-value
is to be the same. Seconds.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from server import endpoint, pngs
from tqdm import tqdm

from rampart.handlers.engine import Engine
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.train.data import load

SAME = {"fp32": 1.0, "fp16": 0.995, "int8": 0.98}  # as the gates of export demand


def main() -> int:
    """Compare, print both figures; the exit code says whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--before", type=Path, help="An archive to compare with, in place of torch")
    options = parser.parse_args()
    images, archive = load(options.data, train=False), options.model.with_suffix(".mar")
    if options.before:
        return compare(options.before, archive, images.image.numpy())
    with ZipFile(archive) as packed:
        card = json.loads(packed.read("card.json"))
    variant, precision = card["variant"], card.get("precision", "fp32")
    pipeline, _ = pipelines.load(options.model / "weights.safetensors", variant)
    with torch.no_grad():
        parts = [pipeline(part).logits.argmax(1) for part in images.image.split(64)]
    expected = torch.cat(parts).tolist()
    with endpoint(archive) as url, requests.Session() as session, ThreadPoolExecutor(8) as pool:
        bodies = pngs(images.image.numpy())
        answers = pool.map(lambda body: session.post(url, data=body, timeout=60).json(), bodies)
        verdicts = list(tqdm(answers, total=len(bodies), desc="images over HTTP"))
    same = int(np.sum([v.get("index") == e for v, e in zip(verdicts, expected, strict=True)]))
    flagged = sum(v.get("decision") != "accept" for v in verdicts)
    n = len(bodies)
    low, high = wilson(flagged / n, n)
    print(f"{variant} in {precision}: same label as the torch pipeline: {same} of {n}")
    print(
        f"clean images flagged: {flagged} of {n} = {flagged / n:.2%} (95%: {low:.2%}, {high:.2%})"
    )
    return 0 if same >= SAME[precision] * n and flagged <= 0.02 * n else 1


class Judged(NamedTuple):
    """What an archive says of N images."""

    label: NDArray[np.int64]  # (N,)
    p_value: NDArray[np.float64]  # (N,)


def judge(archive: Path, image: NDArray[np.uint8]) -> Judged:
    """Labels and p-values of `image` (N, H, W, 3) by an archive's graph and calibration."""
    with tempfile.TemporaryDirectory() as scratch, ZipFile(archive) as packed:
        graph, calibration = (
            Path(packed.extract(name, scratch)) for name in ("graph.onnx", "calibration.json")
        )
        out, table = Engine(graph, device="cpu").run(image), Calibration.load(calibration)
    return Judged(out.logits.argmax(1), p_values(out.scores.astype(np.float64), table))


def compare(before: Path, after: Path, image: NDArray[np.uint8]) -> int:
    """Print on how many images two archives agree; the exit code says whether on all."""
    one, other = judge(before, image), judge(after, image)
    labels = int((one.label == other.label).sum())
    values = int((one.p_value == other.p_value).sum())
    gap = float(np.abs(one.p_value - other.p_value).max())
    print(f"same label: {labels} of {len(image)}")
    print(f"same p-value: {values} of {len(image)}; the largest difference is {gap:.2g}")
    return 0 if labels == values == len(image) else 1


if __name__ == "__main__":
    sys.exit(main())
