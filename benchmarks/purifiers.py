"""What decides how good a purifier gets: what it is trained towards, its size, a moving classifier.

    .venv/bin/python benchmarks/purifiers.py adaptive --data cifar10/ --held HELD.npz
    .venv/bin/python benchmarks/purifiers.py static --data cifar10/ --held HELD.npz

adaptive  purifiers of one classifier, each trained on the same images; PGD-10 through both
static    a purifier of an undefended classifier, against attacks that do not know it: how much of
          the lost accuracy comes back, and what is left of that once the attack knows it
`adaptive` takes ten minutes a row for 12,800 images on two cores; `static` an hour and a half for
36,000 on one, and goes on where it was.
"""

import argparse
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rampart.handlers.engine import cpu_features
from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.objectives import Look, View
from rampart.hardening.attack.pgd import Threat, cross_entropy, pgd, random_start
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.purifier import PurifierConfig
from rampart.hardening.train.data import Batch, hold_out, load, load_training, spread
from rampart.hardening.train.loop import (
    Part,
    Run,
    autocast,
    fast_precision,
    one_cycle,
    update_ema,
    validate,
)
from rampart.hardening.train.purifier import PurifierRecipe, PurifierTrainer

THREAT = Threat()
NEVER = Path("never-written")


class TowardsAttacked(PurifierTrainer):
    """As AToP tunes a generator (Lin et al. 2024, section 3.3): the attacked image is the target,
    and what the critic takes for real, and the task loss alone undoes the attack."""

    def step(self, batch: Batch, progress: float) -> Tensor:
        """One batch, attacked before all else."""
        with autocast(self.device, self.recipe.precision):
            attacked = super().craft(batch)
        return super().step(batch._replace(x=attacked), progress)

    def craft(self, batch: Batch) -> Tensor:
        """What is attacked already."""
        return batch.x


class Jointly(PurifierTrainer):
    """The classifier moves too, its BatchNorm statistics apart."""

    def __init__(
        self, classifier: Classifier, config: PurifierConfig, recipe: PurifierRecipe, folder: Path
    ) -> None:
        super().__init__(classifier, config, recipe, folder)
        moving = classifier.requires_grad_(True).parameters()
        self.classifier_optimizer = torch.optim.SGD(moving, lr=0.01, momentum=0.9)

    def step(self, batch: Batch, progress: float) -> Tensor:
        """One batch for critic, generator and classifier."""
        self.classifier_optimizer.zero_grad(set_to_none=True)
        task = super().step(batch, progress)
        self.classifier_optimizer.step()
        return task


class Residual(nn.Module):
    """Two layers whose answer is added to what they were given; the identity before training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = conv(width, width)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(nn.ReLU(), conv(width, width), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Features, shaped like x (N, width, H, W)."""
        y: Tensor = x + self.layers(x)
        return y


class Denoiser(nn.Module):
    """A generator that learns in a few thousand steps: what comes in keeps its scale through all
    layers (He et al. 2015, section 2.2), as it does not in `Purifier`, which begins by fading it.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        inner = [Residual(width) for _ in range(blocks)]
        last = conv(width, 12)
        nn.init.zeros_(last.weight)
        self.residual: nn.Module = nn.Sequential(
            nn.PixelUnshuffle(2), conv(12, width), *inner, nn.ReLU(), last, nn.PixelShuffle(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Purified images, shaped like x (N, 3, H, W) with H and W even."""
        residual: Tensor = self.residual(x)
        return (x + residual).clamp(0, 1)


