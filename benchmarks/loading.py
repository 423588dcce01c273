"""Images a second that training gets: decoded from files, from the store, from memory.

    .venv/bin/python benchmarks/loading.py [--count 2000] [--side 500] [--size 224]

The files are JPEGs of noise over a gradient, `side` pixels wide. The first epoch decodes them and
fills the store, by threads or by processes; later ones read it. Training takes threads up to
ENOUGH of them. Each is the median of three passes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rampart.handlers.cores import available_cores
from rampart.hardening.model.images import Source
from rampart.hardening.train import data
from rampart.hardening.train.data import find_pictures

BATCH, ROUNDS = 128, 3


def write(folder: Path, count: int, side: int) -> None:
    """`count` JPEGs of two classes."""
    draws = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[:, None, None]
    for i in range(count):
        home = folder / f"class{i % 2}"
        home.mkdir(parents=True, exist_ok=True)
        noise = draws.integers(0, 56, (side, side, 3))
        Image.fromarray((ramp + noise).astype(np.uint8)).save(home / f"{i}.jpg", quality=90)


def rate(images: Source) -> float:
    """Images a second of one pass in random order."""
    rows = torch.split(torch.randperm(len(images)), BATCH)
    start = time.perf_counter()
    count = sum(len(label) for _, label in images.read(rows))
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("count", 2000), ("side", 500), ("size", 224)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "pictures", given.count, given.side)
        files = find_pictures(Path(scratch) / "pictures", size=given.size)
        rates: dict[str, list[float]] = {"threads": [], "processes": []}
        for turn in range(ROUNDS):
            for name, enough in (("threads", sys.maxsize), ("processes", 0)):
                data.ENOUGH = enough
                store = files.stored(Path(scratch) / f"{name}{turn}")
                rates[name].append(rate(store))  # fills it
        sides = {"store": store, "memory": files.whole()}
        rates |= {name: [rate(side) for _ in range(ROUNDS)] for name, side in sides.items()}
    shape = f"{given.side}x{given.side} JPEG to {given.size}x{given.size}"
    print(f"{given.count} pictures, {shape}, {available_cores()} cores")
    for name, found in rates.items():
        print(f"{name:10}{statistics.median(found):10,.0f} images/s")


if __name__ == "__main__":
    main()
