"""What decides how good a purifier gets: what it is trained towards, its size, a moving classifier.

    .venv/bin/python benchmarks/purifiers.py adaptive --data cifar10/ --held HELD.npz
    .venv/bin/python benchmarks/purifiers.py static --data cifar10/ --held HELD.npz
    .venv/bin/python benchmarks/purifiers.py together --data cifar10/ --held HELD.npz \\
        --images 50000 --epochs 30

adaptive  purifiers of one classifier, each trained on the same images; PGD-10 through both
static    a purifier of an undefended classifier, against attacks that do not know it: how much of
          the lost accuracy comes back, and what is left of that once the attack knows it
together  generator and classifier trained as one network from the start, by the classifier's own
          recipe, beside a classifier that is wider by about what the generator costs
`adaptive` takes ten minutes a row for 12,800 images on two cores; `static` an hour and a half for
36,000 on one, and goes on where it was, as does `together`.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rampart.handlers.engine import cpu_features
from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.objectives import Look, View
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.purifier import BlockPurifierConfig, PurifierConfig, of_config
from rampart.hardening.train.data import Batch, hold_out, load, load_training, spread
from rampart.hardening.train.loop import Recipe, Trainer, fast_precision, validate
from rampart.hardening.train.purifier import STATIC, PurifierRecipe, PurifierTrainer

THREAT = Threat()
NEVER = Path("never-written")


class TowardsAttacked(PurifierTrainer):
    """As AToP tunes a generator (Lin et al. 2024, section 3.3): the attacked image is the target,
    and what the critic takes for real, and the task loss alone undoes the attack."""

    def descend(self, batch: Batch, attacked: Tensor) -> Tensor:
        """One step towards the attacked image."""
        return super().descend(batch._replace(x=attacked), attacked)


class Jointly(PurifierTrainer):
    """The classifier moves too, its BatchNorm statistics apart."""

    def __init__(
        self, classifier: Classifier, config: Any, recipe: PurifierRecipe, folder: Path
    ) -> None:
        super().__init__(classifier, config, recipe, folder)
        moving = classifier.requires_grad_(True).parameters()
        self.classifier_optimizer = torch.optim.SGD(moving, lr=0.01, momentum=0.9)

    def descend(self, batch: Batch, attacked: Tensor) -> Tensor:
        """One step of critic, generator and classifier."""
        self.classifier_optimizer.zero_grad(set_to_none=True)
        task = super().descend(batch, attacked)
        self.classifier_optimizer.step()
        return task


class Together(Classifier):
    """A classifier with a generator in front, for one trainer to train as one network."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.purifier = of_config(USUAL)

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (N, F) of purified x (N, 3, H, W)."""
        return super().embed(self.purifier(x))

    def all_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, K) of purified x (N, 3, H, W)."""
        return super().all_logits(self.purifier(x))


