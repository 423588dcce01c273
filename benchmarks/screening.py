"""Is a store screened as fast as its graph runs, in flat memory, and once each after kills?

    .venv/bin/python benchmarks/screening.py --images cifar10-test.npz [--count 100000]

Writes `count` PNGs, which are test images repeated and perturbed, into tar files of 1,000. Each
round screens all of them, with as many processes as there are cores; images/s count from the first
process to start to the last shard. Before and after, the graph runs alone, on decoded images and
all cores; the mean counts. Then a run is killed twice (SIGKILL, all its processes) and taken up.
Claims: images/s against the graph's own; every image once; no process grows after a third of its
way. 100,000 images take 5 minutes on 2 cores, and 300 MB of disk. --ray does the last part once
more on a Ray of two nodes (`make .venv/ray`): the command is killed, then a node, in the middle.
"""

import argparse
import contextlib
import io
import os
import re
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
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from ray_cluster import two_nodes

from rampart.handlers.engine import Engine
from rampart.screening.model import packed

SHARD, TARGET, BATCH = 1000, 0.85, 32
ROUNDS, SECONDS = 5, 5.0  # and of the graph alone, twice in each


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


def alone(engine: Engine, images: np.ndarray) -> float:
    """Images a second of the graph on all cores, for SECONDS."""
    batch, count, began = images[:BATCH], 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < SECONDS:
        engine.run(batch)
        count += len(batch)
    return count / passed


def command(store: Path | str, model: Path, out: Path) -> list[str]:
    """A run as one types it."""
    words = [sys.executable, "-m", "rampart", "screen", str(store), "--out", str(out)]
    return [*words, "--model", str(model)]


def rate(words: list[str], shards: int) -> float:
    """Images a second of a whole run from its first shard to its last, as it tells them."""
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    (told,) = re.findall(r"^([\d,]+) images/s$", done.stdout, re.MULTILINE)
    assert f" in {shards} shards" in done.stdout
    return float(told.replace(",", ""))


def watched(words: list[str]) -> dict[int, list[int]]:
    """The resident bytes of a command's processes over time."""
    memory: dict[int, list[int]] = {}
    with subprocess.Popen(words) as process:
        family = psutil.Process(process.pid)
        while process.poll() is None:
            for one in [family, *family.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory.setdefault(one.pid, []).append(one.memory_info().rss)
            time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    return memory


def killed(words: list[str], out: Path, parts: int) -> None:
    """Run a command until it has written so many parts, then kill its whole group."""
    with subprocess.Popen(words, start_new_session=True) as process:
        while len(list((out / "verdicts").glob("*.parquet"))) < parts:
            if process.poll() is not None:
                raise RuntimeError("it ended before it was killed: take a larger --count")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def by_ray(store: Path, model: Path, out: Path, shards: int) -> int:
    """Screen by two nodes: a command that is killed, and one under which a node is killed.

    Returns the shards that were done when the node was killed.
    """

    def done() -> int:
        return len(list((out / "verdicts").glob("*.parquet")))

    with two_nodes() as nodes:
        words = command(store, model, out)[3:]
        for share, kill in ((4, None), (2, nodes.kill_one)):
            run = nodes.start("rampart", *words, "--ray", nodes.address)
            while done() < shards // share:
                if run.poll() is not None:
                    raise RuntimeError(run.communicate()[0])
                time.sleep(0.05)
            (kill or run.kill)()
            killed_at = done()
            said, _ = run.communicate()
        if run.returncode:
            raise RuntimeError(said)
    return killed_at


def is_whole(out: Path, count: int) -> bool:
    """Whether each of so many pictures has one verdict."""
    table = dataset.dataset(out / "verdicts").to_table(columns=["name"])
    return bool(table.num_rows == len(set(table["name"].to_pylist())) == count)


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
    parser.add_argument("--ray", action="store_true", help="Also by two nodes of a Ray")
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
    store, broken = scratch / "store", scratch / "broken"
    store.mkdir()
    write(store, images, given.count)
    with packed(given.model) as archive, zipfile.ZipFile(archive) as content:
        engine = Engine(Path(content.extract("graph.onnx", scratch)))
    shards = -(-given.count // SHARD)
    own, ours = [], []
    for number in range(ROUNDS):
        before = alone(engine, images)
        ours.append(rate(command(store, given.model, scratch / f"round-{number}"), shards))
        own.append((before + alone(engine, images)) / 2)
    for share in (3, 2):
        killed(command(store, given.model, broken), broken, max(1, shards // share))
    memory = watched(command(store, given.model, broken))
    claim = ratios.claim("screen / graph alone", f"{given.count} images", ours, own, TARGET)
    print(f"{ratios.machine()}: {given.count:,} images in {shards} tar files, {given.model.name}")
    print(
        "  images/s  " + "  ".join(f"{a:,.0f} of {b:,.0f}" for a, b in zip(ours, own, strict=True))
    )
    print(ratios.in_words(claim))
    once = is_whole(broken, given.count)
    print(f"every image once after two kills: {once}; memory grew {growth(memory):.2f}-fold")
    if given.ray:
        node = by_ray(store, given.model.absolute(), scratch / "ray", shards)
        whole = is_whole(scratch / "ray", given.count)
        print(f"Ray, a node killed after {node} shards: every image once: {whole}")
    if given.json:
        ratios.write(given.json, [claim])


if __name__ == "__main__":
    main()
