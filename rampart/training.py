"""Networks and purifiers from images of a source: behind the verbs that train."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rampart import inputs, preflight
from rampart.handlers.engine import cpu_features
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model import checkpoint, foreign
from rampart.hardening.model.card import check_fit
from rampart.hardening.model.classifier import SMALL, TIMM, Classifier, ClassifierConfig
from rampart.hardening.model.faults import Faults
from rampart.hardening.model.files import read_config
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.normalization import Colour, Normalization
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.model.purifier import BlockPurifierConfig, of_config
from rampart.hardening.train import changes, distributed
from rampart.hardening.train import state as states
from rampart.hardening.train.augmentation import of_one_image, suited
from rampart.hardening.train.data import Folder, spread
from rampart.hardening.train.loop import (
    Precision,
    Recipe,
    accuracy,
    augmentations_of,
    fast_precision,
    say,
    train_classifier,
)
from rampart.hardening.train.purifier import PurifierRecipe, train_purifier
from rampart.provenance import PYTHON
from rampart.sources import Source

CIFAR10_NORM = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MEASURED = 1500  # held-out images that accuracy is measured on, at most
UNKNOWN = 10  # classes that a network is tried with where the images cannot be read
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
    anyway: bool = False,
) -> Classifier:
    """Train `classifier` by a recipe, in the folder `out`; returns the epoch that validates best.

    Called again, it goes on where it was cut off. Raises ValueError where `out` holds another run,
    where the classifier's mean and std are none of pixels in [0, 1], and, unless it is wanted
    `anyway`, where it ends no better than chance on the validation images.
    """
    config = classifier.config
    Normalization(config.mean, config.std).check("the classifier's normalization")
    where = distributed.join(pick_device(device))
    learn = partial(train_classifier, teacher=teacher, commands=[PYTHON])
    data, first = (images, validation), copy.deepcopy(classifier.state_dict())
    file = learn(classifier.to(where), recipe or Recipe(), Path(out), data)
    best = load_classifier(file)
    if not anyway:
        try:
            check_fit({"accuracy": beside_chance(best, validation)}, f"{file} is not taken")
        except ValueError:
            classifier.load_state_dict(first)  # so that the same call takes it anyway
            raise
    return best


def beside_chance(classifier: Classifier, images: Images) -> dict[str, Any]:
    """How many held-out images a classifier labels right, beside the share of their largest class,
    as the card has it.
    """
    few = spread(images, MEASURED)
    value = accuracy(classifier, few)
    largest = int(torch.bincount(few.label).max())
    interval = [round(bound, 4) for bound in wilson(value, len(few))]
    row = {"value": round(value, 6), "interval": interval, "n": len(few)}
    return row | {"chance": round(largest / len(few), 6)}


def train_from(
    source: Source,
    net: ClassifierConfig,
    recipe: Recipe,
    run: Run,
    *,
    init: Path | None = None,
    teacher: Path | None = None,
    tried: bool = False,
) -> Path:
    """Train a classifier on a source's images, new or from the weights `init`; returns its file.

    First all is tried that would fail later, unless it was `tried` before. The number of classes in
    `net` is that of the images; of `init` all of `net` but `rectified`. Raises ValueError where
    classes differ or what belongs together is missing.
    """
    inputs.size(net.image_size)
    inputs.training(recipe.method, teacher, recipe.smoothing, recipe.steps)
    where = run.join()
    torch.manual_seed(recipe.seed)  # new layers of `init` are drawn from it too
    start = load_classifier(init, auxiliary=True, rectified=net.rectified) if init else None
    size = start.config.image_size if start else net.image_size
    recipe = recipe._replace(precision=run.arithmetic(where))
    if not tried:
        faults = Faults()
        data = faults.of(partial(source.read, size))
        prove_training(Training(net, recipe, run, data, start=start, teacher=teacher), faults)
    images, held = source.read(size)
    if start and init:
        check_classes(start, init, images, source)
    new = net._replace(classes=len(images.classes))
    classifier = (start or Classifier(new, auxiliary=True)).to(where)
    if run.compiled:
        classifier.backbone.compile()
    robust = load_classifier(teacher).to(where) if teacher else None
    past = read_config(init) if init else {}
    after = str(past.get("training", init.name)) if init else ""
    recipe = recipe._replace(teacher=checkpoint.digest(robust) if robust else "", after=after)
    check_images(run.out, images, held)
    both = images, split(held, "validation")[slice(run.validate_on)]
    commands, history = [*past.get("commands", []), run.command], past.get("history", [])
    learn = partial(train_classifier, teacher=robust, earlier=history, commands=commands)
    return learn(classifier, recipe, run.out, both)


def check_classes(start: Classifier, init: Path, images: Images | Folder, source: Source) -> None:
    """Raise ValueError where weights to go on from tell other classes apart than the images."""
    if start.config.classes != len(images.classes):
        raise ValueError(
            f"--init {init} has {start.config.classes} classes, but {source.data} has"
            f" {len(images.classes)}: train from new weights, without --init"
        )


class Training(NamedTuple):
    """A training that is tried before it begins."""

    net: ClassifierConfig
    recipe: Recipe
    run: Run
    data: tuple[Images | Folder, Images] | None  # for training and held out; None: cannot be read
    start: Classifier | None = None  # with the weights to begin with
    teacher: Path | None = None
    purifier: PurifierRecipe | None = None  # of one that follows
    option: str = "--out"  # that names the folder of the run


def prove_training(training: Training, faults: Faults) -> None:
    """Try all that a training asks for, and say how long it will take.

    Raises ValueError that lists what is wrong, with the `faults` of other checks.
    """
    net, recipe, run, data, start, teacher, purifier, option = training
    where, trials = run.join(), []
    classifier = start or faults.of(partial(untrained, net, data))
    need = preflight.WRITTEN * preflight.size_of(classifier) if classifier else 0
    faults.of(partial(preflight.check_place, run.out, need, option))
    if classifier:
        robust = load_classifier(teacher).to(where) if teacher else None
        classifier = classifier.to(where)
        # Where it will not begin, nobody has to know how long it would take.
        attempt = partial(preflight.try_classifier, classifier, recipe, robust)
        trials.append(faults.of(partial(attempt, timed=not faults.found)))
        if purifier and not faults.found:
            trials.append(faults.of(partial(preflight.try_purifier, classifier, purifier)))
    faults.tell()
    if data is None:
        return
    few = min(run.validate_on, len(split(data[1], "validation")))
    for trial, how in zip(trials, (recipe, purifier), strict=False):
        what = "classifier" if how is recipe else "purifier"
        if trial and how and how.epochs:
            say(trial.in_words(what, len(data[0]), few, how))


def untrained(net: ClassifierConfig, data: tuple[Images | Folder, Images] | None) -> Classifier:
    """A network as training begins with it; numbers that are drawn later stay as they are."""
    with torch.random.fork_rng():
        classes = len(data[0].classes) if data else net.classes or UNKNOWN
        return Classifier(net._replace(classes=classes), auxiliary=True)


def check_images(out: Path, images: Images | Folder, held: Images) -> None:
    """Note in `out` what a run begins with. Raises ValueError where one there began with others."""
    if not distributed.first():
        return
    if not states.unfinished(out):
        changes.note(out, (images, held))
    elif changed := changes.since(out, (images, held)):
        raise ValueError(
            f"the images have changed since the run in {out} began: {changed}. Restore the images"
            " and run this command to resume; to train on the new ones, choose another --out"
        )


def train_purifier_from(
    source: Source,
    classifier: Path,
    recipe: PurifierRecipe,
    run: Run,
    *,
    augment: tuple[str, ...] | None = None,
    tried: bool = False,
) -> Path:
    """Train a purifier in front of the frozen network of a file; returns the purifier's file.

    First all is tried that would fail later, unless it was `tried` before. Without `augment` images
    are augmented as those of the network were; where its file does not tell, as classes allow.
    """
    where = run.join()
    net = load_classifier(classifier).to(where)
    recipe = recipe._replace(precision=run.arithmetic(where))
    if not tried:
        prove_purifier(source, net, recipe, run)
    images, held = source.read(net.config.image_size)
    if augment is None:
        past = augmentations_of(str(read_config(classifier).get("training", "")))
        augment = suited(images.classes) if past is None else of_one_image(past)
    recipe = recipe._replace(augment=augment)
    say(f"augmentation: {', '.join(augment) or 'none'}")
    check_images(run.out, images, held)
    validation = split(held, "validation")[slice(run.validate_on)]
    learn = partial(train_purifier, commands=[run.command])
    return learn(net, BlockPurifierConfig(), recipe, run.out, (images, validation))


def prove_purifier(source: Source, net: Classifier, recipe: PurifierRecipe, run: Run) -> None:
    """As `prove_training`, for a purifier in front of a network that is trained."""
    faults = Faults()
    data = faults.of(partial(source.read, net.config.image_size))
    if data:
        faults.of(partial(preflight.check_classes, net, data[0].classes))
    need = preflight.WRITTEN * preflight.size_of(of_config(BlockPurifierConfig()))
    faults.of(partial(preflight.check_place, run.out, need, "--out"))
    faults.of(partial(preflight.try_network, net))
    attempt = partial(preflight.try_purifier, net, recipe)
    trial = None if faults.found else faults.of(attempt)
    faults.tell()
    assert data and trial
    few = min(run.validate_on, len(split(data[1], "validation")))
    say(trial.in_words("purifier", len(data[0]), few, recipe))


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
    net, lines = foreign.take(weights, usually_normalized(config), mean=mean, std=std)
    for line in lines:
        say(line)
    preflight.check_place(out.parent, preflight.size_of(net), "--out")
    preflight.try_network(net)
    content = {"classifier": net.config._asdict(), "training": f"adopted from {weights.name}"}
    checkpoint.save(out, net, content)
    return net.config


def usually_normalized(config: ClassifierConfig) -> ClassifierConfig:
    """A network with the normalization that weights of its kind were trained with, mostly."""
    usual = CIFAR10_NORM if config.image_size <= SMALL else IMAGENET_NORM
    if config.arch.startswith(TIMM):
        usual = foreign.timm_normalization(config.arch) or usual
    return config._replace(**usual._asdict())
