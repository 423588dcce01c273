"""How long `rampart train` takes to list all that is wrong with pictures and with weights.

    .venv/bin/python benchmarks/faults.py

10,000 JPEGs of 160x160 pixels in four classes, ten of them spoiled in ten ways; then weights of a
ResNet-18 with six faults, which `rampart adopt` is given. Expected: all ten in under 10 s on 2 idle
cores, all six. Nothing is trained.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from decoding import encoded
from PIL import Image
from torchvision.models import get_model

CLASSES, SIDE, SECONDS = 4, 160, 10.0
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"


class Told(NamedTuple):
    """What a command printed, after how many seconds by the clock and on the cores."""

    text: str
    wall: float
    cpu: float


def main() -> int:
    """Print what was listed and how fast; the exit code says whether that is all, and in time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        names = spoil(make(home / "data", options.count))
        net = ["--arch", "resnet18", "--width", "0.5", "--image-size", "64"]
        pictures = rampart("train", "--data", str(home / "data"), "--out", str(home / "run"), *net)
        listed = [
            name for name in names if f"{name}: " in pictures.text or f"{name} " in pictures.text
        ]
        print(pictures.text)
        print(f"{len(listed)} of {len(names)} spoiled pictures among {options.count:,} are listed,")
        print(f"after {pictures.wall:.1f} s; {pictures.cpu:.1f} s of CPU")
        spoil_weights(home / "w.pth")
        shape = ["--arch", "resnet18", "--classes", "7", "--image-size", "96"]
        weights = rampart(
            "adopt", str(home / "w.pth"), *shape, "--out", str(home / "c.safetensors")
        )
        print(weights.text)
        faults = len(re.findall(r" \d+\. ", weights.text))
        print(f"{faults} of 6 faults of weights are listed, after {weights.wall:.1f} s")
    return int(len(listed) < len(names) or faults < 6 or pictures.wall > SECONDS)


def rampart(*words: str) -> Told:
    """What a command says of its mistakes."""
    start, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "rampart", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.monotonic() - start, os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return Told(done.stderr.rpartition("rampart: ")[2].strip(), wall, cpu)


def make(folder: Path, count: int) -> list[Path]:
    """The files of `count` pictures in class folders, each with other noise on it."""
    draws = np.random.default_rng(0)
    smooth = draws.integers(0, 256, (CLASSES, 6, 6, 3)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(s).resize((SIDE, SIDE))).astype(int) for s in smooth]
    files = []
    for number in range(count):
        file = folder / f"class{number % CLASSES}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = draws.integers(-20, 20, (SIDE // 4, SIDE // 4, 3)).repeat(4, 0).repeat(4, 1)
        pixels = (large[number % CLASSES] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, quality=85)
        files.append(file)
    return files


def spoil(files: list[Path]) -> list[str]:
    """Put ten unlike faults in place of ten of the files; returns their names."""
    small = Image.new("RGB", (64, 64), (9, 99, 199))
    frames = [small, Image.new("RGB", (64, 64))]
    png = bytearray(encoded(small, "PNG"))
    png[60] ^= 255

    def dangling(file: Path) -> None:
        file.unlink()
        file.symlink_to("nowhere.jpg")

    def pipe(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    def content(data: bytes) -> Callable[[Path], object]:
        return lambda file: file.write_bytes(data)

    ways: list[Callable[[Path], object]] = [
        content(b""),
        content(POINTER),
        content(b"<!DOCTYPE html><title>Sign in</title>"),
        content(bytes(png)),  # a checksum that is wrong
        content(encoded(small, "GIF")),
        content(encoded(small, "WEBP", save_all=True, append_images=frames[1:])),
        content(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 9)), "PNG")),
        content(encoded(Image.new("RGB", (2000, 20)), "PNG")),  # too oblong
        dangling,
        pipe,
    ]
    chosen = files[:: len(files) // len(ways)][: len(ways)]
    for file, way in zip(chosen, ways, strict=True):
        way(file)
    return [file.name for file in chosen]


def spoil_weights(file: Path) -> None:
    """Write weights of a ResNet-18 for five classes with six faults."""
    state = get_model("resnet18", weights=None, num_classes=5).state_dict()
    state["layer1.0.bn1.bias"][0] = float("inf")
    state["bn1.running_var"][0] = -1.0
    state["layer2.0.conv1.weight"].zero_()
    del state["layer4.1.conv2.weight"]
    normalizer = {"normalize.mean": torch.full((3,), 0.5), "normalize.std": torch.zeros(3)}
    torch.save({f"model.{name}": tensor for name, tensor in state.items()} | normalizer, file)


if __name__ == "__main__":
    sys.exit(main())
