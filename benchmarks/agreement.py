"""Every test image as a PNG over HTTP: does the endpoint answer as the torch pipeline does?

    .venv/bin/python benchmarks/agreement.py --data cifar10-test.npz

`--model` is a folder with its archive beside it, which `make serve` builds. Expected: in fp32 the
label equals torch's on every image, in fp16 on 99.5%, in int8 on 98%; the clean flag rate at the
archive's false-alarm rate of 1% is at most 2%. About a minute on 2 cores.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import requests
import torch
from server import endpoint, pngs
from tqdm import tqdm

from hardening import pipeline as pipelines
from hardening.data import load
from hardening.metrics import wilson

SAME = {"fp32": 1.0, "fp16": 0.995, "int8": 0.98}  # as the gates of export demand


def main() -> int:
    """Compare, print both figures; the exit code says whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    options = parser.parse_args()
    images, archive = load(options.data, train=False), options.model.with_suffix(".mar")
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


if __name__ == "__main__":
    sys.exit(main())
