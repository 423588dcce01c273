"""Before the first step: what would fail after hours fails now, and how long it will take."""

import copy
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rampart.export.gradients import unrolled
from rampart.export.to_onnx import to_onnx
from rampart.handlers.engine import Engine
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.classifier import ARCHITECTURES, Classifier, ClassifierConfig
from rampart.hardening.model.detectors import FULL, Consistency
from rampart.hardening.model.images import Images
from rampart.hardening.model.normalization import Normalization
from rampart.hardening.model.purifier import BlockPurifierConfig, Purifier
from rampart.hardening.objects.defended import DefendedDetector
from rampart.hardening.objects.detector import ObjectDetector
from rampart.hardening.objects.training import ObjectRecipe
from rampart.hardening.train import distributed
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Recipe, Trainer, accuracy
from rampart.hardening.train.purifier import PurifierRecipe, PurifierTrainer

AnyRecipe = Recipe | PurifierRecipe | ObjectRecipe
STEPS, SECONDS = 5, 3.0  # most steps that are tried, and how long
WRITTEN = 16  # times its weights that is written: the state of training, twice, and copies
SEEN = 32  # images that validation is timed on


class Trial(NamedTuple):
    """What steps of a training took on this machine."""

    step: float  # seconds
    look: float  # seconds that validation spends on an image
    memory: int  # bytes at most

    def seconds(self, images: int, validation: int, recipe: AnyRecipe) -> float:
        """How long the whole training takes."""
        steps = max(1, images // recipe.batch_size)
        return recipe.epochs * (steps * self.step + validation * self.look)

    def in_words(self, what: str, images: int, validation: int, recipe: AnyRecipe) -> str:
        """The same for people."""
        steps = max(1, images // recipe.batch_size)
        each = f"{self.step:.2g} s" if self.step > 0.01 else "under 0.01 s"
        return (
            f"{what}: about {duration(self.seconds(images, validation, recipe))} on this machine"
            f" ({recipe.epochs} epochs of {steps:,} steps, {each} each, and validation), up to"
            f" {self.memory / 1e9:.1f} GB of memory"
        )


def check_place(folder: Path, need: float, option: str) -> None:
    """Raise ValueError where `folder` cannot be written, or `need` bytes are more than is free."""
    home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not home.is_dir():
        raise ValueError(f"{option} {folder}: {home} is a file, not a folder: choose another")
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {folder}: nothing can be written into {home} ({error.strerror})"
        ) from error
    if (free := shutil.disk_usage(home).free) < need:
        raise ValueError(
            f"{option} {folder}: needs about {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free:"
            " free some space, or choose a folder on another disk"
        )


def size_of(net: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


def check_network(net: Classifier) -> None:
    """Raise ValueError where a network cannot be attacked, exported or trusted.

    It must answer an image with K logits and F features that are numbers, the same ones each time
    and in any company, and its logits must have a gradient.
    """
    arch, size = net.config.arch, net.config.image_size
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, size, size, generator=draws).to(net.mean.device)
    net = copy.deepcopy(net).eval()
    try:
        logits, features, again, alone = answers(net, x)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{arch} does not take images of {size}x{size} pixels, or has more than one head:"
            f" {first_line(error)}: choose another --arch or --image-size"
        ) from error
    wanted, found = (2, net.config.classes), tuple(logits.shape)
    if found != wanted or features.shape != (2, net.feature_size):
        raise ValueError(
            f"{arch} gives logits {found} from features {tuple(features.shape)}, but one head gives"
            f" {wanted} from {(2, net.feature_size)}: use a network with one head"
        )
    if not torch.isfinite(logits).all():
        raise ValueError(f"{arch} gives logits that are not finite: use other weights")
    if not alike(logits, again, 1e-4):
        raise ValueError(
            f"{arch} answers the same image differently each time: turn off all randomness in eval"
            " mode (use nn.Dropout, or F.dropout with training=self.training)"
        )
    if not alike(logits[:1], alone, 1e-2):
        raise ValueError(
            f"{arch} answers an image differently in another batch: in eval mode, normalize by"
            " running statistics, not by those of the batch"
        )
    check_gradient(net, x)


