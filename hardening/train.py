"""Adversarial training: SGD on perturbed images, one-cycle schedule, EMA, resumable.

    rampart train --data cifar10/ --arch resnet18 --width 0.5 --epochs 12 --out runs/half

Sources: N-FGSM, de Jorge et al. 2022; one-cycle, Smith 2018; weight averaging against robust
overfitting, Gowal et al. 2020 (section 4.3); BatchNorm in eval mode while crafting, Pang et al.
2021 ("Bag of Tricks", section 3).
"""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hardening import checkpoint
from hardening.attacks import ATTACKS, Threat, cross_entropy
from hardening.data import Images, batches
from hardening.methods import METHODS, adversarial_weights
from hardening.models import Classifier

Part = nn.Module | torch.optim.Optimizer
Step = Callable[[Tensor, Tensor, float], float]


class Recipe(NamedTuple):
    """Hyperparameters of a training run; a run resumes only under the recipe it began with."""

    method: str = "nfgsm"
    threat: Threat = Threat()
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.2
    weight_decay: float = 5e-4
    ema: float = 0.998
    seed: int = 0
    smoothing: float = 0.0  # share of each label that goes to all classes alike
    awp: float = 0.0  # how far weights are moved against themselves, in parts of their norm
    ramp: float = 0.0  # part of the run during which eps grows from 0
    # The recipe that made the weights this run goes on from, where it does not start afresh.
    after: str = ""


def one_cycle(progress: float, *, warmup: float = 0.2) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear up to 1 at `warmup`, then to 0."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def ramp(progress: float, length: float) -> float:
    """Share of eps at `progress` in [0, 1]: grows in a line up to `length`, then stays 1."""
    return min(1.0, progress / length) if length else 1.0


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision in bfloat16, which needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16)


