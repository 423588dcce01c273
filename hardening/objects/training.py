"""Adversarial training of object detectors by their own losses, in the loop of classifiers.

Sources: which loss to climb, Zhang and Wang 2019 (section 4: one loss a step, the strongest for
each image); N-FGSM, de Jorge et al. 2022; from an adversarially trained backbone, Li et al. 2023.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Loss, Threat, n_fgsm, pgd, pgd10, random_start
from rampart.hardening.model import checkpoint, provenance
from rampart.hardening.objects.attack import losses_together
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.detector import ObjectDetector, described
from rampart.hardening.objects.jitter import check_jitters
from rampart.hardening.objects.judge import attacked, seen
from rampart.hardening.objects.precision import precision
from rampart.hardening.objects.scenes import Boxed, Lessons, SceneBatch, Scenes
from rampart.hardening.train import distributed, loop
from rampart.hardening.train import state as states
from rampart.hardening.train.loop import Part, Precision, Run, autocast
from rampart.hardening.train.provenance import entry, of_all, portions
from rampart.hardening.train.purifier import PurifierTrainer

METHODS = ("standard", "nfgsm", "pgd")
AIMS = ("sum", "alternate", "strongest")
CLIP = 10.0  # norm of the gradients of a step, at most


class ObjectRecipe(NamedTuple):
    """Hyperparameters of a training; a run resumes only under the recipe it began with."""

    method: str = "nfgsm"
    threat: Threat = Threat(eps=4 / 255)
    epochs: int = 30
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.02
    ema: float = 0.99
    seed: int = 0
    aim: str = "alternate"  # of the attack: the sum of losses, one at random, or the strongest
    ramp: float = 0.0  # part of the run during which eps grows from 0
    steps: int = 10  # of pgd
    precision: Precision = "fp32"
    augment: tuple[str, ...] = ("flip", "crop", "shrink", "light")  # of JITTERS, in their order
    passes: int = 1  # over the pictures in an epoch, after which it is validated
    # The weights that this run goes on from, where it does not start afresh.
    after: str = ""


def total(detector: ObjectDetector, truth: Sequence[Truth]) -> Loss:
    """The sum of all losses of each image."""
    return partial(losses_together, detector, truth=truth)


def single(detector: ObjectDetector, truth: Sequence[Truth], name: str) -> Loss:
    """One loss of each image."""
    return lambda x: detector.image_losses(x, truth)[name]


def one_of(detector: ObjectDetector, truth: Sequence[Truth], draw: Tensor) -> Loss:
    """One loss for each image, chosen by `draw` (N,) in [0, 1)."""

    def loss(x: Tensor) -> Tensor:
        every = torch.stack([*detector.image_losses(x, truth).values()])  # (L, N)
        return every.gather(0, (draw * len(every)).long()[None])[0]

    return loss


def craft(
    detector: ObjectDetector, batch: SceneBatch, recipe: ObjectRecipe, threat: Threat
) -> Tensor:
    """The batch's images, attacked as the recipe says."""
    if recipe.method == "standard":
        return batch.x

    def attack(loss: Loss) -> Tensor:
        if recipe.method == "nfgsm":
            return n_fgsm(loss, batch.x, threat, noise=batch.noise)
        start, size = random_start(batch.x, threat, batch.noise), 2.5 * threat.eps / recipe.steps
        return pgd(
            loss, batch.x, threat, steps=recipe.steps, step_size=size, start=start, keep_best=False
        )

    truth = batch.truth
    if recipe.aim == "sum":
        return attack(total(detector, truth))
    if recipe.aim == "alternate":
        return attack(one_of(detector, truth, batch.noise.uniform()))
    losses = [single(detector, truth, name) for name in detector.net.loss_names]
    return strongest_of(detector, truth, [attack(loss) for loss in losses])


def strongest_of(
    detector: ObjectDetector, truth: Sequence[Truth], attacked: Sequence[Tensor]
) -> Tensor:
    """Of several attacks on each image the one that its detector loses most by."""
    judge = total(detector, truth)
    with torch.no_grad():
        lost = torch.stack([judge(x) for x in attacked])  # (L, N)
    every = torch.stack(list(attacked))
    return every[lost.argmax(0), torch.arange(every.shape[1], device=every.device)]


def validate(detector: ObjectDetector, boxed: Boxed, threat: Threat) -> dict[str, float]:
    """The figures of an epoch: mAP50, clean and under PGD-10 on the sum of losses."""

    def craft(x: Tensor, truth: Sequence[Truth], *, noise: Noise) -> Tensor:
        return pgd10(total(detector, truth), x, threat, noise=noise)

    def map50(image: Tensor) -> float:
        return precision(boxed.truth, seen(detector, image), len(boxed.classes)).map50

    return {"clean": map50(boxed.image), "pgd10": map50(attacked(boxed, craft, threat))}


