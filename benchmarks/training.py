"""Adversarial training beside the Adversarial Robustness Toolbox's trainers and the ideal.

    .venv/bin/python benchmarks/training.py

The same network (half-width ResNet-18, 32 pixels), attack and batch of 128 on all sides; images/s,
sides in turns, medians of the rounds. The ideal is the attack's and the step's forward and backward
passes in the same precision on a batch that is there already, and nothing else. Expected: at least
twice AdversarialTrainerMadryPGD, 1.5 times AdversarialTrainerFBFPyTorch, 90% of the ideal, also in
fp32, which ART computes in.
About 15 minutes on 2 cores. `--compile` measures torch.compile too, which needs a C++ compiler.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ratios
import torch
from torch import nn
from torch.nn import functional as F

from rampart.handlers.engine import cpu_features
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train import cifar10
from rampart.hardening.train.loop import Precision, Recipe, Trainer, autocast, fast_precision

BATCH, PGD_STEPS = 128, 7  # AdversarialTrainerMadryPGD's own
THREAT = Threat("Linf", 8 / 255)
SIZE = 32
ART = {"ART MadryPGD": 2.0, "ART FBF": 1.5}  # how many times as fast we want to be


def network(device: torch.device) -> Classifier:
    """The network of every side."""
    torch.manual_seed(0)
    return Classifier(ClassifierConfig("resnet18", 10, width=0.5)).to(device)


def noise(count: int) -> Images:
    """Images that take as long as any."""
    draws = torch.Generator().manual_seed(0)
    image = torch.randint(256, (count, SIZE, SIZE, 3), generator=draws, dtype=torch.uint8)
    return Images(image, torch.randint(10, (count,), generator=draws), cifar10.CLASSES)


def ours(
    method: str, precision: Precision, images: Images, device: torch.device, *, compiled: bool
) -> Callable[[], None]:
    """One pass of `rampart train`, its shuffling, augmentation and weight average included."""
    net = network(device)
    if compiled:
        net.backbone.compile()
    recipe = Recipe(method, THREAT, batch_size=BATCH, steps=PGD_STEPS, precision=precision)
    trainer = Trainer(net, recipe, Path(tempfile.gettempdir()) / "never-written")
    trainer.run.save_every = float("inf")
    here = images.to(device)

    def run() -> None:
        trainer.run.done, trainer.run.loss = 0, torch.zeros((), dtype=torch.float64)
        trainer.run.pass_over(here, trainer.step, epochs=30, batch_size=BATCH)

    return run


def art(trainer: str, images: Images, device: torch.device) -> Callable[[], None]:
    """One pass of one of ART's trainers."""
    from art.defences.trainer import AdversarialTrainerFBFPyTorch, AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    net = network(device)
    classifier = PyTorchClassifier(
        model=net,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, SIZE, SIZE),
        nb_classes=10,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    x, label = to_float(images.image).numpy(), np.eye(10, dtype=np.float32)[images.label.numpy()]
    if trainer == "FBF":
        made = AdversarialTrainerFBFPyTorch(classifier, eps=THREAT.eps)
    else:
        made = AdversarialTrainerMadryPGD(
            classifier, eps=THREAT.eps, eps_step=2 / 255, max_iter=PGD_STEPS
        )
    return lambda: made.fit(x, label, batch_size=BATCH, nb_epochs=1)


def ideal(
    steps: int, precision: Precision, images: Images, device: torch.device
) -> Callable[[], None]:
    """The passes alone: `steps` to the image, one to the weights, for each batch."""
    net = network(device).to(memory_format=torch.channels_last)
    here = images[torch.arange(BATCH)].to(device)
    x = to_float(here.image).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        for _ in range(len(images) // BATCH):
            with autocast(device, precision):
                net.eval()
                for _ in range(steps):
                    leaf = x.detach().requires_grad_()
                    loss = F.cross_entropy(net(leaf).float(), here.label)
                    torch.autograd.grad(loss, leaf)
                net.train()
                net.zero_grad(set_to_none=True)
                F.cross_entropy(net(x).float(), here.label).backward()
        float(loss.detach())  # a GPU is waited for

    return run


def seconds(run: Callable[[], None]) -> float:
    """Wall clock of one pass."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def sides(
    images: Images, device: torch.device, *, compiled: bool
) -> dict[str, dict[str, Callable[[], None]]]:
    """By attack, the name and the pass of each side; the first is what is compared."""
    out, precision = {}, fast_precision(device, cpu_features())
    for method, title, other, steps in (
        ("pgd", f"PGD-{PGD_STEPS}", "MadryPGD", PGD_STEPS),
        ("nfgsm", "single step", "FBF", 1),
    ):
        rows = {
            "rampart": ours(method, precision, images, device, compiled=False),
            f"ART {other}": art(other, images, device),
            "ideal": ideal(steps, precision, images, device),
        }
        if precision != "fp32":
            rows["rampart fp32"] = ours(method, "fp32", images, device, compiled=False)
            rows["ideal fp32"] = ideal(steps, "fp32", images, device)
        if compiled:
            rows["compiled"] = ours(method, precision, images, device, compiled=True)
        out[title] = rows
    return out


def claims_of(title: str, rates: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """What is claimed of one attack: against ART as it is and in its own precision, and of what
    the passes alone would take.
    """
    art = next(name for name in rates if name.startswith("ART"))
    target = ART[art]
    pairs = [("rampart", art, target), ("rampart", "ideal", 0.9)]
    if "rampart fp32" in rates:
        pairs += [("rampart fp32", art, target), ("rampart fp32", "ideal fp32", 0.9)]
    return [
        ratios.claim(f"{own} / {other}", title, rates[own], rates[other], wanted)
        for own, other, wanted in pairs
    ]


def main() -> int:
    """Print the table; the exit code says whether the targets hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="training steps a round")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, claims = noise(options.steps * BATCH), list[dict[str, Any]]()
    for title, rows in sides(images, device, compiled=options.compile).items():
        for run in rows.values():
            run()  # warm
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, run in rows.items():
                rates[name].append(len(images) / seconds(run))
        print(f"\n{title} on {device}, batch {BATCH}, {torch.get_num_threads()} threads")
        for name, speed in rates.items():
            spread = f"({min(speed):.1f} to {max(speed):.1f})"
            print(f"  {name:14} {median(speed):7.1f} images/s {spread}")
        made = claims_of(title, rates)
        print("\n".join(map(ratios.in_words, made)))
        claims += made
    if options.json:
        ratios.write(options.json, claims)
    return int(not all(claim["holds"] for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
