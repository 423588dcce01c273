"""Networks and purifiers from images of a source: behind the verbs that train."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rampart import inputs
from rampart.handlers.engine import cpu_features
from rampart.hardening.model import checkpoint, foreign
from rampart.hardening.model.classifier import SMALL, TIMM, Classifier, ClassifierConfig
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.normalization import Colour, Normalization
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.model.purifier import PurifierConfig
from rampart.hardening.train import distributed
from rampart.hardening.train.data import Folder
from rampart.hardening.train.loop import Precision, Recipe, fast_precision, say, train_classifier
from rampart.hardening.train.purifier import PurifierRecipe, train_purifier
from rampart.provenance import PYTHON
from rampart.sources import Source

CIFAR10_NORM = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET_NORM = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Run(NamedTuple):
    """Where a training computes and what stays of it."""

    out: Path  # an unfinished run there continues
    device: str = "auto"  # cpu, cuda, or auto for CUDA where there is one
    dtype: Precision | None = None  # arithmetic; by default bf16 where the machine computes in it
    validate_on: int = 1500  # validation images used each epoch
    compiled: bool = False
    command: str = PYTHON

    def join(self) -> torch.device:
        """The device of this process, which has met the others that torchrun started."""
        return distributed.join(pick_device(self.device))

    def arithmetic(self, device: torch.device) -> Precision:
        """The arithmetic that is asked for, or the faster one of a device."""
        return self.dtype or fast_precision(device, cpu_features())


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto takes CUDA where there is one."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise ValueError("--device cuda: no usable CUDA device; use --device cpu, or auto")
    return torch.device(("cuda" if usable else "cpu") if name == "auto" else name)


def train(
    classifier: Classifier,
    images: Images | Folder,
    validation: Images,
    recipe: Recipe | None = None,
    *,
    out: Path | str,
    device: str = "auto",
    teacher: Classifier | None = None,
) -> Classifier:
    """Train `classifier` by a recipe, in the folder `out`; returns the epoch that validates best.

    Called again, it goes on where it was cut off. Raises ValueError where `out` holds another run,
    or where the classifier's mean and std are none of pixels in [0, 1].
    """
    config = classifier.config
    Normalization(config.mean, config.std).check("the classifier's normalization")
    where = distributed.join(pick_device(device))
    learn = partial(train_classifier, teacher=teacher, commands=[PYTHON])
    data = images, validation
    return load_classifier(learn(classifier.to(where), recipe or Recipe(), Path(out), data))


def train_from(
    source: Source,
    net: ClassifierConfig,
    recipe: Recipe,
    run: Run,
    *,
    init: Path | None = None,
    teacher: Path | None = None,
) -> Path:
    """Train a classifier on a source's images, new or from the weights `init`; returns its file.

    The number of classes in `net` is that of the images; of `init` all of `net` but `rectified`.
    Raises ValueError where classes differ or what belongs together is missing.
    """
    inputs.size(net.image_size)
    inputs.training(recipe.method, teacher, recipe.smoothing, recipe.steps)
    where = run.join()
    torch.manual_seed(recipe.seed)  # new layers of `init` are drawn from it too
    start = load_classifier(init, auxiliary=True, rectified=net.rectified) if init else None
    images, held = source.read(start.config.image_size if start else net.image_size)
    if start and start.config.classes != len(images.classes):
        raise ValueError(
            f"--init {init} tells {start.config.classes} classes apart, but {source.data} has"
            f" {len(images.classes)}: train from new weights, without --init"
        )
    net = net._replace(classes=len(images.classes))
    classifier = (start or Classifier(net, auxiliary=True)).to(where)
    if run.compiled:
        classifier.backbone.compile()
    robust = load_classifier(teacher).to(where) if teacher else None
    past = checkpoint.read(init)[0] if init else {}
    recipe = recipe._replace(
        precision=run.arithmetic(where),
        teacher=checkpoint.digest(robust) if robust else "",
        after=str(past.get("training", init.name)) if init else "",
    )
    validation = split(held, "validation")[slice(run.validate_on)]
    commands, history = [*past.get("commands", []), run.command], past.get("history", [])
    learn = partial(train_classifier, teacher=robust, earlier=history, commands=commands)
    return learn(classifier, recipe, run.out, (images, validation))


def train_purifier_from(source: Source, classifier: Path, recipe: PurifierRecipe, run: Run) -> Path:
    """Train a purifier in front of the frozen network of a file; returns the purifier's file."""
    where = run.join()
    net = load_classifier(classifier).to(where)
    images, held = source.read(net.config.image_size)
    validation = split(held, "validation")[slice(run.validate_on)]
    recipe = recipe._replace(precision=run.arithmetic(where))
    learn = partial(train_purifier, commands=[run.command])
    return learn(net, PurifierConfig(), recipe, run.out, (images, validation))


def adopt(
    weights: Path,
    out: Path,
    config: ClassifierConfig,
    *,
    mean: Colour | None = None,
    std: Colour | None = None,
) -> ClassifierConfig:
    """Write weights from elsewhere as a classifier of ours; returns what it was built with.

    Prints which entry and normalization it takes. Without `mean` and `std` those of the file count,
    else timm's own for its networks, CIFAR-10's up to 64 pixels a side and ImageNet's above.
    """
    usual = CIFAR10_NORM if config.image_size <= SMALL else IMAGENET_NORM
    if config.arch.startswith(TIMM):
        usual = foreign.timm_normalization(config.arch) or usual
    config = config._replace(**usual._asdict())
    net, lines = foreign.take(weights, config, mean=mean, std=std)
    for line in lines:
        say(line)
    content = {"classifier": net.config._asdict(), "training": f"adopted from {weights.name}"}
    checkpoint.save(out, net, content)
    return net.config