def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's; BatchNorm's statistics are averaged too."""
    with torch.no_grad():
        for slow, fast in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
            if slow.dtype.is_floating_point:
                slow.lerp_(fast, 1 - decay)
            else:
                slow.copy_(fast)


def accuracy(
    model: nn.Module, images: Images, *, attack: str | None = None, threat: Threat, seed: int = 0
) -> float:
    """Share of `images` that `model` labels right, under ATTACKS[attack] where one is named."""
    device = images.image.device
    generator = torch.Generator(device).manual_seed(seed)
    right = 0
    for x, label in batches(images, 128):
        if attack:
            x = ATTACKS[attack](cross_entropy(model, label), x, threat, generator=generator)
        with torch.no_grad():
            right += int((model(x).argmax(1) == label).sum())
    return right / len(images)


def validate(model: nn.Module, images: Images, threat: Threat) -> dict[str, float]:
    """The figures of an epoch: clean and PGD-10 accuracy."""
    clean = accuracy(model, images, threat=threat)
    return {"clean": clean, "pgd10": accuracy(model, images, attack="pgd10", threat=threat)}


class Run:
    """A resumable run: named parts that have a state, a position, and the figures so far."""

    def __init__(
        self, folder: Path, settings: str, parts: dict[str, Part], generator: torch.Generator
    ) -> None:
        self.folder, self.settings, self.parts = folder, settings, parts
        self.generator = generator
        self.epoch, self.steps = 0, 0
        self.history: list[dict[str, float]] = []

    def save(self) -> None:
        """Write the whole state; a crash in between leaves the last one intact."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"recipe": self.settings, "generator": self.generator.get_state()}
        state |= {"epoch": self.epoch, "steps": self.steps, "history": self.history}
        torch.save(state, self.folder / "state.partial")
        (self.folder / "state.partial").replace(self.folder / "state.pt")

    def resume(self) -> None:
        """Continue the run that the folder holds, if any.

        Raises ValueError when it was begun with other settings.
        """
        file = self.folder / "state.pt"
        if not file.is_file():
            return
        state: dict[str, Any] = torch.load(file, "cpu", weights_only=True)
        if state["recipe"] != self.settings:
            raise ValueError(
                f"{self.folder} holds a run with other settings: {state['recipe']}."
                " Continue it with those, or choose another --out"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.epoch, self.steps, self.history = state["epoch"], state["steps"], state["history"]
        tqdm.write(f"continuing {self.folder} after epoch {self.epoch}")

    def pass_over(self, images: Images, step: Step, *, epochs: int, batch_size: int) -> float:
        """One epoch of `step(x, label, progress)`; returns the mean of what it returns."""
        count = max(1, len(images) // batch_size)
        total = 0.0
        rounds = batches(images, batch_size, generator=self.generator)
        bar = tqdm(rounds, total=count, desc=f"epoch {self.epoch + 1}/{epochs}")
        for done, (x, label) in enumerate(bar):
            total += step(x, label, (self.epoch + done / count) / epochs)
            bar.set_postfix(loss=f"{total / (done + 1):.3f}")
        return total / count

    def fit(
        self,
        images: Images,
        step: Step,
        evaluate: Callable[[], dict[str, float]],
        *,
        epochs: int,
        batch_size: int,
        keep: Callable[[], None],
        best: str = "pgd10",
    ) -> None:
        """Run all epochs; `keep` is called when an epoch has the best figure `best` so far.

        Ctrl-C loses at most the epoch in progress: the same command continues after the last.
        """
        self.resume()
        while self.epoch < epochs:
            loss = self.pass_over(images, step, epochs=epochs, batch_size=batch_size)
            if not math.isfinite(loss):
                raise FloatingPointError(f"training diverged in epoch {self.epoch + 1}: lower --lr")
            row = {"epoch": self.epoch + 1, "loss": loss} | evaluate()
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
            if row[best] > max((old[best] for old in self.history), default=-1.0):
                keep()
            self.history.append(row)
            self.epoch += 1
            self.save()
            self.draw()

    def draw(self) -> None:
        """The learning curve beside the run, where matplotlib is installed."""
        with suppress(ImportError):
            from hardening.plots import learning_curve

            learning_curve(self.history, self.folder / "curve.png")


class Trainer:
    """Adversarial training of one classifier, from the weights it has."""

    def __init__(self, classifier: Classifier, recipe: Recipe, folder: Path) -> None:
        if recipe.method not in METHODS:
            raise ValueError(
                f"unknown method {recipe.method!r}: choose one of {', '.join(METHODS)}"
            )
        self.recipe, self.device = recipe, classifier.mean.device
        self.model = classifier.requires_grad_(True)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
        parts: dict[str, Part] = {
            "model": self.model,
            "ema": self.ema,
            "optimizer": self.optimizer,
        }
        generator = torch.Generator(self.device).manual_seed(recipe.seed)
        settings = repr((classifier.config, recipe, checkpoint.digest(classifier)))
        self.run = Run(folder, settings, parts, generator)

    def step(self, x: Tensor, label: Tensor, progress: float) -> float:
        """Craft, descend, average; returns the loss on the perturbed batch."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * one_cycle(progress)
        x = x.contiguous(memory_format=torch.channels_last)
        method, threat = METHODS[recipe.method], recipe.threat
        threat = threat._replace(eps=threat.eps * ramp(progress, recipe.ramp))
        with autocast(self.device):
            # BatchNorm's statistics are those of images that are learned from.
            self.model.eval()
            attacked = method.craft(self.model, x, label, threat, self.run.generator)
            self.model.train()
            loss = partial(method.loss, self.model, x, attacked, label, recipe.smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            with adversarial_weights(self.model, loss, recipe.awp):
                value = loss()
                value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.run.steps += 1
        update_ema(self.ema, self.model, min(recipe.ema, self.run.steps / (10 + self.run.steps)))
        return float(value.detach())


def train_classifier(
    classifier: Classifier, recipe: Recipe, folder: Path, images: tuple[Images, Images]
) -> Path:
    """Train `classifier` by `recipe` on `images` (training, validation), in `folder`.

    Returns the file of the epoch with the best validation accuracy: robust, but for a network that
    is to be the undefended control.
    """
    trainer = Trainer(classifier, recipe, folder)
    train, validation = (part.to(trainer.device) for part in images)
    best = folder / "classifier.safetensors"

    def keep() -> None:
        content = {"classifier": classifier.config._asdict(), "training": repr(recipe)}
        checkpoint.save(best, trainer.ema, content)

    trainer.run.fit(
        train,
        trainer.step,
        lambda: validate(trainer.ema, validation, recipe.threat),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        keep=keep,
        best="clean" if recipe.method == "standard" else "pgd10",
    )
    return best
