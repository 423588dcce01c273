"""Training of a purifier, against a critic and the frozen network behind it. As APE-GAN (Shen et
al. 2017) towards the clean image, with AToP's task loss (Lin et al. 2024, section 3.3) on
perturbations crafted through generator and classifier together, or through the classifier alone.
Each perturbed batch serves several steps (as Shafahi et al. 2019, algorithm 1): they cost less.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from rampart.hardening.attack.pgd import Loss, Threat, cross_entropy, pgd, random_start
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.images import Images
from rampart.hardening.model.purifier import described, of_config
from rampart.hardening.train import distributed, loop
from rampart.hardening.train.augmentation import check_augmentations
from rampart.hardening.train.data import Folder
from rampart.hardening.train.loop import Part, Precision, Run, autocast

# What a recipe says in front of a classifier that nobody defended: attacks that know the purifier
# take all of it (benchmarks/purifiers.py).
STATIC: dict[str, Any] = {"static": True, "steps": 5, "replays": 4}
UNTOUCHED = 4  # one image in so many stays clean, or clean ones would suffer


class Critic(nn.Module):
    """Patch discriminator (Isola et al. 2017): one realness score for each 8x8-pixel cell."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 1, 4, stride=2, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 1, H/8, W/8), higher = more like a clean image."""
        scores: Tensor = self.layers(x)
        return scores


class PurifierRecipe(NamedTuple):
    """Hyperparameters of a purifier's training; the weights scale its three losses."""

    threat: Threat = Threat()
    epochs: int = 2
    batch_size: int = 128
    lr: float = 1e-3
    steps: int = 2
    reconstruction: float = 1.0
    adversarial: float = 0.02
    task: float = 1.0
    ema: float = 0.995
    seed: int = 0
    precision: Precision = "fp32"
    augment: tuple[str, ...] = ("flip", "crop")  # of AUGMENTATIONS; best as the classifier's were
    replays: int = 1  # steps with each batch, once it is attacked
    static: bool = False  # attacks see the classifier alone


class PurifierTrainer:
    """Trains generator and critic in turns; the network behind, a classifier, stays frozen."""

    figure: ClassVar[str] = "validation accuracy"

    def __init__(self, net: nn.Module, config: Any, recipe: PurifierRecipe, folder: Path) -> None:
        loop.one_part(recipe.batch_size)
        self.check_augmentations(recipe.augment)
        torch.manual_seed(recipe.seed)
        self.net, self.recipe = net.eval().requires_grad_(False), recipe
        self.device = net.get_buffer("mean").device
        self.model, self.critic = of_config(config).to(self.device), Critic().to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=recipe.lr)
        names = ("model", "critic", "ema", "optimizer", "critic_optimizer")
        parts: dict[str, Part] = {name: getattr(self, name) for name in names}
        # A purifier belongs to one network: a run must not go on with another.
        settings = repr((config, recipe, checkpoint.digest(net)))
        self.run = Run(
            folder,
            settings,
            parts,
            seed=recipe.seed,
            augmentations=recipe.augment,
            figure=self.figure,
        )

    @staticmethod
    def check_augmentations(names: Sequence[str]) -> None:
        """Raise ValueError for what is not done to such images."""
        check_augmentations(names)

    def loss(self, batch: Any) -> Loss:
        """What the network loses (N,) by pixels in place of a batch's images."""
        return cross_entropy(self.net, batch.label)

    def craft(self, batch: Any) -> Tensor:
        """Perturb all but a few images against the purified prediction, gradients through both
        networks; where the recipe is static, against the network's own.
        """
        recipe, loss = self.recipe, self.loss(batch)
        climbed = loss if recipe.static else lambda x: loss(self.model(x))
        size = recipe.threat.eps * (1.5 if recipe.static else 1.25) / recipe.steps
        start = random_start(batch.x, recipe.threat, batch.noise)
        attack = partial(pgd, steps=recipe.steps, step_size=size, start=start, keep_best=False)
        x = attack(climbed, batch.x, recipe.threat)
        untouched = torch.arange(len(x), device=x.device) % UNTOUCHED == 0
        return torch.where(untouched.view(-1, 1, 1, 1), batch.x, x)

    def critic_step(self, real: Tensor, fake: Tensor) -> None:
        """Hinge loss (Lim and Ye 2017): clean images up, purified ones down."""
        with autocast(self.device, self.recipe.precision):
            up, down = F.relu(1 - self.critic(real)), F.relu(1 + self.critic(fake))
            loss = up.mean() + down.mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        distributed.average(p.grad for p in self.critic.parameters() if p.grad is not None)
        self.critic_optimizer.step()

    def step(self, batch: Any, progress: float) -> Tensor:
        """Attack one batch and learn from it `replays` times; returns the task loss before."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * loop.one_cycle(progress)
        batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
        with autocast(self.device, self.recipe.precision):
            attacked = self.craft(batch)
        task, *_ = [self.descend(batch, attacked) for _ in range(self.recipe.replays)]
        return task

    def descend(self, batch: Any, attacked: Tensor) -> Tensor:
        """One step of the critic and of the generator; returns the task loss."""
        recipe, x = self.recipe, batch.x
        with autocast(self.device, recipe.precision):
            purified = self.model(attacked)
        self.critic_step(x, purified.detach())
        # A context of its own: autocast caches weights, and the critic's have just moved.
        with autocast(self.device, recipe.precision):
            task = self.loss(batch)(purified).mean()
            loss = (
                recipe.reconstruction * F.l1_loss(purified, x)
                - recipe.adversarial * self.critic(purified).mean()
                + recipe.task * task
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        task = task.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        distributed.average([*gradients, task])
        self.optimizer.step()
        self.run.steps += 1
        decay = min(recipe.ema, self.run.steps / (10 + self.run.steps))
        loop.update_ema(self.ema, self.model, decay)
        return task


def train_purifier(
    classifier: Classifier,
    config: Any,
    recipe: PurifierRecipe,
    folder: Path,
    images: tuple[Images | Folder, Images],
    *,
    commands: Sequence[str] = (),
) -> Path:
    """Train a purifier on `images` (training, validation); returns the file of the best epoch."""
    trainer = PurifierTrainer(classifier, config, recipe, folder)
    alone = loop.accuracy(classifier, images[1].to(trainer.device), threat=recipe.threat)
    loop.say(f"without the purifier: pgd10 {alone:.4g}")
    both, file = nn.Sequential(trainer.ema, classifier), folder / "purifier.safetensors"
    loop.fit(trainer, both, images, file, {"purifier": described(trainer.model)}, commands=commands)
    return file
