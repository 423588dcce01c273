"""Adversarial training: SGD on perturbed images, one-cycle schedule, EMA, resumable.

Sources: N-FGSM, de Jorge et al. 2022; one-cycle, Smith 2018; weight averaging against robust
overfitting, Gowal et al. 2020 (section 4.3); BatchNorm in eval mode while crafting, Pang et al.
2021 ("Bag of Tricks", section 3).
"""

import copy
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat, cross_entropy, pgd10
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float
from rampart.hardening.train import distributed, provenance
from rampart.hardening.train import state as states
from rampart.hardening.train.augmentation import MIXTURES, check_augmentations, cutmix
from rampart.hardening.train.convergence import Convergence
from rampart.hardening.train.data import Batch, Folder, shuffled
from rampart.hardening.train.interrupt import Stop, on_interrupt
from rampart.hardening.train.methods import METHODS, adversarial_weights, rectification

if TYPE_CHECKING:
    from rampart.hardening.train.purifier import PurifierTrainer

Part = nn.Module | torch.optim.Optimizer
Step = Callable[[Any, float], Tensor]  # of a batch as the training data yields it
Precision = Literal["bf16", "fp32"]
History = list[dict[str, float]]  # a row an epoch
WARMUP = 0.2  # part of a run
AGREE = 8  # steps after which several processes ask each other whether to stop
SETTING = re.compile(r"(\w+)=('[^']*'|\([^)]*\)|[\w.+-]+)(?=[,)])")  # in the text of a recipe
# What a run's state holds beside its parts.
POSITION = ("settings", "history", "loss", "epoch", "done", "steps", "minutes")


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
    steps: int = 10  # of the attack, where the method has more than one
    precision: Precision = "fp32"
    teacher: str = ""  # stands for the weights of the network that is distilled from
    augment: tuple[str, ...] = ("flip", "crop")  # of AUGMENTATIONS and MIXTURES, in their order
    # The recipe that made the weights this run goes on from, where it does not start afresh.
    after: str = ""
    balance: float = 0.0  # 0: images as often as they are; 1: classes equally often

    def __repr__(self) -> str:
        # What runs go on under says of those without balance what it always said.
        shown = self._asdict()
        if not self.balance:
            del shown["balance"]
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def one_cycle(progress: float) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear up to 1 at WARMUP, then to 0."""
    return progress / WARMUP if progress < WARMUP else (1 - progress) / (1 - WARMUP)


def ramp(progress: float, length: float) -> float:
    """Share of eps at `progress` in [0, 1]: grows in a line up to `length`, then stays 1."""
    return min(1.0, progress / length) if length else 1.0


def fast_precision(device: torch.device, features: set[str]) -> Precision:
    """bf16 on GPUs, and on a CPU whose `features` have it; others imitate it slowly."""
    fast = {"avx512_bf16", "amx_bf16", "bf16"}
    return "bf16" if device.type != "cpu" or features & fast else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Mixed precision in bfloat16, which needs no loss scaling; nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's; BatchNorm's statistics are averaged too."""
    slow, fast = [], []
    for average, now in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if average.dtype.is_floating_point:
            slow.append(average)
            fast.append(now)
        else:  # a counter
            average.copy_(now)
    get_ema_multi_avg_fn(decay)(slow, fast, None)  # type: ignore[no-untyped-call]


def accuracy(model: nn.Module, images: Images, *, threat: Threat | None = None) -> float:
    """Share of `images` that all processes label right, under PGD-10 where there is a `threat`."""
    every = distributed.mine(torch.arange(len(images), device=images.label.device))
    right = torch.zeros((), dtype=torch.int64, device=every.device)
    title = "PGD-10 on validation images" if threat else "validation images"
    pieces = tqdm(torch.split(every, 128), title, leave=False, disable=not distributed.first())
    for index in pieces:
        x, label = to_float(images.image[index]), images.label[index]
        if threat:
            x = pgd10(cross_entropy(model, label), x, threat, noise=Noise(index))
        with torch.no_grad():
            right += (model(x).argmax(1) == label).sum()
    return int(distributed.total(right)) / len(images)


def validate(model: nn.Module, images: Images, threat: Threat) -> dict[str, float]:
    """The figures of an epoch: clean and PGD-10 accuracy."""
    return {"clean": accuracy(model, images), "pgd10": accuracy(model, images, threat=threat)}


class Digested(Protocol):
    """What an epoch is judged on."""

    def digest(self) -> str:
        """Stands for all of it."""


class Lessons(Digested, Protocol):
    """What a run learns from."""

    def __len__(self) -> int: ...

    def shuffled(
        self, size: int, *, seed: int, epoch: int, skip: int, augmentations: Sequence[str]
    ) -> Iterator[Any]:
        """The batches of an epoch after the first `skip`; all follows from `seed` and `epoch`."""