class ObjectTrainer:
    """Adversarial training of one object detector, from the weights it has."""

    def __init__(self, detector: ObjectDetector, recipe: ObjectRecipe, folder: Path) -> None:
        if recipe.method not in METHODS:
            raise ValueError(
                f"unknown method {recipe.method!r}: object detectors have {', '.join(METHODS)}"
            )
        if recipe.aim not in AIMS:
            raise ValueError(f"unknown aim {recipe.aim!r}: choose one of {', '.join(AIMS)}")
        loop.one_part(recipe.batch_size)
        check_jitters(recipe.augment)
        self.recipe, self.device = recipe, detector.mean.device
        self.model = detector.requires_grad_(True)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        names = ("model", "ema", "optimizer")
        parts: dict[str, Part] = {name: getattr(self, name) for name in names}
        settings = repr((detector.config, recipe, checkpoint.digest(detector)))
        self.run = Run(
            folder,
            settings,
            parts,
            seed=recipe.seed,
            augmentations=recipe.augment,
            figure="validation mAP50",
        )

    def step(self, batch: SceneBatch, progress: float) -> Tensor:
        """Craft, descend, average; returns the loss on the perturbed batch."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * loop.one_cycle(progress)
        batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
        threat = recipe.threat._replace(eps=recipe.threat.eps * loop.ramp(progress, recipe.ramp))
        with autocast(self.device, recipe.precision):
            self.model.eval()
            x = craft(self.model, batch, recipe, threat)
            self.model.train()
            losses = self.model.losses(x, batch.truth)
            loss = torch.stack([*losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        statistics = [b for name, b in self.model.named_buffers() if "running_" in name]
        value = loss.detach()
        distributed.average([*gradients, *statistics, value])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.run.steps += 1
        decay = min(recipe.ema, self.run.steps / (10 + self.run.steps))
        loop.update_ema(self.ema, self.model, decay)
        return value


def train_objects(
    detector: ObjectDetector,
    recipe: ObjectRecipe,
    folder: Path,
    scenes: tuple[Scenes, Boxed],
    *,
    commands: Sequence[str] = (),
) -> Path:
    """Train `detector` by `recipe` on `scenes` (training, validation), in `folder`. Returns the
    file of the epoch with the best validation mAP50: under PGD-10, or clean for the control.
    """
    trainer = ObjectTrainer(detector, recipe, folder)
    train, file = scenes[0], folder / "objects.safetensors"
    lessons = Lessons(train, detector.config.size, recipe.passes, trainer.device)
    best = "clean" if recipe.method == "standard" else "pgd10"
    learn = partial(fit, best=best, commands=commands)
    learn(trainer, trainer.ema, (lessons, scenes[1]), file, described(trainer.ema))
    return file


def fit(
    trainer: ObjectTrainer | PurifierTrainer,
    net: ObjectDetector,
    scenes: tuple[Lessons, Boxed],
    file: Path,
    content: dict[str, Any],
    *,
    commands: Sequence[str],
    best: str = "pgd10",
) -> None:
    """Run all epochs; `file` gets the averaged weights of the one where `net` has the `best`."""
    recipe, run, lessons = trainer.recipe, trainer.run, scenes[0]
    if file.exists() and states.read(file.parent) is None:
        raise ValueError(f"{file} exists, but no state to resume from: choose another --out")
    validation = scenes[1].to(trainer.device)
    origin = noted(file.parent, lessons, validation)
    origin["training"] = repr(recipe)

    def keep() -> None:
        past = {"history": [run.history], "commands": list(commands)}
        checkpoint.save(file, trainer.ema, content | origin | past)

    def evaluate(few: Boxed) -> dict[str, float]:
        return validate(net, few, recipe.threat)

    size = {"epochs": recipe.epochs, "batch_size": recipe.batch_size}
    run.fit(lessons, trainer.step, evaluate, chosen_on=validation, keep=keep, best=best, **size)


def noted(folder: Path, lessons: Lessons, held: Boxed) -> dict[str, object]:
    """Write down beside the weights which pictures they are made of, once; returns the file's
    entry.
    """
    begun = provenance.read(folder) if states.unfinished(folder) else None
    prints = distributed.from_first(begun)
    if prints is None:
        scenes, size = lessons.scenes, lessons.size
        prints = of_all(scenes[r.tolist()].boxed(size).image for r in portions(len(scenes)))
        if distributed.first():
            provenance.write(folder, prints)
    return {"images": entry(prints, held.image)}
