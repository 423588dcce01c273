"""How long an explanation takes: an untrained ResNet-18 at 224 pixels, by the archive's handler.

    .venv/bin/python benchmarks/explanations.py

The graph is the one that is served by default, `lean`, in fp32. Weights change no time.
"""

import argparse
import json
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any
from zipfile import ZipFile

import torch
from architectures import BATCH, HELD, pictures, settle
from PIL import Image
from ratios import machine

from rampart.export.archive import archive
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming
from rampart.hardening.model import calibrate, pipeline
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.detectors import LEAN
from rampart.hardening.model.images import split

POLICY = {"explain": True, "false_alarm_rate": 0.05}


def pack(arch: str, size: int, folder: Path) -> tuple[Path, bytes]:
    """What a worker opens, in `folder`, and a picture as a PNG."""
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig(arch, 10, image_size=size)).requires_grad_(False)
    settle(net, pictures(5 * BATCH, size))
    held = pictures(HELD, size)
    lean = pipeline.DefendedClassifier(net, None, LEAN).eval()
    lean.detectors.fit(net, split(held, "validation"))
    pipeline.save(folder / "weights.safetensors", lean, held.classes)
    calibrate.write(folder, calibrate.calibrate(lean, held, "lean"), "made up")
    (folder / "card.json").write_text("{}")
    packed = folder / "net.mar"
    archive(folder, packed, variant="lean", images=held.image[:2], settings={"rampart": POLICY})
    with ZipFile(packed) as content:
        content.extractall(folder / "unpacked")
    body = BytesIO()
    Image.fromarray(held.image[0].numpy()).save(body, "PNG")
    return folder / "unpacked", body.getvalue()


def answered(folder: Path, picture: bytes, *, explain: bool) -> tuple[float, Any]:
    """Seconds that a fresh worker takes for its second request, and the answer."""
    service = Service.open(folder, POLICY)
    service.answer([Incoming({}, [picture])])
    begin = time.perf_counter()
    (reply,) = service.answer([Incoming({}, [picture], explain=explain)])
    seconds = time.perf_counter() - begin
    content = json.loads(reply.body)
    if reply.status != 200:
        raise RuntimeError(f"the endpoint answers {reply.status}: {content}")
    return seconds, content


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder, picture = pack(options.arch, options.size, Path(scratch))
        for explain in (False, True):
            taken = [answered(folder, picture, explain=explain)[0] for _ in range(options.rounds)]
            title = "verdict and explanation" if explain else "verdict"
            print(
                f"{title:23} {median(taken):6.3f} s ({min(taken):.3f} to {max(taken):.3f},"
                f" {options.rounds} rounds)"
            )


if __name__ == "__main__":
    main()
