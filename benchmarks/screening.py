"""Is a store screened as fast as its graph runs, in flat memory, and once each after kills?

    .venv/bin/python benchmarks/screening.py --images cifar10-test.npz [--count 100000]

Writes `count` PNGs, which are test images repeated and perturbed, into tar files of 1,000, screens
them with as many processes as there are cores, and measures, in turns with that and on images that
are decoded, the same graph alone on all cores. The run is killed twice (SIGKILL, all its processes)
and taken up again. Claims: images/s of the run that was not killed against the graph's own; every
image once; the parent and each process end no larger than they were at a third of their way.
100,000 images take some 10 minutes on 2 cores, and 300 MB of disk.
"""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import ratios
from PIL import Image
from pyarrow import dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from rampart.handlers.cores import available_cores
from rampart.handlers.engine import Engine
from rampart.screening.model import packed

SHARD, TARGET, BATCH = 1000, 0.85, 32
SECONDS = 8.0  # of the graph alone, before and after the run


def write(folder: Path, images: np.ndarray, count: int) -> None:
    """`count` PNGs in tar files: each row of uint8 (N, H, W, 3) again and again, with noise."""
    draws = np.random.default_rng(0)
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:06d}.tar", "w") as packed:
            for number in range(first, min(first + SHARD, count)):
                image = images[number % len(images)].astype(int)
                noisy = image + draws.integers(-4, 5, image.shape)
                buffer = io.BytesIO()
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
                about = tarfile.TarInfo(f"{number:09d}.png")
                about.size = buffer.tell()
                buffer.seek(0)
                packed.addfile(about, buffer)


def alone(model: Path, images: np.ndarray, scratch: Path) -> float:
    """Images a second of the graph on all cores, for SECONDS."""
    with packed(model) as archive, zipfile.ZipFile(archive) as content:
        engine = Engine(Path(content.extract("graph.onnx", scratch)))
    batch, count, began = images[:BATCH], 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < SECONDS:
        engine.run(batch)
        count += len(batch)
    return count / passed


def command(store: Path, model: Path, out: Path) -> list[str]:
    """A run as one types it."""
    words = [sys.executable, "-m", "rampart", "screen", str(store), "--out", str(out)]
    return [*words, "--model", str(model)]


def watched(words: list[str]) -> tuple[float, dict[int, list[int]]]:
    """Seconds that a command takes, and the resident bytes of its processes over time."""
    memory: dict[int, list[int]] = {}
    began = time.perf_counter()
    with subprocess.Popen(words) as process:
        family = psutil.Process(process.pid)
        while process.poll() is None:
            for one in [family, *family.children(recursive=True)]:
                try:
                    memory.setdefault(one.pid, []).append(one.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(1)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - began, memory


def killed(words: list[str], out: Path, parts: int) -> None:
    """Run a command until it has written so many parts, then kill its whole group."""
    with subprocess.Popen(words, start_new_session=True) as process:
        while len(list((out / "verdicts").glob("*.parquet"))) < parts:
            if process.poll() is not None:
                raise RuntimeError("it ended before it was killed: take a larger --count")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def growth(memory: dict[int, list[int]]) -> float:
    """The largest factor by which a process grew from a third of its way to its end."""
    long = [sizes for sizes in memory.values() if len(sizes) >= 6]
    return max((max(s[len(s) // 3 :]) / max(s[: len(s) // 3 + 1]) for s in long), default=1.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="An .npz with `image`")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    images = np.load(given.images)["image"]
    scratch = Path(tempfile.mkdtemp(prefix="screening-"))
    try:
        report(given, images, scratch)
    finally:
        shutil.rmtree(scratch)


def report(given: argparse.Namespace, images: np.ndarray, scratch: Path) -> None:
    """All that is claimed."""
    store, whole, broken = (scratch / name for name in ("store", "whole", "broken"))
    store.mkdir()
    write(store, images, given.count)
    before = alone(given.model, images, scratch)
    seconds, memory = watched(command(store, given.model, whole))
    own = [before, alone(given.model, images, scratch)]
    shards = -(-given.count // SHARD)
    for share in (3, 2):
        killed(command(store, given.model, broken), broken, max(1, shards // share))
    watched(command(store, given.model, broken))
    tables = [dataset.dataset(out / "verdicts").to_table() for out in (whole, broken)]
    counts = {n for table in tables for n in (table.num_rows, len(set(table["name"].to_pylist())))}
    once = counts == {given.count}
    rate = given.count / seconds
    claim = ratios.claim(
        "screen / graph alone", f"{given.count} images", [rate] * len(own), own, TARGET
    )
    print(f"{ratios.machine()}: {given.count:,} images in {shards} tar files, {given.model.name}")
    print(f"screen {rate:,.0f} images/s with start and end, {available_cores()} processes;")
    print(f"graph alone {own[0]:,.0f} and {own[1]:,.0f} images/s, before and after")
    print(ratios.in_words(claim))
    print(f"every image once after two kills: {once}; memory grew {growth(memory):.2f}-fold")
    if given.json:
        ratios.write(given.json, [claim])


if __name__ == "__main__":
    main()