D = TypeVar("D", bound=Digested)


class Run:
    """A resumable run, on any number of processes: named parts with a state, position, figures."""

    def __init__(
        self,
        folder: Path,
        settings: str,
        parts: dict[str, Part],
        *,
        seed: int = 0,
        augmentations: Sequence[str] = ("flip", "crop"),
        balance: float = 0.0,
        save_every: float = 300.0,
        figure: str = "validation accuracy",
    ) -> None:
        self.folder, self.settings, self.parts = folder, settings, parts
        self.seed, self.augmentations, self.save_every = seed, augmentations, save_every
        self.balance = balance
        self.epoch, self.done, self.steps = 0, 0, 0  # `done` are the steps of this epoch
        self.loss = torch.zeros((), dtype=torch.float64)  # their sum
        self.minutes, self.since = 0.0, time.monotonic()  # up to the last save, and that moment
        self.figure = figure  # what `clean` and `pgd10` of the history are
        self.history: History = []
        self.stop = Stop()
        self.earlier: list[History] = []  # of the runs that made the weights this one began with

    def worked(self) -> float:
        """Minutes of wall clock in all, of what was saved and kept."""
        return self.minutes + (time.monotonic() - self.since) / 60

    def check(self) -> None:
        """Raise FloatingPointError where the loss is no longer a number."""
        if not math.isfinite(float(self.loss)):
            raise FloatingPointError(f"training diverged in epoch {self.epoch + 1}: lower --lr")

    def save(self) -> None:
        """Write the whole state; a crash in between leaves the last one intact."""
        self.check()
        self.minutes, self.since = self.worked(), time.monotonic()
        if distributed.first():
            state = {name: part.state_dict() for name, part in self.parts.items()}
            states.save(self.folder, state | {name: getattr(self, name) for name in POSITION})

    def end_here(self) -> None:
        """Raise KeyboardInterrupt, with all saved, where Ctrl-C asked for the end."""
        asked = self.stop.asked
        if distributed.place()[1] > 1:  # all stop after the same step
            if self.done % AGREE:
                return
            asked = any(distributed.gather(asked))
        if asked:
            self.save()
            raise KeyboardInterrupt

    def resume(self) -> None:
        """Continue the folder's run, if any. ValueError for other settings, or unlike processes."""
        if len(set(distributed.gather(self.settings))) > 1:
            raise ValueError(
                "the processes do not begin with the same images and weights: give each machine"
                " the same files"
            )
        state = distributed.from_first(states.read(self.folder) if distributed.first() else None)
        if state is None:
            return
        if state["settings"] != self.settings:
            which = different(state["settings"], self.settings)
            raise ValueError(
                f"{self.folder} holds a run with other settings or images ({which}):"
                f" {state['settings']}. Continue it with those, or choose another --out"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name in POSITION:
            setattr(self, name, state[name])
        say(f"continuing {self.folder} at epoch {self.epoch + 1}, step {self.done + 1}")

    def pass_over(
        self, images: Images | Folder | Lessons, step: Step, *, epochs: int, batch_size: int
    ) -> float:
        """The rest of one epoch of `step(batch, progress)`; returns the epoch's mean loss."""
        rank, world = distributed.place()
        count = max(1, len(images) // batch_size)
        if isinstance(images, Images | Folder):
            own: Callable[..., Iterator[Any]] = partial(shuffled, images, balance=self.balance)
        else:
            own = images.shuffled
        rounds = partial(own, batch_size, seed=self.seed, epoch=self.epoch)
        title, quiet = f"epoch {self.epoch + 1}/{epochs}", not distributed.first()
        with tqdm(total=count, initial=self.done, desc=title, disable=quiet) as bar:
            shown = time.monotonic()
            for batch in rounds(skip=self.done, augmentations=self.augmentations):
                torch.manual_seed(self.seed + self.steps * world + rank)  # for dropout
                loss = step(batch, (self.epoch + self.done / count) / epochs)
                self.loss = self.loss.to(loss.device) + loss
                self.done += 1
                bar.update()
                # Reading the loss waits for the device, so it is read once a second.
                if time.monotonic() - shown > 1:
                    bar.set_postfix(loss=f"{float(self.loss) / self.done:.3f}")
                    shown = time.monotonic()
                if time.monotonic() - self.since > self.save_every:
                    self.save()
                self.end_here()
        return float(self.loss) / count

    def fit(
        self,
        images: Images | Folder | Lessons,
        step: Step,
        evaluate: Callable[[D], dict[str, float]],
        *,
        chosen_on: D,
        epochs: int,
        batch_size: int,
        keep: Callable[[], None],
        best: str = "pgd10",
    ) -> None:
        """Run the epochs that are left; `keep` follows each with the best figure so far.

        Ctrl-C ends it after a step, or amid a validation, with its state saved.
        """
        if not len(images):
            raise ValueError("no image is left to train on: all are among the held-out ones")
        self.settings += f" on images {images.digest()[:16]}, chosen on {chosen_on.digest()[:16]}"
        with on_interrupt(self.stop):
            self.resume()
            while self.epoch < epochs:
                loss = self.pass_over(images, step, epochs=epochs, batch_size=batch_size)
                self.end_epoch(loss, self.judged(evaluate, chosen_on), keep, best)
                self.end_here()

    def judged(self, evaluate: Callable[[D], dict[str, float]], images: D) -> dict[str, float]:
        """The figures of an epoch whose steps are done: Ctrl-C saves those."""
        self.check()
        try:
            self.stop.at_once = True
            return evaluate(images)
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            self.stop.at_once = False

    def end_epoch(
        self, loss: float, figures: dict[str, float], keep: Callable[[], None], best: str
    ) -> None:
        """Note an epoch's figures, keep its weights if they are the best so far, and save."""
        row = {"epoch": self.epoch + 1, "loss": loss} | figures | {"minutes": self.worked()}
        say("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        # Of two epochs that are as robust, the more accurate one.
        merit = [(old[best], old["clean"]) for old in [*self.history, row]]
        better = merit[-1] > max(merit[:-1], default=(-1.0, -1.0))
        self.history.append(row)
        if better and distributed.first():
            keep()
        self.epoch, self.done, self.loss = self.epoch + 1, 0, torch.zeros_like(self.loss)
        self.save()
        draw([*self.earlier, self.history], self.folder / "curve.png", self.figure)


def different(before: str, now: str) -> str:
    """Which settings of a run are others now."""
    old, new = (dict(SETTING.findall(settings)) for settings in (before, now))
    changed = [
        f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]
    ]
    return "; ".join(changed) or "its weights or images are others"


def augmentations_of(training: str) -> tuple[str, ...] | None:
    """The augmentations in the text of a recipe; None where it tells none, as of adopted weights.

    The last of several recipes stands first: each holds the one before it.
    """
    augment = dict(reversed(SETTING.findall(training))).get("augment")
    return None if augment is None else tuple(re.findall(r"\w+", augment))


def draw(runs: Sequence[History], file: Path, figure: str = "validation accuracy") -> None:
    """Write the learning curve of `runs`, where matplotlib is installed."""
    with suppress(ImportError):
        from rampart.hardening.train.curve import learning_curve

        if distributed.first():
            learning_curve(runs, file, figure)


def say(line: str) -> None:
    """Print a line, from one process, without breaking a progress bar."""
    if distributed.first():
        tqdm.write(line)


def one_part(batch_size: int) -> None:
    """Raise ValueError where batches cannot be shared out evenly."""
    _, world = distributed.place()
    if batch_size % world:
        raise ValueError(f"--batch-size {batch_size} does not divide among {world} processes")


def check_mixtures(recipe: Recipe, classifier: Classifier) -> None:
    """Raise ValueError where mixed images meet what takes one label an image."""
    if not set(recipe.augment) & set(MIXTURES):
        return
    if recipe.method == "mart":
        raise ValueError("--augment cutmix does not work with mart, whose loss takes one label")
    if classifier.config.rectified:
        raise ValueError("--augment cutmix does not work with --rectify, which takes one label")


class Trainer:
    """Adversarial training of one classifier, from the weights it has."""

    def __init__(
        self,
        classifier: Classifier,
        recipe: Recipe,
        folder: Path,
        teacher: Classifier | None = None,
    ) -> None:
        if recipe.method not in METHODS:
            methods = ", ".join(METHODS)
            raise ValueError(f"unknown method {recipe.method!r}: choose one of {methods}")
        if recipe.method == "rslad" and recipe.smoothing:
            raise ValueError(
                "--smoothing does not work with rslad: its labels come from the teacher"
            )
        one_part(recipe.batch_size)
        check_augmentations(recipe.augment, mixtures=True)
        check_mixtures(recipe, classifier)
        if not 0 <= recipe.balance <= 1:
            raise ValueError(f"--balance {recipe.balance:g}: use a number from 0 to 1")
        self.recipe, self.device, self.teacher = recipe, classifier.mean.device, teacher
        self.model = classifier.requires_grad_(True)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
        weights = self.model.parameters()
        self.optimizer = sgd(weights, lr=recipe.lr, weight_decay=recipe.weight_decay)
        names = ("model", "ema", "optimizer")
        parts: dict[str, Part] = {name: getattr(self, name) for name in names}
        self.convergence: Convergence | None = None
        if METHODS[recipe.method].converges:
            self.convergence = Convergence().to(self.device)
            parts["convergence"] = self.convergence
        settings = repr((classifier.config, recipe, checkpoint.digest(classifier)))
        run = partial(Run, augmentations=recipe.augment, balance=recipe.balance)
        self.run = run(folder, settings, parts, seed=recipe.seed)

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Craft, descend, average; returns the loss on the perturbed batch."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * one_cycle(progress)
        x = batch.x.contiguous(memory_format=torch.channels_last)
        batch = batch._replace(x=x, convergence=self.convergence)
        if "cutmix" in recipe.augment:
            x, label = cutmix(x, batch.label, self.model.config.classes)
            batch = batch._replace(x=x, label=label)
        with autocast(self.device, recipe.precision):
            if self.teacher is not None:
                with torch.no_grad():
                    batch = batch._replace(soft=F.softmax(self.teacher(batch.x).float(), 1))
            loss = self.descend(batch, progress)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # BatchNorm's, of which each process has seen its own part of the batch.
        statistics = [b for name, b in self.model.named_buffers() if "running_" in name]
        distributed.average([*gradients, *statistics, loss])
        self.optimizer.step()
        if self.convergence is not None:
            self.convergence.note(self.run.epoch)
        self.run.steps += 1
        update_ema(self.ema, self.model, min(recipe.ema, self.run.steps / (10 + self.run.steps)))
        return loss

    def descend(self, batch: Batch, progress: float) -> Tensor:
        """Leave the gradients of this process's part of a batch; returns its loss."""
        recipe, model = self.recipe, self.model
        method, threat = METHODS[recipe.method], recipe.threat
        threat = threat._replace(eps=threat.eps * ramp(progress, recipe.ramp))
        # BatchNorm's statistics are those of images that are learned from.
        model.eval()
        attacked = method.craft(model, batch, threat, recipe.steps)
        if model.rectifier is not None:
            with torch.no_grad():
                features = model.embed(attacked)
        model.train()
        loss = partial(method.loss, model, batch, attacked, recipe.smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        with adversarial_weights(model, loss, recipe.awp):
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
        if model.rectifier is not None:
            rectification(model, features, batch.label).backward()  # type: ignore[no-untyped-call]
        return value.detach()


def train_classifier(
    classifier: Classifier,
    recipe: Recipe,
    folder: Path,
    images: tuple[Images | Folder, Images],
    *,
    teacher: Classifier | None = None,
    earlier: Sequence[History] = (),
    commands: Sequence[str] = (),
) -> Path:
    """Train `classifier` by `recipe` on `images` (training, validation), in `folder`. `earlier` are
    the histories of the runs that made its weights. Returns the file of the epoch with the best
    validation accuracy: robust, or clean for the undefended control.
    """
    trainer = Trainer(classifier, recipe, folder, teacher)
    trainer.run.earlier = list(earlier)
    file = folder / "classifier.safetensors"
    if file.exists() and states.read(folder) is None:
        raise ValueError(f"{file} exists, but no state to resume from: choose another --out")
    content = {"classifier": classifier.config._asdict()}
    best = "clean" if recipe.method == "standard" else "pgd10"
    fit(trainer, trainer.ema, images, file, content, commands=commands, best=best)
    return file


def fit(
    trainer: "Trainer | PurifierTrainer",
    net: nn.Module,
    images: tuple[Images | Folder, Images],
    file: Path,
    content: dict[str, Any],
    *,
    commands: Sequence[str],
    best: str = "pgd10",
) -> None:
    """Run all epochs; `file` gets the averaged weights of the one where `net` has the `best`."""
    recipe, run = trainer.recipe, trainer.run
    train, validation = images[0].to(trainer.device), images[1].to(trainer.device)
    if isinstance(train, Folder):
        train = train.stored(file.parent)
    origin = {"training": repr(recipe), "images": provenance.note(file.parent, train, validation)}

    def keep() -> None:
        past = {"history": [*run.earlier, run.history], "commands": list(commands)}
        checkpoint.save(file, trainer.ema, content | origin | past)

    def evaluate(few: Images) -> dict[str, float]:
        return validate(net, few, recipe.threat)

    size = {"epochs": recipe.epochs, "batch_size": recipe.batch_size}
    run.fit(train, trainer.step, evaluate, chosen_on=validation, keep=keep, best=best, **size)
    if isinstance(train, Folder) and train.store and distributed.first():
        train.store.file.unlink()