def conv(channels: int, out: int) -> nn.Conv2d:
    """3x3, drawn so that ReLUs keep the variance."""
    layer = nn.Conv2d(channels, out, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class AgainstStatic:
    """Trains a Denoiser on attacks that see the classifier alone, as APE-GAN's (Shen et al. 2017)
    are. They do not depend on the purifier, so a batch that was attacked serves `uses` times.
    """

    def __init__(
        self, classifier: Classifier, recipe: PurifierRecipe, folder: Path, *,
        width: int, blocks: int, uses: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(recipe.seed)
        self.classifier, self.recipe, self.uses = classifier.requires_grad_(False), recipe, uses
        self.classifier.to(memory_format=torch.channels_last)
        self.model = Denoiser(width, blocks).to(classifier.mean.device)
        self.model.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr)
        parts: dict[str, Part] = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        settings = repr((width, blocks, uses, recipe, checkpoint.digest(classifier)))
        self.run = Run(folder, settings, parts, seed=recipe.seed)
        self.attacked: list[tuple[Batch, Tensor]] = []  # the last ones
        self.draws = random.Random(recipe.seed)

    def craft(self, batch: Batch) -> Tensor:
        """PGD on the bare classifier; every fourth image stays clean, or such would suffer."""
        threat, steps = self.recipe.threat, self.recipe.steps
        start = random_start(batch.x, threat, batch.noise)
        loss, size = cross_entropy(self.classifier, batch.label), threat.eps * 1.5 / steps
        x = pgd(loss, batch.x, threat, steps=steps, step_size=size, start=start, keep_best=False)
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) % 4 == 0, batch.x, x)

    def step(self, batch: Batch, progress: float) -> Tensor:
        """One new batch and some of those before it; returns the new one's task loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * one_cycle(progress)
        batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
        with autocast(self.classifier.mean.device, self.recipe.precision):
            new = batch, self.craft(batch)
            others = self.draws.sample(self.attacked, min(self.uses - 1, len(self.attacked)))
            task, *_ = [self.descend(*pair) for pair in (new, *others)]
        self.attacked = [*self.attacked, new][-200:]
        return task

    def descend(self, batch: Batch, x: Tensor) -> Tensor:
        """One step towards the clean image and its label."""
        purified = self.model(x)
        task = F.cross_entropy(self.classifier(purified).float(), batch.label)
        self.optimizer.zero_grad(set_to_none=True)
        (F.l1_loss(purified, batch.x) + task).backward()
        self.optimizer.step()
        self.run.steps += 1
        update_ema(self.ema, self.model, min(0.995, self.run.steps / (10 + self.run.steps)))
        return task.detach()


SETTINGS: dict[str, tuple[type[PurifierTrainer], PurifierConfig]] = {
    "towards the clean image, 48 channels": (PurifierTrainer, PurifierConfig()),
    "towards the attacked one, as AToP": (TowardsAttacked, PurifierConfig()),
    "24 channels": (PurifierTrainer, PurifierConfig(width=24)),
    "96 channels": (PurifierTrainer, PurifierConfig(width=96)),
    "classifier tuned with it": (Jointly, PurifierConfig()),
}


def trained(
    kind: type[PurifierTrainer],
    config: PurifierConfig,
    classifier: Classifier,
    images: Images,
    options: argparse.Namespace,
) -> tuple[nn.Module, Classifier]:
    """A purifier trained on `images`, and the classifier that it was trained with."""
    precision = fast_precision(classifier.mean.device, cpu_features())
    epochs = options.epochs
    recipe = PurifierRecipe(THREAT, epochs, options.batch_size, precision=precision)
    trainer = kind(copy.deepcopy(classifier), config, recipe, NEVER)
    trainer.run.save_every = float("inf")
    for trainer.run.epoch in range(epochs):
        trainer.run.done = 0
        trainer.run.pass_over(images, trainer.step, epochs=epochs, batch_size=recipe.batch_size)
    return trainer.ema, trainer.classifier.requires_grad_(False)


def adaptive(options: argparse.Namespace, train: Images, validation: Images) -> Iterator[str]:
    """A line for each setting: clean and under PGD-10 that sees purifier and classifier."""
    bare = load_classifier(options.model / "weights.safetensors")
    yield in_words("no purifier", validate(bare, validation, THREAT), len(validation))
    for name, (kind, config) in SETTINGS.items():
        purifier, classifier = trained(kind, config, bare, train, options)
        both = validate(nn.Sequential(purifier, classifier), validation, THREAT)
        yield in_words(name, both, len(validation))
        if kind is Jointly:
            alone = validate(classifier, validation, THREAT)
            yield in_words("that classifier alone", alone, len(validation))


def in_words(name: str, figures: dict[str, float], count: int) -> str:
    """A row of the table."""
    cells = [f"{what} {value:.1%} ({low:.1%} to {high:.1%})" for what, value in figures.items()
             for low, high in [wilson(value, count)]]  # fmt: skip
    return f"{name:38} " + "  ".join(cells)


def static(options: argparse.Namespace, train: Images, validation: Images) -> Iterator[str]:
    """Accuracy of an undefended classifier without and with a purifier of its own."""
    bare = load_classifier(options.undefended / "weights.safetensors")
    precision = fast_precision(bare.mean.device, cpu_features())
    recipe = PurifierRecipe(
        THREAT, options.epochs, options.batch_size, steps=5, precision=precision
    )  # fmt: skip
    trainer = AgainstStatic(
        bare, recipe, options.out, width=options.width, blocks=options.blocks, uses=options.uses
    )
    both = nn.Sequential(trainer.ema, bare)
    trainer.run.fit(
        train,
        trainer.step,
        lambda: validate(both, validation, THREAT),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        keep=lambda: None,
    )
    x, label, clean = to_float(validation.image), validation.label, right(bare, validation)
    yield in_words("clean", {"bare": clean, "purified": right(both, validation)}, len(validation))
    for name, attack in attacks().items():
        made = attack(lambda x: View(bare(x)), x, label)
        after = right(bare, validation, made), right(both, validation, made)
        yield in_words(name, dict(zip(("bare", "purified"), after, strict=True)), len(validation))
        yield f"  recovered: {(after[1] - after[0]) / (clean - after[0]):.1%} of what was lost"
    known = {"purified": trainer.run.history[-1]["pgd10"]}
    yield in_words("PGD-10 that knows the purifier", known, len(validation))


def attacks() -> dict[str, Callable[[Look, Tensor, Tensor], Tensor]]:
    """Attacks on a classifier that know nothing of a purifier."""
    return {
        "PGD-20, static": lambda look, x, label: rungs.pgd20(look, x, label, THREAT),
        "AutoAttack, short, static": lambda look, x, label: rungs.autoattack(
            look, x, label, THREAT, rungs.QUICK
        ),
    }


def right(net: nn.Module, images: Images, x: Tensor | None = None) -> float:
    """Share of `images`, or of x (N, 3, H, W) made from them, that `net` labels right."""
    with torch.no_grad():
        parts = (to_float(images.image) if x is None else x).split(128)
        guess = torch.cat([net(part).argmax(1) for part in parts])
    return float((guess == images.label).float().mean())


def main() -> None:
    """One of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["adaptive", "static"])
    parser.add_argument("--data", type=Path, required=True, help="training images")
    parser.add_argument("--held", type=Path, help="held-out images; default a tenth of --data")
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--undefended", type=Path, default=Path("model_store/cifar10-undefended"))
    parser.add_argument("--images", type=int, default=12_800, help="to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=64, help="of the static purifier's layers")
    parser.add_argument("--blocks", type=int, default=3, help="of two layers, in it")
    parser.add_argument("--uses", type=int, default=6, help="of a batch, once it is attacked")
    parser.add_argument("--out", type=Path, default=Path("runs/static"), help="its state, to go on")
    parser.add_argument("--validate-on", type=int, default=500)
    options = parser.parse_args()
    held_out = load(options.held) if options.held else None
    train, held = hold_out(load_training(options.data, size=32), held_out)
    validation = spread(split(held, "validation"), options.validate_on)
    part = {"adaptive": adaptive, "static": static}[options.part]
    chosen = spread(train, options.images)
    print(f"{len(chosen)} training images, {len(validation)} validation images, {THREAT}")
    for line in part(options, chosen, validation):
        print(line, flush=True)


if __name__ == "__main__":
    main()
