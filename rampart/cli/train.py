"""Verbs that make networks, and the one that goes the whole way."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.provenance import command_line

Colour = tuple[float, float, float]

AWP = "Adversarial weight perturbation, relative to the weights' norm, such as 0.005; 0: none"
AUGMENT = "flip, crop, warp (turn, zoom, light), cutout, none; repeatable. Default flip and crop; "
AUGMENT += "harden chooses by the classes. "
AUGMENT += "Leave out flip if mirroring changes the class (signs, letters, digits)"
SAME = "As in `train`; by default, the classifier's augmentation"
TEACHER = "Robust network for rslad to distil from, written by an earlier run"
RECTIFY = "Also train a second head for rectified rejection"
COMPILE = "Use torch.compile: starts a minute or more later, then runs faster steps"
INIT = "Start from these weights of an earlier run; --arch, --width and --image-size come from them"
NORM = "Of the training pixels in [0, 1]; default the file's own, else CIFAR-10's up to 64 pixels, "
NORM += "else ImageNet's"
KEEP = "Passes over the training images; 0 keeps --weights unchanged"
FROZEN = "classifier.safetensors from `rampart train`"
STATE = "State dict: .pth, .pt or .safetensors"
ADOPTED = "The classifier.safetensors to write"
STAGES = "Folder for intermediate results"
YOURS = "Your weights, in a format that `adopt` reads"
NO_PURIFIER = "Epochs for the purifier; 0: no purifier, variant lean"
FITS = "default: fits data and machine"
YES = "Accept the proposal without asking; the default without a terminal"
QUESTION = "Continue with these settings?"
ARCHIVE = "The .mar to write, such as model_store/mine.mar; the model folder goes beside it"

DATA_SETS = "cifar10 (170 MB), or gtsrb, German traffic signs (280 MB)"
INTO = "Folder for the data; by default, a folder with the data set's name"

verb, app = o.theme("Train")


def ask() -> None:
    """End where the answer is no."""
    if not typer.confirm(QUESTION):
        raise typer.Exit(1)


def chosen(augment: list[str] | None) -> tuple[str, ...] | None:
    """The augmentations that options name; None where there are no such options."""
    return tuple(name for name in augment if name != "none") if augment else None


@verb(
    "harden --data my_images/ --image-size 64 --out model_store/mine.mar",
    "harden --data my_images/ --weights mine.pth --arch resnet50 --epochs 0 --out mine.mar",
    together=inputs.hardening,
)
def harden(
    *,
    source: o.Source,
    out: Annotated[Path, Option(help=ARCHIVE), inputs.new_archive],
    weights: Annotated[Path | None, Option(help=YOURS), inputs.weights] = None,
    arch: Annotated[
        str | None, Option(help=f"{o.ARCH}; {FITS}", callback=o.take_factory), inputs.network
    ] = None,
    image_size: Annotated[int | None, Option(help=f"{o.SIZE}; {FITS}"), inputs.size] = None,
    network: o.Network,
    method: o.Method = "nfgsm",
    threat: o.Threat,
    epochs: Annotated[int | None, Option(min=0, help=f"{KEEP}; {FITS}")] = None,
    batch_size: Annotated[int | None, Option(min=1, help=f"Images per step; {FITS}")] = None,
    lr: Annotated[float | None, Option(help=f"Peak learning rate; {FITS}")] = None,
    augment: Annotated[list[str] | None, Option(help=AUGMENT), inputs.augmentation] = None,
    purifier_epochs: Annotated[int | None, Option(min=0, help=f"{NO_PURIFIER}; {FITS}")] = None,
    evaluate_on: Annotated[int, Option(min=0, help="Validation images to attack; 0: none")] = 100,
    dtype: o.Dtype = None,
    sample: o.WithSample = True,
    runs: Annotated[Path, Option(help=STAGES), inputs.folder_to_write] = Path("runs"),
    device: o.Device = "auto",
    yes: Annotated[bool, Option("--yes", "-y", help=YES)] = False,
    anyway: o.Anyway = False,
) -> None:
    """Do everything: from images, and weights if you have some, to an archive that you can serve.

    It proposes a value for every option that you leave out, checks early what could fail late, and
    estimates the time. If you interrupt it, run the same command to resume. If you change the
    inputs, it repeats only the stages that depend on them.
    """
    from rampart.assembly import harden as go
    from rampart.proposal import Wishes

    net, how = network.config(arch or "resnet18", image_size or 32), chosen(augment)
    asked = (threat.ball(), method, arch, network.width, image_size, net, epochs, batch_size, lr)
    wishes = Wishes(*asked, how, weights, purifier_epochs, evaluate_on, dtype, device, sample)
    agree = bool if yes or not sys.stdin.isatty() else ask
    go = partial(go, runs=runs, command=command_line(), agree=agree, anyway=anyway)
    outcome = go(source.open(), out, wishes)
    say(*outcome.lines, f"{out}: serve it with `rampart serve --archive {out}`")


@verb(
    "train --data cifar10/ --out runs/classifier --width 0.5 --epochs 30",
    together=inputs.training,
)
def train(
    *,
    source: o.Source,
    run: o.Training,
    arch: o.Arch = "resnet18",
    image_size: o.Size = 32,
    network: o.Network,
    method: o.Method = "nfgsm",
    threat: o.Threat,
    epochs: o.Epochs = 30,
    lr: o.LearningRate = 0.2,
    ema: Annotated[float, Option(help="Decay of the weight average")] = 0.998,
    awp: Annotated[float, Option(help=AWP)] = 0,
    smoothing: Annotated[float, Option(help="Label smoothing")] = 0,
    ramp: Annotated[float, Option(help="Fraction of the run in which eps grows from 0")] = 0,
    steps: Annotated[int, Option(help="Attack steps in pgd, trades, mart and rslad")] = 10,
    teacher: Annotated[Path | None, Option(help=TEACHER), inputs.checkpoint] = None,
    rectify: Annotated[bool, Option("--rectify", help=RECTIFY)] = False,
    compile: Annotated[bool, Option("--compile", help=COMPILE)] = False,
    init: Annotated[Path | None, Option(help=INIT), inputs.checkpoint] = None,
    augment: Annotated[list[str] | None, Option(help=AUGMENT), inputs.augmentation] = None,
) -> None:
    """Train a classifier adversarially. After Ctrl-C, run the same command to resume.

    Under torchrun, all processes train the same classifier.
    """
    from rampart.hardening.train.loop import say
    from rampart.training import train_from

    recipe = rp.Recipe(method, threat.ball(), epochs, run.batch_size, lr, ema=ema, seed=run.seed)
    recipe = recipe._replace(smoothing=smoothing, awp=awp, ramp=ramp, steps=steps)
    if (how := chosen(augment)) is not None:
        recipe = recipe._replace(augment=how)
    net = network.config(arch, image_size)._replace(rectified=rectify)
    place = run.place()._replace(compiled=compile)
    best = train_from(source.open(), net, recipe, place, init=init, teacher=teacher)
    say(f"best classifier: {best}")


@verb("purifier --data cifar10/ --classifier runs/c/classifier.safetensors --out runs/p")
def purifier(
    *,
    source: o.Source,
    classifier: Annotated[Path, Option(help=FROZEN), inputs.checkpoint],
    run: o.Training,
    threat: o.Threat,
    epochs: o.Epochs = 2,
    lr: o.LearningRate = 1e-3,
    augment: Annotated[list[str] | None, Option(help=SAME), inputs.augmentation] = None,
    arch: o.Own = None,
) -> None:
    """Train the GAN purifier in front of a frozen classifier. Resumes and scales like `train`."""
    from rampart.hardening.train.loop import say
    from rampart.hardening.train.purifier import PurifierRecipe
    from rampart.training import train_purifier_from

    recipe = PurifierRecipe(threat.ball(), epochs, run.batch_size, lr, seed=run.seed)
    how = chosen(augment)
    best = train_purifier_from(source.open(), classifier, recipe, run.place(), augment=how)
    say(f"best purifier: {best}")


@verb("adopt resnet50.pth --arch resnet50 --classes 1000 --out runs/c.safetensors")
def adopt(
    *,
    weights: Annotated[Path, Argument(help=STATE), inputs.weights],
    out: Annotated[Path, Option(help=ADOPTED), inputs.file_to_write],
    arch: o.Arch,
    classes: Annotated[int, Option(min=2, help="Number of classes")],
    image_size: o.Size = 224,
    network: o.Network,
    mean: Annotated[Colour | None, Option(help=NORM)] = None,
    std: Annotated[Colour | None, Option(help="As --mean")] = None,
) -> None:
    """Convert weights from elsewhere into a file that the other commands read."""
    from rampart.training import adopt as take

    config = take(weights, out, network.config(arch, image_size, classes), mean=mean, std=std)
    say(f"{out}: {arch}, mean {config.mean}, std {config.std}")


@verb("download cifar10", "download gtsrb data/signs")
def download(
    data: Annotated[Literal["cifar10", "gtsrb"], Argument(help=DATA_SETS)],
    folder: Annotated[Path | None, Argument(help=INTO), inputs.folder_to_write] = None,
) -> None:
    """Download a data set with torchvision."""
    home = folder or Path(data)
    if data == "gtsrb":
        from rampart.hardening.train import gtsrb

        for part, count in gtsrb.download(home).items():
            say(f"{home / part}.npz: {count} images of {gtsrb.SIZE}x{gtsrb.SIZE} pixels")
    else:
        from rampart.hardening.train.data import download_cifar10

        say(f"{len(download_cifar10(home))} training images in {home}: pass it as --data")


@verb("digits digits/")
def digits(
    folder: Annotated[Path, Argument(help="Where to put them"), inputs.folder_to_write],
) -> None:
    """Write scikit-learn's handwritten digits to FOLDER, as a small data set to start with."""
    from rampart.hardening.train.data import write_digits

    for part, count in write_digits(folder).items():
        say(f"{folder / part}.npz: {count} images of 32x32 pixels")
