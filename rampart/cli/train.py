"""Verbs that make networks, and the one that goes the whole way."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.hardening.objects.places import has_boxes
from rampart.provenance import command_line

Colour = tuple[float, float, float]

AWP = "Adversarial weight perturbation, relative to the weights' norm, such as 0.005; 0: none"
AUGMENT = "flip, crop, warp (turn, zoom, relight), cutout, cutmix (paste a part of another image, "
AUGMENT += "mix the labels), none; repeatable. Default flip and crop; harden chooses by the "
AUGMENT += "classes. Leave out flip if mirroring changes the class (signs, letters, digits)"
ANY_ARCH = f"{o.ARCH}; for pictures with boxes ssd, fasterrcnn (ssd-resnet34: on that ResNet) or "
ANY_ARCH += "ssdlite, or a factory of yours; default resnet18, or ssd"
SIZES = "default 32; for pictures with boxes a multiple of 64, default 256"
RATES = "Highest learning rate, in one cycle; default 0.2, for object detectors 0.001"
DECAY = "Decay of the weight average; default 0.998, for object detectors 0.99"
ANY_AUGMENT = f"{AUGMENT}; for pictures with boxes flip, turn (by quarters), crop, shrink, light"
BALANCE = "How evenly classes of different size are drawn: from 0 (by their number of images) to 1 "
BALANCE += "(equally often)"
AIM = "For pictures with boxes: what attacks increase: the sum of the losses, one at random per "
AIM += "picture (alternate, the default), or the strongest per picture"
PASSES = "For pictures with boxes: how often an epoch shows each picture; default 1"
REPLAYS = "Steps with each attacked batch; default 1, or 4 with --static, whose attacks stay strong"
ALONE = "Attack the classifier alone, for an undefended one that you cannot retrain. An attack "
ALONE += "that knows such a purifier beats it"
SAME = "As in `train`; by default, as the frozen network was trained"
TEACHER = "Robust network for rslad to distil from, written by an earlier run"
RECTIFY = "Also train a second head for rectified rejection"
COMPILE = "Use torch.compile: starts a minute or more later, then runs faster steps"
INIT = "Start from these weights, which set --arch, --width, --activation and --image-size. An "
INIT += "object detector can start from a classifier, such as one of model_store"
NORM = "Mean of the training pixels in [0, 1]; default the file's own, else CIFAR-10's up to 64 "
NORM += "pixels, else ImageNet's"
KEEP = "Passes over the training images; 0 keeps --weights unchanged"
FROZEN = "classifier.safetensors, or objects.safetensors if --data has boxes, from `rampart train`"
STATE = "State dict: .pth, .pt or .safetensors"
ADOPTED = "The classifier.safetensors to write"
STAGES = "Folder for intermediate results"
YOURS = (
    "Your weights, in a format that `adopt` reads; for pictures with boxes, see --init of `train`"
)
NO_PURIFIER = "Epochs for the purifier; 0: no purifier, variant lean"
YES = "Accept the proposal without asking; the default without a terminal"
QUESTION = "Continue with these settings?"
ARCHIVE = "The .mar to write, such as model_store/mine.mar; the model folder goes beside it"

DATA_SETS = "cifar10 (170 MB), or gtsrb, German traffic signs (280 MB)"
SIBLINGS = "Files of `rampart train`, two or more, fine-tuned from the same weights"
MEAN = "File for the mean, such as runs/mean/classifier.safetensors"
INTO = "Folder for the data; by default, a folder with the data set's name"

FITS = "default: fits data and machine"

verb, app = o.theme("Train")


def ask() -> None:
    """End where the answer is no."""
    if not typer.confirm(QUESTION):
        raise typer.Exit(1)


def chosen(augment: list[str] | None) -> tuple[str, ...] | None:
    """The augmentations that options name; None where there are no such options."""
    return tuple(name for name in augment if name != "none") if augment else None


def given(**values: Any) -> dict[str, Any]:
    """The values that options name."""
    return {name: value for name, value in values.items() if value is not None}


@verb(
    "harden --data my_images/ --image-size 64 --out model_store/mine.mar",
    "harden --data my_images/ --weights mine.pth --arch resnet50 --epochs 0 --out mine.mar",
    "harden --data bccd/ --skip-bad --arch ssd --eps 4 --out model_store/cells.mar",
    together=inputs.whole_way,
)
def harden(
    *,
    source: o.Source,
    out: Annotated[Path, Option(help=ARCHIVE), inputs.new_archive],
    weights: Annotated[Path | None, Option(help=YOURS), inputs.weights] = None,
    arch: Annotated[
        str | None, Option(help=f"{ANY_ARCH}; {FITS}", callback=o.take_factory), inputs.any_network
    ] = None,
    image_size: Annotated[int | None, Option(help=f"{o.SIZE}; {FITS}"), inputs.size] = None,
    network: o.Network,
    method: o.Method = "nfgsm",
    threat: o.Threat,
    epochs: Annotated[int | None, Option(min=0, help=f"{KEEP}; {FITS}")] = None,
    batch_size: Annotated[int | None, Option(min=1, help=f"Images per step; {FITS}")] = None,
    lr: Annotated[float | None, Option(help=f"Peak learning rate; {FITS}")] = None,
    augment: Annotated[list[str] | None, Option(help=ANY_AUGMENT), inputs.any_augmentation] = None,
    balance: Annotated[float | None, Option(min=0, max=1, help=f"{BALANCE}; {FITS}")] = None,
    purifier_epochs: Annotated[int | None, Option(min=0, help=f"{NO_PURIFIER}; {FITS}")] = None,
    evaluate_on: Annotated[int, Option(min=0, help="Validation images to attack; 0: none")] = 100,
    dtype: o.Dtype = None,
    guarded: o.Guarded = False,
    sample: o.WithSample = True,
    runs: Annotated[Path, Option(help=STAGES), inputs.folder_to_write] = Path("runs"),
    device: o.Device = "auto",
    yes: Annotated[bool, Option("--yes", "-y", help=YES)] = False,
    anyway: o.Anyway = False,
) -> None:
    """Do everything: from images, and weights if you have some, to an archive that you can serve.

    It proposes a value for every option that you leave out, checks early what could fail late, and
    estimates the time. If you interrupt it, run the same command to resume. If you change the
    inputs, it repeats only the stages that depend on them. If the data have boxes, it makes an
    object detector.
    """
    if has_boxes(source.data):
        from rampart import objects
        from rampart.hardening.objects.training import ObjectRecipe

        new = objects.Network(**given(arch=arch, size=image_size, width=network.width))
        own = given(epochs=epochs, lr=lr, batch_size=batch_size, augment=chosen(augment))
        place = objects.Place(runs, device, dtype, command_line(), sample, evaluate_on, guarded)
        recipe = ObjectRecipe(method, threat.ball(), **own)
        begun = objects.harden(source.open(), out, new, recipe, place, init=weights, anyway=anyway)
        say(*begun, f"{out}: serve it with `rampart serve --archive {out}`")
        return
    from rampart.assembly import harden as go
    from rampart.proposal import Wishes

    net, how = network.config(arch or "resnet18", image_size or 32), chosen(augment)
    asked = (threat.ball(), method, arch, network.width, image_size, net, epochs, batch_size, lr)
    rest = (purifier_epochs, evaluate_on, dtype, device, sample, balance, guarded)
    wishes = Wishes(*asked, how, weights, *rest)
    agree = bool if yes or not sys.stdin.isatty() else ask
    go = partial(go, runs=runs, command=command_line(), agree=agree, anyway=anyway)
    outcome = go(source.open(), out, wishes)
    say(*outcome.lines, f"{out}: serve it with `rampart serve --archive {out}`")


@verb(
    "train --data cifar10/ --out runs/classifier --width 0.5 --epochs 30",
    "train --data bccd/ --arch ssd --init model_store/cifar10/weights.safetensors --out runs/cells",
    together=inputs.learning,
)
def train(
    *,
    source: o.Source,
    run: o.Training,
    arch: Annotated[
        str | None, Option(help=ANY_ARCH, callback=o.take_factory), inputs.any_network
    ] = None,
    image_size: Annotated[int | None, Option(help=f"{o.SIZE}; {SIZES}"), inputs.size] = None,
    network: o.Network,
    method: o.Method = "nfgsm",
    threat: o.Threat,
    epochs: o.Epochs = 30,
    lr: Annotated[float | None, Option(help=RATES)] = None,
    ema: Annotated[float | None, Option(help=DECAY)] = None,
    awp: Annotated[float, Option(help=AWP)] = 0,
    smoothing: Annotated[float, Option(help="Label smoothing")] = 0,
    ramp: Annotated[float, Option(help="Fraction of the run in which eps grows from 0")] = 0,
    steps: Annotated[int, Option(help="Attack steps in pgd, trades, mart and rslad")] = 10,
    teacher: Annotated[Path | None, Option(help=TEACHER), inputs.checkpoint] = None,
    rectify: Annotated[bool, Option("--rectify", help=RECTIFY)] = False,
    compile: Annotated[bool, Option("--compile", help=COMPILE)] = False,
    init: Annotated[Path | None, Option(help=INIT), inputs.checkpoint] = None,
    augment: Annotated[list[str] | None, Option(help=ANY_AUGMENT), inputs.any_augmentation] = None,
    balance: Annotated[float, Option(min=0, max=1, help=f"{BALANCE}; default 0")] = 0,
    aim: Annotated[inputs.Aim | None, Option(help=AIM)] = None,
    passes: Annotated[int | None, Option(min=1, help=PASSES)] = None,
) -> None:
    """Adversarially train a classifier, or an object detector if the data have boxes.

    After Ctrl-C, run the same command to resume.

    Under torchrun, all processes train the same network.
    """
    from rampart.hardening.train.loop import say

    place, how = run.place()._replace(compiled=compile), chosen(augment)
    if has_boxes(source.data):
        from rampart import objects
        from rampart.hardening.objects.training import ObjectRecipe

        rest = given(lr=lr, ema=ema, batch_size=run.batch_size, aim=aim, passes=passes, augment=how)
        rest |= {"epochs": epochs, "seed": run.seed, "ramp": ramp, "steps": steps}
        new = ObjectRecipe(method, threat.ball(), **rest)
        width = 1.0 if network.width is None else network.width
        net = objects.Network(arch or "ssd", image_size or objects.SIZE, width)
        found = objects.train_from(source.open(), net, new, place, init=init)
        say(f"best object detector: {found}")
        return
    from rampart.training import train_from

    recipe = rp.Recipe(method, threat.ball(), epochs, run.batch_size or 128, seed=run.seed)
    recipe = recipe._replace(smoothing=smoothing, awp=awp, ramp=ramp, steps=steps, balance=balance)
    recipe = recipe._replace(**given(lr=lr, ema=ema, augment=how))
    config = network.config(arch or "resnet18", image_size or 32)._replace(rectified=rectify)
    best = train_from(source.open(), config, recipe, place, init=init, teacher=teacher)
    say(f"best classifier: {best}")


@verb(
    "purifier --data cifar10/ --classifier runs/c/classifier.safetensors --out runs/p",
    "purifier --data bccd/ --classifier runs/cells/objects.safetensors --eps 4 --out runs/p",
    together=inputs.cleaning,
)
def purifier(
    *,
    source: o.Source,
    classifier: Annotated[Path, Option(help=FROZEN), inputs.checkpoint],
    run: o.Training,
    threat: o.Threat,
    epochs: o.Epochs = 2,
    lr: o.LearningRate = 1e-3,
    replays: Annotated[int | None, Option(min=1, help=REPLAYS)] = None,
    static: Annotated[bool, Option("--static", help=ALONE)] = False,
    augment: Annotated[list[str] | None, Option(help=SAME), inputs.any_augmentation] = None,
    arch: o.Own = None,
) -> None:
    """Train the GAN purifier for a frozen classifier, or object detector if the data have boxes.

    Resumes like `train`, also under torchrun.
    """
    from rampart.hardening.train.loop import say
    from rampart.hardening.train.purifier import STATIC, PurifierRecipe
    from rampart.models import train_purifier

    batch = run.batch_size or (16 if has_boxes(source.data) else 128)
    recipe = PurifierRecipe(threat.ball(), epochs, batch, lr, seed=run.seed)
    recipe = recipe._replace(**(STATIC if static else {}) | given(replays=replays))
    how = chosen(augment)
    best = train_purifier(source.open(), classifier, recipe, run.place(), augment=how)
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
    std: Annotated[Colour | None, Option(help="Standard deviation; default as --mean")] = None,
) -> None:
    """Convert weights from elsewhere into a file that the other commands read."""
    from rampart.training import adopt as take

    config = take(weights, out, network.config(arch, image_size, classes), mean=mean, std=std)
    say(f"{out}: {arch}, mean {config.mean}, std {config.std}")


@verb(
    "average runs/a/classifier.safetensors runs/b/classifier.safetensors --out runs/ab.safetensors"
)
def average(
    *,
    files: Annotated[list[Path], Argument(metavar="FILE", help=SIBLINGS), inputs.checkpoint],
    out: Annotated[Path, Option(help=MEAN), inputs.file_to_write],
) -> None:
    """Average networks that you fine-tuned from the same weights: often better than each of them.

    The result is as fast as one network. Evaluate it on validation images before you choose it.
    """
    from rampart.hardening.train.loop import say
    from rampart.hardening.train.mean import average as mean_of

    mean_of(files, out, command=command_line())
    say(f"{out}: the mean of {len(files)} networks")


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
        from rampart.hardening.train import cifar10

        say(f"{len(cifar10.download(home))} training images in {home}: pass it as --data")


@verb("digits digits/")
def digits(
    folder: Annotated[Path, Argument(help="Where to put them"), inputs.folder_to_write],
) -> None:
    """Write scikit-learn's handwritten digits to FOLDER, as a small data set to start with."""
    from rampart.hardening.train.digits import write

    for part, count in write(folder).items():
        say(f"{folder / part}.npz: {count} images of 32x32 pixels")
