"""Every test image as a PNG over HTTP: does the endpoint answer as the torch pipeline does?

    .venv/bin/python benchmarks/agreement.py --data cifar10-test.npz

Expected: the label equals torch's on every image, and the clean flag rate at the archive's
false-alarm rate of 1% is at most 2%. About a minute on 2 cores.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import torch
from server import endpoint, pngs
from tqdm import tqdm

from hardening import pipeline as pipelines
from hardening.data import load
from hardening.metrics import wilson


def main() -> int:
    """Compare, print both figures; the exit code says whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    options = parser.parse_args()
    images = load(options.data, train=False)
    pipeline, _ = pipelines.load(options.model / "weights.safetensors")
    with torch.no_grad():
        parts = [pipeline(part).logits.argmax(1) for part in images.image.split(64)]
    expected = torch.cat(parts).tolist()
    archive = options.model.with_suffix(".mar")
    with endpoint(archive) as url, requests.Session() as session, ThreadPoolExecutor(8) as pool:
        bodies = pngs(images.image.numpy())
        answers = pool.map(lambda body: session.post(url, data=body, timeout=60).json(), bodies)
        verdicts = list(tqdm(answers, total=len(bodies), desc="images over HTTP"))
    same = int(np.sum([v.get("index") == e for v, e in zip(verdicts, expected, strict=True)]))
    flagged = sum(v.get("decision") != "accept" for v in verdicts)
    n = len(bodies)
    low, high = wilson(flagged / n, n)
    print(f"same label as the torch pipeline: {same} of {n}")
    print(
        f"clean images flagged: {flagged} of {n} = {flagged / n:.2%} (95%: {low:.2%}, {high:.2%})"
    )
    return 0 if same == n and flagged <= 0.02 * n else 1


if __name__ == "__main__":
    sys.exit(main())