def answers(net: Classifier, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x (2, 3, H, W): logits, features, logits again, and those of the first image alone."""
    with torch.no_grad():
        if not isinstance(net.backbone((x - net.mean) / net.std), Tensor):
            raise TypeError("it returns more than one tensor")
        return net(x), net.embed(x), net(x), net(x[:1])


def alike(one: Tensor, other: Tensor, most: float) -> bool:
    """Whether two tensors differ by at most so large a part of their largest value."""
    return float((one - other).abs().max()) <= most * float(one.abs().max())


def check_gradient(net: Classifier, x: Tensor) -> None:
    """Raise ValueError where features do not depend on the pixels of x (N, 3, H, W)."""
    x = x.clone().requires_grad_()
    try:
        features = net.embed(x).float()  # a head may begin with zeros
        weight = torch.linspace(1, 2, features.shape[1], device=x.device)
        (gradient,) = torch.autograd.grad((features * weight).sum(), x)
    except RuntimeError as error:
        raise ValueError(
            f"{net.config.arch} passes no gradient to its input ({first_line(error)}): neither"
            " training nor attacks can use it. Compute in torch, without detach or no_grad"
        ) from error
    if not torch.isfinite(gradient).all() or not gradient.any():
        raise ValueError(
            f"{net.config.arch} has a gradient that is zero or not finite on random images: neither"
            " training nor attacks can use it"
        )


def check_export(net: Classifier) -> None:
    """Raise ValueError where ONNX Runtime does not answer as the network, once it is exported."""
    net = copy.deepcopy(net).cpu()
    whole = pipelines.DefendedClassifier(net, None, FULL).eval().requires_grad_(False)
    pipeline, size = pipelines.as_variant(whole, "lean"), net.config.image_size
    image = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = Engine(to_onnx(pipeline, Path(folder) / "graph.onnx"), device="cpu").run(image)
    except Exception as error:  # the exporter's own, of any kind
        raise ValueError(
            f"{net.config.arch} cannot be exported to ONNX, so Rampart cannot serve it:"
            f" {first_line(error)}"
        ) from error
    with torch.no_grad():
        own = pipeline(torch.from_numpy(image)).logits.numpy()
    gap = float(np.abs(found.logits - own).max())
    if not gap <= 1e-3 * max(1.0, float(np.abs(own).max())):
        raise ValueError(
            f"{net.config.arch} answers differently once exported to ONNX (logits by {gap:.2g}):"
            " look for branches on tensor values, and for randomness"
        )


def try_steps(
    trainer: Trainer | PurifierTrainer,
    classifier: Classifier,
    threat: Threat,
    *,
    look_at: nn.Module | None = None,
) -> Trial:
    """Time some steps of a trainer on random images, and validation of `look_at` on some.

    Both are then to be thrown away. Raises ValueError where the batch is too large or too small.
    """
    size, world = trainer.recipe.batch_size, distributed.place()[1]
    times, config = list[float](), classifier.config
    batch = random_batch(size // world, config, trainer.device)
    # Processes wait for one another in each step, so all must take as many, however long they take.
    most, patience = (2, float("inf")) if world > 1 else (STEPS, SECONDS)
    try:
        while not times or (len(times) < most and sum(times) < patience):
            start = time.monotonic()
            loss = float(trainer.step(batch, 0.5))
            times.append(time.monotonic() - start)
        images = Images((batch.x * 255).byte().permute(0, 2, 3, 1), batch.label, ())
        few = images[slice(min(SEEN, size // world))]
        start = time.monotonic()
        accuracy((look_at or classifier).eval(), few, threat=threat)
        look = (time.monotonic() - start) / len(few)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ValueError(f"a step with --batch-size {size} fails: {first_line(error)}") from error
    if not np.isfinite(loss):
        raise ValueError(f"the loss of the first steps is {loss}: lower --lr, or use other weights")
    return Trial(min(times[1:] or times), look, peak(trainer.device))


def check_classes(net: Classifier, classes: Sequence[str]) -> None:
    """Raise ValueError where images have more or fewer classes than the network tells apart, or
    where its mean and std are none of pixels in [0, 1].
    """
    config = net.config
    Normalization(config.mean, config.std).check("the classifier's normalization")
    if len(classes) != config.classes:
        raise ValueError(
            f"the images have {len(classes)} classes, but the network has {config.classes}: pass"
            " images of its classes, or a network for those of the images"
        )


def check_purifier(purifier: Purifier, size: int) -> None:
    """Raise ValueError where a purifier does not give images of `size` pixels as it takes them."""
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        purified = purifier.eval()(x)
    if purified.shape != x.shape or not torch.isfinite(purified).all():
        raise ValueError(
            f"the purifier makes images {tuple(purified.shape)} of {tuple(x.shape)}, or pixels that"
            " are not finite: train it again"
        )


def check_guardable(network: Classifier | ObjectDetector) -> None:
    """Raise ValueError where the gradient of a network cannot become a part of its graph, as the
    variant guarded wants.
    """
    net, looks = copy.deepcopy(network).cpu(), (Consistency.name,)
    if isinstance(net, Classifier):
        pipeline: nn.Module = pipelines.DefendedClassifier(net, None, looks)
        size = net.config.image_size
    else:
        pipeline, size = DefendedDetector(net, looks), net.config.size
    pipeline = pipeline.eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=draws)
    refusal = f"{net.config.arch} cannot have the variant guarded (leave out --guarded)"
    try:
        found = unrolled(pipeline, torch.zeros_like(image))(image).scores
    except Exception as error:  # PyTorch's own, of any kind
        raise ValueError(f"{refusal}: {first_line(error)}") from error
    own = pipeline(image).scores
    gap = float((found - own).abs().max())
    if not gap <= 1e-3 * max(1.0, float(own.abs().max())):
        raise ValueError(f"{refusal}: its gradient as a graph is another one, scores by {gap:.2g}")


def try_network(net: Classifier) -> None:
    """Put a network that is trained through all that its archive asks of it.

    That ours can be exported is known: a test does it for every family of them.
    """
    check_network(net)
    if distributed.first() and net.config.arch not in ARCHITECTURES:
        check_export(net)


def try_classifier(
    net: Classifier, recipe: Recipe, teacher: Classifier | None = None, *, timed: bool = True
) -> Trial:
    """Put a network through all that its training and its archive ask of it; it stays as it is.

    Not `timed`, it takes no steps: with a large network they are what takes long.
    """
    with torch.random.fork_rng():
        try_network(net)
        if not (recipe.epochs and timed):
            return Trial(0, 0, peak(net.mean.device))
        own = copy.deepcopy(net)
        return try_steps(Trainer(own, recipe, Path(), teacher), own, recipe.threat)


def try_purifier(net: Classifier, recipe: PurifierRecipe) -> Trial:
    """Time the steps of a purifier in front of a network, which stays as it is."""
    with torch.random.fork_rng():
        own = copy.deepcopy(net)
        trainer = PurifierTrainer(own, BlockPurifierConfig(), recipe, Path())
        both = nn.Sequential(trainer.ema, own)
        return try_steps(trainer, own, recipe.threat, look_at=both)


def random_batch(size: int, config: ClassifierConfig, device: torch.device) -> Batch:
    """Images that nobody took, with labels."""
    draws, side = torch.Generator().manual_seed(0), config.image_size
    x = torch.rand(size, 3, side, side, generator=draws)
    label = torch.randint(config.classes, (size,), generator=draws)
    return Batch(x.to(device), label.to(device), Noise(torch.arange(size).to(device)))


def peak(device: torch.device) -> int:
    """The most memory, in bytes, that was in use: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_line(error: BaseException) -> str:
    """What an error says, shortly."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def duration(seconds: float) -> str:
    """A time in words, no finer than it is known."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
