"""Every architecture from training to an answer: 5 steps, export, parity gate, one image served.

    .venv/bin/python benchmarks/architectures.py

Expected: `served` in every row. Images are made up, so accuracy means nothing here; nothing is
downloaded. About half an hour on 2 cores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import torch
import yaml
from PIL import Image

from rampart.export.archive import archive
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming
from rampart.hardening.model import calibrate, pipeline
from rampart.hardening.model.classifier import ARCHITECTURES, Classifier, ClassifierConfig
from rampart.hardening.model.detectors import FULL
from rampart.hardening.model.images import Images, batches, split
from rampart.hardening.model.purifier import BlockPurifier, BlockPurifierConfig
from rampart.hardening.train.loop import Recipe, Trainer

STEPS, BATCH, HELD = 5, 8, 200
LARGE = ("resnet18", "vgg11", "alexnet", "googlenet")


def pictures(count: int, size: int) -> Images:
    """Smooth random pictures of ten dominant hues."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(count) % 10
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    shift = torch.arange(3) / 3
    hue = torch.cos(2 * torch.pi * (label[:, None] / 10 + shift))[:, :, None, None]
    x = (0.5 + 0.25 * hue + 0.4 * (smooth - 0.5)).clamp(0, 1)
    image = (x * 255).byte().permute(0, 2, 3, 1).contiguous()
    return Images(image, label, tuple("abcdefghij"))


def train(arch: str, size: int, folder: Path) -> Classifier:
    """A classifier after 5 adversarial steps."""
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig(arch, 10, image_size=size), auxiliary=True)
    trainer = Trainer(net, Recipe(epochs=1, batch_size=BATCH, lr=0.01), folder)
    images = pictures(STEPS * BATCH, size)
    settle(net, images)
    trainer.run.pass_over(images, trainer.step, epochs=1, batch_size=BATCH)
    settle(net, images)
    kept = Classifier(net.config)
    kept.load_state_dict({n: t for n, t in net.state_dict().items() if "backbone.aux" not in n})
    return kept.eval().requires_grad_(False)


def settle(net: Classifier, images: Images) -> None:
    """Measure BatchNorm's statistics: five steps are too few for the running mean of 152 layers."""
    norms = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    before = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all that is seen
    with torch.no_grad():
        for x, _ in batches(images, BATCH):
            net.train()(x)
    for layer, momentum in zip(norms, before, strict=True):
        layer.momentum = momentum


def pack(net: Classifier, held: Images, folder: Path) -> tuple[Path, str]:
    """The archive of the full pipeline around `net`, and what the parity gate measured."""
    full = pipeline.DefendedClassifier(net, BlockPurifier(BlockPurifierConfig()), FULL).eval()
    full.detectors.fit(net, split(held, "validation"))
    pipeline.save(folder / "weights.safetensors", full, held.classes)
    loaded, _ = pipeline.load(folder / "weights.safetensors")
    calibrate.write(folder, calibrate.calibrate(loaded, held, "full"), "made up")
    (folder / "card.json").write_text("{}")
    out = folder / "net.mar"
    settings = {"rampart": {"false_alarm_rate": 0.05}}
    parity = archive(folder, out, images=held.image[:4], settings=settings)
    return out, f"{parity.logits:.1e}"


def served(archive: Path, picture: torch.Tensor, folder: Path) -> str:
    """The verdict on a PNG by the service that a worker opens."""
    with ZipFile(archive) as packed:
        packed.extractall(folder)
    body = BytesIO()
    Image.fromarray(picture.numpy()).save(body, "PNG")
    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    (reply,) = Service.open(folder, config["rampart"]).answer([Incoming({}, [body.getvalue()])])
    verdict = json.loads(reply.body)
    if reply.status != 200:
        raise RuntimeError(f"the endpoint answers {reply.status}: {verdict}")
    return (
        f"served: {verdict['label']}, {verdict['decision']}, p {verdict['detail']['p_value']:.2f}"
    )


def rows() -> Iterator[tuple[str, int]]:
    """Every architecture at 32 pixels, the older families at 224 too."""
    yield from ((arch, 32) for arch in ARCHITECTURES if arch != "resnet10")
    yield "timm:resnet10t", 32
    yield from ((arch, 224) for arch in LARGE)


def main() -> int:
    """Print the table; the exit code says whether every row came to an answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="an architecture; repeatable")
    only = parser.parse_args().only
    failed = 0
    print(
        f"{'architecture':18} {'pixels':>6} {'weights':>9} {'logits differ':>13} {'s':>5}  answer"
    )
    for arch, size in rows():
        if only and arch not in only:
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            net = train(arch, size, folder / "run")
            weights = sum(p.numel() for p in net.parameters())
            held = pictures(HELD, size)
            try:
                out, gap = pack(net, held, folder)
                answer = served(out, held.image[0], folder / "unpacked")
            except (RuntimeError, ValueError) as error:
                failed += 1
                gap, answer = "-", f"failed: {error}"
        seconds = time.perf_counter() - begin
        print(f"{arch:18} {size:6} {weights:9,} {gap:>13} {seconds:5.0f}  {answer}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