USUAL = BlockPurifierConfig()
SETTINGS: dict[str, tuple[type[PurifierTrainer], Any, int]] = {
    "towards the clean image": (PurifierTrainer, USUAL, 1),
    "each attack used four times": (PurifierTrainer, USUAL, 4),
    "towards the attacked one, as AToP": (TowardsAttacked, USUAL, 1),
    "plain layers": (PurifierTrainer, PurifierConfig(), 1),
    "half the channels": (PurifierTrainer, USUAL._replace(width=USUAL.width // 2), 1),
    "twice the channels": (PurifierTrainer, USUAL._replace(width=2 * USUAL.width), 1),
    "classifier tuned with it": (Jointly, USUAL, 1),
}


def trained(
    kind: type[PurifierTrainer],
    config: Any,
    replays: int,
    classifier: Classifier,
    images: Images,
    options: argparse.Namespace,
) -> tuple[nn.Module, Classifier]:
    """A purifier trained on `images`, and the classifier that it was trained with."""
    recipe = recipe_of(options, classifier)._replace(replays=replays)
    trainer = kind(copy.deepcopy(classifier), config, recipe, NEVER)
    trainer.run.save_every = float("inf")
    for trainer.run.epoch in range(recipe.epochs):
        trainer.run.done = 0
        size = {"epochs": recipe.epochs, "batch_size": recipe.batch_size}
        trainer.run.pass_over(images, trainer.step, **size)
    return trainer.ema, trainer.net.requires_grad_(False)


def recipe_of(options: argparse.Namespace, classifier: Classifier) -> PurifierRecipe:
    """As long as the options say, in the precision that this machine is fast in."""
    precision = fast_precision(classifier.mean.device, cpu_features())
    return PurifierRecipe(THREAT, options.epochs, options.batch_size, precision=precision)


def adaptive(options: argparse.Namespace, train: Images, validation: Images) -> Iterator[str]:
    """A line for each setting: clean and under PGD-10 that sees purifier and classifier."""
    bare = load_classifier(options.model / "weights.safetensors")
    yield in_words("no purifier", validate(bare, validation, THREAT), len(validation))
    for name, (kind, config, replays) in SETTINGS.items():
        purifier, classifier = trained(kind, config, replays, bare, train, options)
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
    recipe = recipe_of(options, bare)._replace(**STATIC | {"replays": options.replays})
    config = BlockPurifierConfig(options.width, options.blocks)
    trainer = PurifierTrainer(bare, config, recipe, options.out)
    both = nn.Sequential(trainer.ema, bare)
    trainer.run.fit(
        train,
        trainer.step,
        lambda held: validate(both, held, THREAT),
        chosen_on=validation,
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


def together(options: argparse.Namespace, train: Images, validation: Images) -> Iterator[str]:
    """A line each for purifier and classifier, and for a classifier that costs about as much."""
    config = load_classifier(options.model / "weights.safetensors").config
    own, pair = Classifier(config), Together(config)
    width = config.width * (macs(pair) / macs(own)) ** 0.5
    for name, net in {"both": pair, "wider": Classifier(config._replace(width=width))}.items():
        precision = fast_precision(net.mean.device, cpu_features())
        size = {"epochs": options.epochs, "batch_size": options.batch_size}
        trainer = Trainer(
            net, Recipe(threat=THREAT, precision=precision, **size), options.out / name
        )
        judge = partial(validate, trainer.ema, threat=THREAT)
        trainer.run.fit(train, trainer.step, judge, chosen_on=validation, keep=lambda: None, **size)
        last = {what: trainer.run.history[-1][what] for what in ("clean", "pgd10")}
        title = f"{name}, {macs(net) / 1e6:.0f} million multiplications"
        yield in_words(title, last, len(validation))


def macs(net: Classifier) -> int:
    """Multiplications of the convolutions for one image."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    total = list[int]()

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        total.append(out[0].numel() * layer.get_parameter("weight")[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in layers]
    size = net.config.image_size
    with torch.no_grad():
        copy.deepcopy(net).eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(total)


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
    parser.add_argument("part", choices=["adaptive", "static", "together"])
    parser.add_argument("--data", type=Path, required=True, help="training images")
    parser.add_argument("--held", type=Path, help="held-out images; default a tenth of --data")
    parser.add_argument("--model", type=Path, default=Path("model_store/cifar10"))
    parser.add_argument("--undefended", type=Path, default=Path("model_store/cifar10-undefended"))
    parser.add_argument("--images", type=int, default=12_800, help="to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=USUAL.width, help="of the static purifier")
    parser.add_argument("--blocks", type=int, default=USUAL.blocks, help="of two layers, in it")
    parser.add_argument("--replays", type=int, default=4, help="steps with each attack")
    parser.add_argument("--out", type=Path, default=Path("runs/static"), help="its state, to go on")
    parser.add_argument("--validate-on", type=int, default=500)
    options = parser.parse_args()
    held_out = load(options.held) if options.held else None
    train, held = hold_out(load_training(options.data, size=32), held_out)
    validation = spread(split(held, "validation"), options.validate_on)
    part = {"adaptive": adaptive, "static": static, "together": together}[options.part]
    chosen = spread(train, options.images)
    print(f"{len(chosen)} training images, {len(validation)} validation images, {THREAT}")
    for line in part(options, chosen, validation):
        print(line, flush=True)


if __name__ == "__main__":
    main()
