"""The command line: one function per verb, each a thin call into the packages."""

import os
import shlex
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

    from handlers.engine import Engine
    from hardening.attacks import Threat
    from hardening.calibrate import Precision
    from hardening.data import Folder, Images
    from hardening.page import Pictures
    from hardening.pipeline import DefendedClassifier
    from hardening.victims import Victim

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Data = Annotated[Path, typer.Option(help="Training images: CIFAR-10 folder, ImageFolder or .npz")]
Held = Annotated[Path | None, typer.Option(help="Held-out images; without it a tenth of --data")]
Out = Annotated[Path, typer.Option(help="Folder of this run; an unfinished run there continues")]
METHOD = "nfgsm, gat, pgd, trades, mart, rslad; standard makes an undefended control"
Method = Annotated[str, typer.Option(help=METHOD)]
CLASSIFIER = "classifier.safetensors"
Device = Annotated[Literal["cpu", "cuda", "auto"], typer.Option(help="Where to compute")]
Norm = Annotated[Literal["Linf", "L2"], typer.Option(help="Norm of the threat model")]
EPS = "n/255 for Linf (default 8), plain for L2 (0.5)"
Eps = Annotated[float | None, typer.Option(min=0, help=EPS)]
Count = Annotated[int, typer.Option(min=1)]
ARCH = "Name of torchvision's (resnet18, vgg11_bn, alexnet, googlenet ...), or timm:NAME"
NORM = "Of the training pixels in [0, 1]; default the file's own, else CIFAR-10's up to 64 pixels, "
NORM += "ImageNet's above"
Arch = Annotated[str, typer.Option(help=ARCH)]
Width = Annotated[float, typer.Option(help="Factor on the channels of a ResNet or VGG")]
Size = Annotated[int, typer.Option(help="Pixels per side")]
MIRROR = "Flip half of the images; not for signs, letters and digits, which then are others"
STEPS = "Of the attack in pgd, trades, mart and rslad"
TEACHER = "Robust network that rslad distils from, as an earlier run wrote"
RECTIFY = "Train a second head beside: rectified rejection"
ARITHMETIC = "Of training; default bf16 on GPUs and CPUs that compute in it, else fp32"
Arithmetic = Annotated[Literal["bf16", "fp32"] | None, typer.Option(help=ARITHMETIC)]
COMPILE = "torch.compile: a minute or more first, faster steps then"
INIT = "Weights to go on from, as an earlier run wrote; --arch, --width, --image-size are theirs"
Model = Annotated[Path, typer.Argument(help="Folder of the model, as model_store/NAME")]
VARIANT = "full, or lean for tight latency; default what `rampart ablate` chose, else full"
Variant = Annotated[Literal["full", "lean"] | None, typer.Option(help=VARIANT)]
ON_TEST = "Report on these test images: classifier, max-softmax rejection, lean, full; no choice"
ONLY_ROWS = (
    "Only this row, beside classifier and max-softmax rejection; not for the card, since the "
)
ONLY_ROWS += "other rows' attacks are not put to it"
PRECISION = (
    "fp16 and int8 after `rampart quantize`; default int8 where measured to be as robust, on "
)
PRECISION += "100 validation images or more, under the card's threat model and at --rate 0.01"
MAX_PIXELS = (
    "Of a request's images, four times as many as JPEGs; default what fits the model, 4194304 or"
    " more"
)
QueryStore = Annotated[
    str | None,
    typer.Option(help="Watch for query attacks: a local folder, or redis://HOST:PORT/NUMBER"),
]
PrecisionOf = Annotated[
    Literal["fp32", "fp16", "int8"] | None, typer.Option("--precision", help=PRECISION)
]
Split = Literal["validation", "tuning", "calibration"]
Rate = Annotated[float, typer.Option(min=0, max=0.99, help="False-alarm rate on clean images")]


def say(what: object) -> None:
    """Print a line, above whatever progress bars there are."""
    from tqdm import tqdm

    tqdm.write(str(what))


def threat_of(norm: str, eps: float | None) -> "Threat":
    """The threat model of the options --norm and --eps."""
    from hardening.attacks import Threat

    if norm == "Linf":
        return Threat(norm, (8 if eps is None else eps) / 255)
    return Threat(norm, 0.5 if eps is None else eps)


def pick_device(name: str) -> "torch.device":
    """The device called `name`; auto takes CUDA where there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no usable CUDA device; use --device cpu, or auto")
    return torch.device(
        "cpu"
        if name == "auto" and not torch.cuda.is_available()
        else "cuda"
        if name == "auto"
        else name
    )


@lru_cache(maxsize=1)  # the stages of `harden` read the same
def read_data(data: Path, held: Path | None, size: int) -> "tuple[Images | Folder, Images]":
    """(training images, held-out images) of the options --data and --held."""
    from hardening import distributed
    from hardening.data import hold_out, load, load_training

    held_out = load(held, size=size) if held else None
    if held and held_out and held.is_dir():
        if held.resolve().is_relative_to(data.resolve()):
            raise ValueError(f"--held {held} lies in --data {data}: its images would be trained on")
        # Names in a folder are its own; only a file of twins names pictures of another.
        held_out = replace(held_out, paths=())
    train, out = hold_out(load_training(data, size=size), held_out)
    if len(out) < 200:
        raise ValueError(
            f"{held or data} leaves {len(out)} held-out images: calibration needs 200 or more, so"
            " pass at least 2,000 images as --data, or a set of its own as --held"
        )
    if distributed.first():
        say(f"{len(train)} training images, {len(out)} held out")
    return train, out


def command_line() -> str:
    """The command as typed, for the card; folders of this machine are cut from its paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["rampart", *words])


def versions() -> dict[str, str]:
    """Versions of what computes, for the card."""
    from importlib.metadata import version

    import onnxruntime
    import torch

    return {
        "rampart": version("rampart"),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


@app.command()
def download(folder: Path) -> None:
    """Fetch CIFAR-10 (170 MB) into FOLDER with torchvision."""
    from hardening.data import load_cifar10

    images = load_cifar10(folder, download=True)
    say(f"{len(images)} training images in {folder}: pass it as --data")


@app.command()
def digits(folder: Path) -> None:
    """Write scikit-learn's handwritten digits into FOLDER: images to try all this on, at once."""
    from hardening.data import write_digits

    for part, count in write_digits(folder).items():
        say(f"{folder / part}.npz: {count} images of 32x32 pixels")


@app.command()
def train(
    data: Data,
    out: Out,
    held: Held = None,
    arch: Arch = "resnet18",
    width: Width = 1.0,
    image_size: Size = 32,
    method: Method = "nfgsm",
    norm: Norm = "Linf",
    eps: Eps = None,
    epochs: Count = 30,
    batch_size: Count = 128,
    lr: float = 0.2,
    ema: Annotated[float, typer.Option(help="Decay of the weight average")] = 0.998,
    awp: Annotated[float, typer.Option(help="Adversarial weights: parts of their norm, 0.005")] = 0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing")] = 0,
    ramp: Annotated[float, typer.Option(help="Part of the run in which eps grows from 0")] = 0,
    steps: Annotated[int, typer.Option(help=STEPS)] = 10,
    teacher: Annotated[Path | None, typer.Option(help=TEACHER)] = None,
    rectify: Annotated[bool, typer.Option("--rectify", help=RECTIFY)] = False,
    precision: Arithmetic = None,
    compile: Annotated[bool, typer.Option("--compile", help=COMPILE)] = False,
    init: Annotated[Path | None, typer.Option(help=INIT)] = None,
    mirror: Annotated[bool, typer.Option(help=MIRROR)] = True,
    validate_on: Annotated[
        int, typer.Option(min=1, help="Validation images used each epoch")
    ] = 1500,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Train a classifier adversarially. Ctrl-C is safe: the same command continues.

    Started by torchrun, all its processes train the one classifier.
    """
    import torch

    from handlers.engine import cpu_features
    from hardening import checkpoint, distributed
    from hardening.data import split
    from hardening.models import Classifier, ClassifierConfig
    from hardening.pipeline import load_classifier
    from hardening.train import Recipe, fast_precision, train_classifier

    if image_size < 16 or image_size % 8:
        raise ValueError(f"--image-size {image_size}: take a multiple of 8 from 16 up")
    if (method == "rslad") != bool(teacher):
        raise ValueError("--method rslad and --teacher go together: one distils, from the other")
    where = distributed.join(pick_device(device))
    torch.manual_seed(seed)  # new layers of --init are drawn from it too
    start = load_classifier(init, auxiliary=True, rectified=rectify) if init else None
    images, held_out = read_data(data, held, start.config.image_size if start else image_size)
    if start and start.config.classes != len(images.classes):
        raise ValueError(
            f"--init {init} tells {start.config.classes} classes apart, but {data} has"
            f" {len(images.classes)}: train from new weights, without --init"
        )
    config = ClassifierConfig(arch, len(images.classes), width, image_size, rectified=rectify)
    net = start or Classifier(config, auxiliary=True)
    robust = load_classifier(teacher).to(where) if teacher else None
    known = checkpoint.read(init)[0] if init else {}
    recipe = Recipe(
        method,
        threat_of(norm, eps),
        epochs,
        batch_size,
        lr,
        ema=ema,
        seed=seed,
        smoothing=smoothing,
        awp=awp,
        ramp=ramp,
        steps=steps,
        precision=precision or fast_precision(where, cpu_features()),
        mirrored=mirror,
        teacher=checkpoint.digest(robust) if robust else "",
        after=str(known.get("training", init.name)) if init else "",
    )
    if compile:
        net.backbone.compile()
    validation = split(held_out, "validation")[slice(validate_on)]
    net, parts = net.to(where), (images, validation)
    best = train_classifier(
        net,
        recipe,
        out,
        parts,
        teacher=robust,
        earlier=known.get("history", []),
        commands=[*known.get("commands", []), command_line()],
    )
    if distributed.first():
        say(f"best classifier: {best}")


CIFAR10_NORM = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@app.command()
def adopt(
    weights: Annotated[Path, typer.Argument(help="state dict: .pth, .pt or .safetensors")],
    out: Annotated[Path, typer.Option(help="The classifier.safetensors to write")],
    arch: Arch,
    classes: Annotated[int, typer.Option(help="How many it tells apart")],
    width: Width = 1.0,
    image_size: Size = 224,
    mean: Annotated[tuple[float, float, float] | None, typer.Option(help=NORM)] = None,
    std: Annotated[tuple[float, float, float] | None, typer.Option(help="Likewise")] = None,
) -> None:
    """Bring weights from elsewhere into the form that the other commands take."""
    from hardening import checkpoint, foreign
    from hardening.models import SMALL, ClassifierConfig

    usual = CIFAR10_NORM if image_size <= SMALL else IMAGENET_NORM
    config = ClassifierConfig(arch, classes, width, image_size, *usual)
    net = foreign.adopt(weights, config, mean=mean, std=std)
    content = {"classifier": net.config._asdict(), "training": f"adopted from {weights.name}"}
    checkpoint.save(out, net, content)
    say(f"{out}: {arch}, mean {net.config.mean}, std {net.config.std}")


@app.command()
def purifier(
    data: Data,
    classifier: Annotated[Path, typer.Option(help="classifier.safetensors of `rampart train`")],
    out: Out,
    held: Held = None,
    norm: Norm = "Linf",
    eps: Eps = None,
    epochs: int = 2,
    batch_size: int = 128,
    lr: float = 1e-3,
    precision: Arithmetic = None,
    validate_on: Annotated[int, typer.Option(help="Validation images used each epoch")] = 1500,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Train the GAN purifier in front of a frozen classifier. Ctrl-C and torchrun as in `train`."""
    from handlers.engine import cpu_features
    from hardening import distributed
    from hardening.data import split
    from hardening.pipeline import load_classifier
    from hardening.purifier import PurifierConfig, PurifierRecipe, train_purifier
    from hardening.train import fast_precision

    where = distributed.join(pick_device(device))
    net = load_classifier(classifier).to(where)
    images, held_out = read_data(data, held, net.config.image_size)
    validation = split(held_out, "validation")[slice(validate_on)]
    fast = precision or fast_precision(where, cpu_features())
    threat = threat_of(norm, eps)
    recipe = PurifierRecipe(threat, epochs, batch_size, lr, seed=seed, precision=fast)
    parts, commands = (images, validation), [command_line()]
    best = train_purifier(net, PurifierConfig(), recipe, out, parts, commands=commands)
    if distributed.first():
        say(f"best purifier: {best}")


@app.command()
def calibrate(
    folder: Annotated[Path | None, typer.Argument(help="Folder of the model to make")] = None,
    data: Annotated[Path | None, typer.Option(help="Training images, as `rampart train`")] = None,
    classifier: Annotated[Path | None, typer.Option(help="File of `rampart train`")] = None,
    purifier: Annotated[Path | None, typer.Option(help="File of `rampart purifier`")] = None,
    held: Held = None,
    data_name: Annotated[str, typer.Option(help="What the card calls the training data")] = "",
    model: Annotated[Path | None, typer.Option(help="A finished .mar, to calibrate anew")] = None,
    images: Annotated[Path | None, typer.Option(help="What its clients send: a folder")] = None,
    out: Annotated[Path | None, typer.Option(help="The new .mar; NAME-recalibrated.mar")] = None,
) -> None:
    """Put classifier and purifier together as a model folder and calibrate its variants.

    Without a purifier the folder has the variant `lean` only. With --model and --images, a finished
    archive is calibrated on pictures of your traffic instead; its graph stays as it is.
    """
    if model and images:
        if folder or data or classifier or purifier or held or data_name:
            raise ValueError("--model and --images go alone, with --out: the archive has the rest")
        recalibrate(model, images, out or model.with_stem(f"{model.stem}-recalibrated"))
    elif folder and data and classifier and not (model or images or out):
        assemble(folder, data, classifier, purifier, held=held, data_name=data_name)
    else:
        raise ValueError(
            "pass FOLDER --data IMAGES --classifier FILE to make a model folder, or --model"
            " FILE.mar --images FOLDER to calibrate an archive anew"
        )


def recalibrate(model: Path, images: Path, out: Path) -> None:
    """A new archive, with the ranks of the pictures below `images`."""
    from export.recalibrate import recalibrate as remake

    made = remake(model, images, out, command=command_line())
    for line in made.refused:
        say(f"left out, as the endpoint would: {line}")
    say(
        f"the old calibration flags {made.flagged:.1%} of these {made.images} pictures where it"
        f" promises {made.rate:.1%}; drift {made.drift:.3f}, by chance up to {made.chance:.3f}"
    )
    low, high = made.spread
    say(f"so many pictures put the true rate between {low:.1%} and {high:.1%}, 95 times in 100")
    say("left out of its card: the pipeline's figures, which the old thresholds made")
    say(f"{out}: serve it with `rampart serve --model {out}`")


def assemble(
    model: Path,
    data: Path,
    classifier: Path,
    purifier: Path | None,
    *,
    held: Path | None,
    data_name: str,
) -> None:
    """Make a model folder: weights, a calibration for each variant, a card. What stood there goes
    once all of it is made, and stays where it was of the same model."""
    from hardening import calibrate as calibration
    from hardening import checkpoint, report
    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening.data import split, spread
    from hardening.detectors import FITTED, FULL
    from hardening.train import draw

    net = pipelines.load_classifier(classifier)
    generator = pipelines.load_purifier(purifier) if purifier else None
    train, images = read_data(data, held, net.config.image_size)
    defended = pipelines.DefendedClassifier(net, generator, FULL).eval()
    # On training images, since every held-out split is measured on, combined on or ranked.
    few = spread(train, FITTED) if len(train) else split(images, "validation")
    if not len(train):
        say("all images of --data are held out: what is measured on validation images is too good")
    defended.detectors.feature_distance.fit(net, few)
    made_by = {"classifier": checkpoint.read(classifier)[0]}
    if purifier:
        made_by["purifier"] = checkpoint.read(purifier)[0]
    training = {
        part: str(known.get("training", f"told by no file of {part}"))
        for part, known in made_by.items()
    }
    commands = [line for known in made_by.values() for line in known.get("commands", [])]
    history = made_by["classifier"].get("history", [])
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        pipelines.save(made / "weights.safetensors", defended, images.classes)
        for variant in folders.VARIANTS if purifier else folders.VARIANTS[1:]:
            pipeline, _ = pipelines.load(made / "weights.safetensors", variant)
            ranks = calibration.calibrate(pipeline, images, variant)
            calibration.write(made, ranks, f"{(held or data).name}, calibration split")
        if history:
            draw(history, made / "curve.png")
        card = {
            "model": model.name,
            "data": data_name or data.name,
            "training": training,
            "history": history,
            "classifier": net.config._asdict(),
            "calibration_images": ranks.images,
            "commands": list(dict.fromkeys([*commands, command_line()])),  # one line of `harden`
        }
        report.write_card(made, card)
        folders.deliver(made, model)
    for file in folders.calibrations(model):
        say(file)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    data_name: Annotated[str, typer.Option(help="What the card calls these images")] = "",
    held: Annotated[Path | None, typer.Option(help="Its --held, where --part is of those")] = None,
    part: Annotated[Split | None, typer.Option(help="Only this split of held-out images")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many images, evenly spaced")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="100 images, short attacks")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only this attack, as pgd20")] = None,
    variant: Annotated[
        Literal["full", "lean"] | None,
        typer.Option(help="With --only: this alone, in the precision that is asked for"),
    ] = None,
    twin: Annotated[Path | None, typer.Option(help="Undefended twin, as a control")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Attack the int8 graphs as well")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Attack the fp16 graphs as well")] = False,
    norm: Norm = "Linf",
    eps: Eps = None,
    rate: Rate = 0.01,
    cache: Annotated[Path, typer.Option(help="Folder for what attacks found")] = Path("runs/found"),
    gallery: Annotated[
        Path | None, typer.Option(help="A second page, with attacked images of --data in it")
    ] = None,
    device: Device = "auto",
) -> None:
    """Attack classifier and pipeline with full knowledge; write card.json and report.html."""
    import pyautoattack  # noqa: F401  # missing, it would be missed only after many minutes

    from hardening import evaluate as evaluation
    from hardening import folder as folders
    from hardening import page, report
    from hardening.rungs import QUICK, Budget

    if variant and not only:
        raise ValueError("--variant goes with --only: worst cases take the attacks on all variants")
    folders.check_variant(model, variant)
    where, threat = pick_device(device), threat_of(norm, eps)
    limit = limit or (100 if quick else None)
    chosen, source = measured(model, data, data_name, held=held, part=part, limit=limit)
    images = chosen.to(where)
    twin = twin or folders.sibling(model)
    victims = victims_of(model, twin, images.classes, rate=rate, device=where)
    lower = lower_victims(model, "int8", rate=rate, device=where) if int8 else []
    lower += lower_victims(model, "fp16", rate=rate, device=where) if fp16 else []
    if variant:
        victims = [victim for victim in lower or victims if victim.variant == variant]
    else:
        victims += lower
    budget = QUICK if quick else Budget()
    seconds = evaluation.estimate(victims, images, threat, budget, only=only or [])
    say(f"{len(images)} images; about {seconds / 60:.0f} minutes, Ctrl-C is safe")
    result = evaluation.evaluate(
        victims, images, threat, budget, rate=rate, folder=cache, only=only or []
    )
    rows = [report.row(m, data=source, command=command_line(), rate=rate) for m in result.metrics]
    card = report.read_card(model)
    entries: dict[str, Any] = {"metrics": report.merge(card.get("metrics", []), rows)}
    # The first whole evaluation says what the card's threat is; other figures stand beside.
    settled = card.get("threat_model") if only or "checks" in card else None
    entries |= {"threat_model": settled or str(threat), "versions": versions()}
    own = entries["threat_model"] == str(threat)
    checks = {"checks": [check._asdict() for check in result.checks]}
    card = report.add_to_card(model, entries | (checks if own and result.checks else {}))
    report.log_evaluation(model, {"data": source, "n": len(images), "command": command_line()})
    say(report.table(rows))
    for check in result.checks:
        say(check)
    if not only:
        pipeline, pictures = cat(model, threat, rate=rate)
        pipeline = pipeline.to(where)
        write = partial(page.write, card=card, rows=rows, evaluation=result, pipeline=pipeline)
        if own:
            say(write(model / "report.html", pictures=pictures))
        else:
            say(f"the card is of {settled}: its self-checks and report.html stay as they are")
        if gallery:
            say(write(gallery, pictures=page.gallery(result, pipeline)))
    insist(checks)


def measured(
    model: Path,
    data: Path,
    data_name: str,
    *,
    held: Path | None,
    part: str | None,
    limit: int | None,
) -> "tuple[Images, str]":
    """The images under `data` that a model is measured on, and what the card calls them.

    With `part` they are a split of `held`, or of the tenth that training leaves out of `data`; an
    .npz that was not trained on is taken for held-out images itself.
    """
    from hardening import folder as folders
    from hardening import report
    from hardening.data import load, split, spread
    from hardening.pipeline import load_classifier

    if held and not part:
        raise ValueError("--held goes with --part: without it, pass as --data what is to be used")
    size = load_classifier(model / "weights.safetensors").config.image_size
    known = folders.trained_on(report.read_card(model), data)
    source = data_name or (held or data).name
    if part and (held or known or data.suffix != ".npz"):
        every = not_trained_on(model, data, held, size)
    else:
        every = load(data, train=False, size=size)
        if known and not (data / "cifar-10-batches-py").is_dir():  # of which this is the test half
            typer.echo(
                f"{data} has the name of the training data: on images that were trained on, every"
                " figure is too high",
                err=True,
            )
    if part:
        every, source = split(every, part), f"{part} split of {source}"
    images = spread(every, limit)
    return images, source if len(images) == len(every) else f"{len(images)} of {source}"


def not_trained_on(model: Path, data: Path, held: Path | None, size: int) -> "Images":
    """The held-out images of `read_data`, for a model that is made.

    Raises ValueError where it was made with a --held and none is given now: a tenth of `data` would
    be images that it was trained on.
    """
    from hardening import folder as folders
    from hardening.report import read_card

    if held is None and (named := folders.held_beside(read_card(model), data)):
        raise ValueError(f"{model} was made with --held {named[0]}: pass it here as well")
    return read_data(data, held, size)[1]


class ChecksFailed(ValueError):
    """A self-check of an evaluation failed; all figures are written nevertheless."""


def insist(card: dict[str, Any]) -> None:
    """Raise ChecksFailed where a self-check of the card failed."""
    failed = [f"{c['name']} ({c['subject']})" for c in card.get("checks", []) if not c["passed"]]
    if failed:
        raise ChecksFailed(
            f"self-checks failed: {', '.join(failed)}. Before you know why, do not use the figures"
        )


@app.command()
def harden(
    data: Data,
    out: Annotated[Path, typer.Option(help="The .mar to write, as model_store/mine.mar")],
    held: Held = None,
    weights: Annotated[Path | None, typer.Option(help="Yours, as `adopt` takes them")] = None,
    arch: Arch = "resnet18",
    width: Width = 1.0,
    image_size: Size = 32,
    method: Method = "nfgsm",
    norm: Norm = "Linf",
    eps: Eps = None,
    epochs: Annotated[
        int, typer.Option(min=0, help="Of training; 0 keeps --weights as they are")
    ] = 30,
    purifier_epochs: Annotated[int, typer.Option(min=0, help="0: no purifier, variant lean")] = 2,
    evaluate_on: Annotated[
        int, typer.Option(min=0, help="Validation images to attack; 0: none")
    ] = 100,
    precision: Arithmetic = None,
    runs: Annotated[Path, typer.Option(help="Folder for what the stages make")] = Path("runs"),
    device: Device = "auto",
) -> None:
    """The whole way from images, and weights if you have some, to an archive that can be served.

    Each stage is done once: the same command goes on where it was interrupted, and does again only
    what other inputs change.
    """
    from hardening import folder as folders
    from hardening import report
    from hardening.stages import stages

    if "RANK" in os.environ:
        raise ValueError("torchrun starts `rampart train` and `rampart purifier`, not the others")
    if not (weights or epochs):
        raise ValueError("nothing to harden: pass --weights, or --epochs above 0 to train anew")
    if out.suffix != ".mar":
        raise ValueError(f"--out {out}: TorchServe loads files that end in .mar; name it so")
    images, held_out = read_data(data, held, image_size)
    source: dict[str, Any] = {"images": images, "held": held_out}
    net: dict[str, Any] = {"arch": arch, "width": width, "image_size": image_size}
    threat: dict[str, Any] = {"norm": norm, "eps": eps, "device": device}
    fast: dict[str, Any] = {"precision": precision} if precision else {}
    wanted = (weights, epochs, purifier_epochs, "calibrate", evaluate_on, "archive")
    parts: dict[str, Any] = {}
    with stages(runs / out.stem, sum(map(bool, wanted))) as job:
        if weights:
            take = {**net, "classes": len(images.classes)}
            make = partial(adopt_into, weights, take)
            parts["classifier"] = job.once("adopt", {**take, "weights": weights}, make) / CLASSIFIER
        if epochs:
            how = {**net, **threat, **fast, "method": method, "epochs": epochs}
            how["init"] = parts.get("classifier")
            make = partial(train, data, held=held, **how)
            parts["classifier"] = job.once("train", {**source, **how}, make) / CLASSIFIER
        if purifier_epochs:
            how = {**threat, **fast, **parts, "epochs": purifier_epochs}
            make = partial(purifier_into, data, {"held": held, **how})
            folder = job.once("purifier", {**source, **how}, make)
            parts["purifier"] = folder / "purifier.safetensors"
        make = partial(calibrate_into, out.stem, data, {"held": held, **parts})
        model = job.once("calibrate", {**source, **parts, "name": out.stem}, make) / out.stem
        if evaluate_on:
            known = {**source, **threat, **folders.contents(model), "n": evaluate_on}
            options = {"part": "validation", "quick": True, "limit": evaluate_on, **threat}
            make = partial(evaluate_into, model, data, {"held": held, **options})
            model = job.once("evaluate", known, make) / out.stem
        packed = job.once(
            "archive", folders.contents(model), lambda folder: archive(model, folder / out.name)
        )
    if folders.deliver(model, out.with_suffix("")) and folders.is_of(out, model):
        say(f"{out} is of these weights and stays as it is: `rampart archive` builds it anew")
    else:  # whole or not at all
        partial_copy = shutil.copy(packed / out.name, out.with_suffix(".partial"))
        Path(partial_copy).replace(out)
    card = report.read_card(model)
    say(f"\n{report.markdown(card)}\n")
    say(f"{out}: serve it with `rampart serve --model {out}`")
    insist(card)


def adopt_into(weights: Path, options: dict[str, Any], folder: Path) -> None:
    """`adopt` as a stage."""
    adopt(weights, folder / CLASSIFIER, **options)


def purifier_into(data: Path, options: dict[str, Any], folder: Path) -> None:
    """`purifier` as a stage."""
    purifier(data, out=folder, **options)


def calibrate_into(name: str, data: Path, options: dict[str, Any], folder: Path) -> None:
    """`calibrate` as a stage."""
    calibrate(folder / name, data, **options)


def evaluate_into(model: Path, data: Path, options: dict[str, Any], folder: Path) -> None:
    """`evaluate` as a stage, on a copy of the model folder; failed checks wait for the end."""
    shutil.copytree(model, folder / model.name, dirs_exist_ok=True)
    with suppress(ChecksFailed):
        evaluate(folder / model.name, data, **options)


def cat(model: Path, threat: "Threat", *, rate: float) -> "tuple[DefendedClassifier, Pictures]":
    """The pipeline of a model folder, and pictures that a page may carry: scikit-image's cat."""
    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening.calibrate import load_variant
    from hardening.objectives import look_at
    from hardening.page import Pictures
    from hardening.rungs import QUICK, fool

    variant = folders.best_variant(model)
    pipeline, _ = pipelines.load(model / "weights.safetensors", variant)
    size = pipeline.classifier.config.image_size
    pixels = picture(None, size)
    look = look_at(pipeline, load_variant(model, variant), rate)
    source = f"scikit-image's CC0 cat (chelsea), decoded to {size}x{size}"
    return pipeline, Pictures(pixels, fool(look, pixels, threat, QUICK), ["cat"], source)


def victims_of(
    model: Path,
    twin: Path | None,
    classes: tuple[str, ...],
    *,
    rate: float,
    device: "torch.device",
) -> "list[Victim]":
    """The classifier of a model folder, its variants with their exported graphs, and the twin."""
    from hardening import checkpoint, victims
    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening.calibrate import load_variant

    weights = model / "weights.safetensors"
    net = pipelines.load_classifier(weights).to(device)
    out = [victims.label_victim("classifier", net, checkpoint.digest(net))]
    for variant in folders.variants_in(model):
        pipeline, known = pipelines.load(weights, variant)
        if known != classes:
            raise ValueError(f"the images have the classes {classes}, the model {known}")
        engine = to_engine(pipeline)
        digest = checkpoint.digest(pipeline)
        out.append(
            victims.pipeline_victim(
                pipeline.to(device),
                load_variant(model, variant),
                digest,
                rate=rate,
                engine=engine,
            )
        )
    if twin:
        net = pipelines.load_classifier(twin / "weights.safetensors").to(device)
        out.append(victims.label_victim("undefended", net, checkpoint.digest(net)))
    return out


def lower_victims(
    model: Path, precision: "Precision", *, rate: float, device: "torch.device"
) -> "list[Victim]":
    """The graphs of a model folder in fp16 or int8."""
    from export.precision import check_made, ranges_file
    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening import victims
    from hardening.calibrate import load_variant

    out = []
    for variant in folders.variants_in(model):
        check_made(model, variant, precision)
        pipeline, _ = pipelines.load(model / "weights.safetensors", variant)
        engine = to_engine(pipeline, precision, ranges_file(model, variant))
        table = load_variant(model, variant, precision)
        make = partial(victims.lower_victim, pipeline.to(device), table, engine.digest)
        out.append(make(precision=precision, rate=rate, engine=engine))
    return out


@app.command()
def ablate(
    model: Model,
    data: Data,
    held: Held = None,
    limit: Annotated[int, typer.Option(min=1, help="So many images, evenly spaced")] = 200,
    steps: Annotated[int, typer.Option(help="Of each attack")] = 20,
    norm: Norm = "Linf",
    eps: Eps = None,
    cache: Annotated[Path, typer.Option(help="Folder for what attacks found")] = Path("runs/found"),
    twin: Annotated[Path | None, typer.Option(help="Undefended twin, as a control")] = None,
    test: Annotated[Path | None, typer.Option(help=ON_TEST)] = None,
    only: Annotated[list[str] | None, typer.Option(help=ONLY_ROWS)] = None,
    device: Device = "auto",
) -> None:
    """What each part adds under attack, and costs; the outcome names the default variant."""
    import pyautoattack  # noqa: F401  # missing, it would be missed only after many minutes

    from hardening import ablation, checkpoint, plots, report
    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening.data import load, split, spread
    from hardening.rungs import QUICK
    from hardening.victims import label_victim

    if only and (test or twin):
        raise ValueError("--only goes without --test and --twin, which have rows of their own")
    where, weights = pick_device(device), model / "weights.safetensors"
    pipeline, known = pipelines.load(weights, folders.calibrated(model)[0])
    chosen = ablation.chosen(pipeline, only or [], test=test is not None)
    size = pipeline.classifier.config.image_size
    images = not_trained_on(model, data, held, size)
    attacked = load(test, train=False, size=size) if test else split(images, "validation")
    for classes in (images.classes, attacked.classes):
        if known != classes:
            raise ValueError(f"the images have the classes {classes}, the model {known}")
    few = spread(attacked, limit).to(where)
    every = [
        ablation.arm(pipeline, setup, images, partial(to_engine, threads=1), where)
        for setup in chosen
    ]
    if (control := twin or folders.sibling(model)) and not (test or only):
        net = pipelines.load_classifier(control / "weights.safetensors")
        victim = label_victim("undefended", net.to(where), checkpoint.digest(net))
        every.append(ablation.Attacked(ablation.Setup("undefended"), None, [victim], None))
    threat, budget = threat_of(norm, eps), QUICK._replace(steps=steps)
    outcomes = ablation.ablate(every, few, threat, budget, folder=cache)
    source = test.name if test else f"validation images of {(held or data).name}"
    how = {"data": f"{len(few)} {source}", "command": command_line()}
    entry = ablation.entry(outcomes, threat, budget, len(few.classes), **how)
    say(report.piped(*ablation.table(entry["rows"])))
    if test:
        report.add_to_card(model, {"test_ablation": entry})
        report.log_evaluation(model, {name: entry[name] for name in ("data", "n", "command")})
    if test or only:
        say(report.piped(*ablation.curve_table(entry["rows"])))
        return
    entry["default"] = ablation.default(outcomes)
    report.add_to_card(model, {"ablation": entry})
    say(f"default variant: {entry['default']['variant']}, {entry['default']['why']}")
    say(plots.ablation(entry["rows"], model / "ablation.png"))


@app.command()
def alarms(
    model: Model,
    data: Data,
    held: Held = None,
    limit: Annotated[
        int, typer.Option(min=1, help="So many calibration images, evenly spaced")
    ] = 1000,
    rate: Rate = 0.01,
    device: Device = "auto",
) -> None:
    """How often clean images are flagged, by the way they come and by the class they get."""
    from hardening import alarms as false
    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening import report
    from hardening.calibrate import load_variant
    from hardening.data import split, spread

    where, every = pick_device(device), []
    for variant in folders.calibrated(model):
        pipeline, _ = pipelines.load(model / "weights.safetensors", variant)
        every.append(false.Judged(pipeline.to(where), load_variant(model, variant)))
    images = not_trained_on(model, data, held, pipeline.classifier.config.image_size)
    sample = spread(split(images, "calibration"), limit).to(where)
    unranked = split(images, "validation").to(where)
    rows = [
        *false.false_alarms(every, sample, rate=rate),
        *false.by_class(every, unranked, rate=rate),
    ]
    coverage = {
        judged.calibration.variant: list(false.coverage(judged.calibration.combined))
        for judged in every
    }
    remedies = false.remedies(rows)
    source = f"calibration images of {(held or data).name}; by class its validation images"
    entry = {"data": source, "rate": rate, "rows": rows}
    entry |= {"coverage": coverage, "remedies": remedies, "command": command_line()}
    report.add_to_card(model, {"false_alarms": entry})
    say(report.piped(*false.table(rows)))
    for name, points in coverage.items():
        for point in points:
            say(f"{name}, promised {point['alpha']:.0%}: {false.in_words(point)}")
    for line in remedies:
        say(line)


@app.command()
def outside(
    model: Model,
    data: Annotated[Path, typer.Option(help="Images to measure on: folder or .npz")],
    data_name: Annotated[str, typer.Option(help="What the card calls these images")] = "",
    held: Annotated[Path | None, typer.Option(help="Its --held, where --part is of those")] = None,
    part: Annotated[Split | None, typer.Option(help="Only this split of held-out images")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only so many images, evenly spaced")] = 200,
    rate: Rate = 0.01,
    cache: Annotated[Path, typer.Option(help="Folder for what attacks found")] = Path("runs/found"),
    device: Device = "auto",
) -> None:
    """What lies outside the threat model: L2, a patch, corruptions, attacks on the resize step."""
    from hardening import outside as beyond
    from hardening import report
    from hardening.rungs import QUICK

    where = pick_device(device)
    chosen, source = measured(model, data, data_name, held=held, part=part, limit=limit)
    images = chosen.to(where)
    victims = victims_of(model, None, images.classes, rate=rate, device=where)
    rows = list(beyond.rows(victims, images, QUICK, folder=cache))
    scaled = beyond.scaling(images.image.shape[1])
    entry = {"data": source, "rate": rate, "rows": rows, "scaling": scaled}
    entry |= {"attack": f"{beyond.ATTACKS}, {QUICK}", "command": command_line()}
    report.add_to_card(model, {"outside": entry})
    report.log_evaluation(model, {"data": source, "n": len(images), "command": command_line()})
    say(report.piped(*beyond.table(rows)))
    say(beyond.in_words(scaled))


def to_engine(
    pipeline: "DefendedClassifier",
    precision: "Precision" = "fp32",
    ranges: Path = Path(),
    *,
    threads: int = 0,
) -> "Engine":
    """The exported graph of a pipeline in ONNX Runtime, on the CPU; 0 threads are all.

    int8 takes its activation ranges from the file `ranges`.
    """
    import tempfile

    from export.precision import lower
    from handlers.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        graph = lower(pipeline, precision, Path(folder) / "graph.onnx", ranges)
        return Engine(graph, threads=threads)


@app.command()
def quantize(
    model: Model,
    data: Data,
    held: Held = None,
    precision: Annotated[Literal["int8", "fp16"], typer.Option(help="For CPUs, for GPUs")] = "int8",
    limit: Annotated[int, typer.Option(min=1, help="So many tuning images give the ranges")] = 512,
    rate: Rate = 0.01,
) -> None:
    """Make the int8 or fp16 form of every variant, calibrate it, and hold it to its gate."""
    from export.precision import make, parts
    from hardening import folder as folders
    from hardening import report
    from hardening.pipeline import load_classifier

    variants, weights = folders.calibrated(model), model / "weights.safetensors"
    source = (held or data).name
    images = not_trained_on(model, data, held, load_classifier(weights).config.image_size)
    for variant in variants:
        form = partial(make, model, variant, precision, images)
        found = form(source=source, limit=limit, rate=rate)
        say(f"{variant}: {found}")
        digests = parts(model, variant, precision)
        known = {"data": f"validation split of {source}", "sha256": digests}
        card = report.read_card(model)
        # Figures of an earlier graph are not this one's.
        rows = [r for r in card.get("metrics", []) if precision not in r["subject"]]
        made = card.get(precision, {}) | {variant: found._asdict() | known}
        made["command"] = command_line()
        report.add_to_card(model, {"metrics": rows, precision: made})


@app.command()
def table(
    models: Annotated[list[Path], typer.Argument(help="Folders of models, the default one first")],
    readme: Annotated[Path, typer.Option(help="File whose table is brought up to date")] = Path(
        "README.md"
    ),
) -> None:
    """Write into README.md what the models' cards say: all in one table, the first in detail."""
    from hardening import folder as folders
    from hardening import report

    for model in models:
        folders.calibrated(model)
    readme.write_text(report.with_tables(readme.read_text(), models))
    say(report.model_table(models))


@app.command()
def export(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The .onnx file to write")] = None,
    triton: Annotated[
        Path | None, typer.Option(help="A Triton model repository, to write the model into")
    ] = None,
    model_version: Annotated[int, typer.Option(min=1, help="Its version there")] = 1,
    tensorrt: Annotated[Path | None, typer.Option(help="The .plan to build, on its GPU")] = None,
    variant: Variant = None,
    precision: PrecisionOf = None,
    data: Annotated[Path | None, typer.Option(help="Images the parity gate compares on")] = None,
) -> None:
    """Write one ONNX graph and prove that it decides as the torch pipeline does."""
    from export.archive import export_variant
    from export.to_tensorrt import to_tensorrt
    from export.to_triton import to_triton
    from hardening import folder as folders

    if sum(target is not None for target in (out, triton, tensorrt)) != 1:
        raise ValueError(
            "pass one of --out FILE.onnx, --triton FOLDER for a model repository, and --tensorrt"
            " FILE.plan"
        )
    folders.check_variant(model, variant)
    chosen = variant or folders.best_variant(model)
    form = precision or folders.best_precision(model, chosen)
    images = gate_images(model, data)
    if out:
        say(export_variant(model, chosen, out, precision=form, images=images))
        say(f"{out}: {chosen}, {form}")
    if triton:
        make = partial(to_triton, model, triton, variant=chosen, precision=form)
        say(f"{make(version=model_version, images=images)}: serve it with tritonserver")
    if tensorrt:
        if form == "int8":
            raise ValueError("int8 is for CPUs: a plan is built with --precision fp32 or fp16")
        say(to_tensorrt(model, tensorrt, variant=chosen, precision=form, images=images))
        say(f"{tensorrt}: pack it with `rampart archive --plan {tensorrt}`")


def gate_images(model: Path, data: Path | None) -> "torch.Tensor | None":
    """64 of the images under --data, for the parity gate."""
    from hardening.data import load, spread
    from hardening.pipeline import load_classifier

    if data is None:
        return None
    size = load_classifier(model / "weights.safetensors").config.image_size
    return spread(load(data, train=False, size=size), 64).image


@app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(help="An archive (.mar), a graph (.onnx) or a plan (.plan)")
    ],
    card: Annotated[
        bool, typer.Option("--card", help="The archive's card in full, as JSON, and nothing else")
    ] = False,
) -> None:
    """What a finished file is, its figures and hashes, and whether this machine can run it."""
    from export import inspection
    from export.terminal import visible

    if card:
        say(inspection.card_text(file))
        return
    for line in inspection.inspect(file):
        say(visible(line))


@app.command()
def verify(
    archive: Annotated[Path, typer.Argument(help="The .mar")],
    signature: Annotated[Path | None, typer.Option(help="Of OpenSSF Model Signing")] = None,
    public_key: Annotated[Path | None, typer.Option(help="Of its signer, PEM")] = None,
) -> None:
    """Check an archive's hashes and, where given, its signature, before it is served."""
    from export.terminal import visible
    from export.verification import verify as check

    for line in check(archive, signature, public_key):
        say(visible(line))


@app.command()
def archive(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The .mar; default model_store/NAME.mar")] = None,
    variant: Variant = None,
    precision: PrecisionOf = None,
    plan: Annotated[Path | None, typer.Option(help="Of `rampart export --tensorrt`")] = None,
    data: Annotated[Path | None, typer.Option(help="Images the parity gate compares on")] = None,
    model_version: Annotated[str, typer.Option(help="Tells archives of one name apart")] = "1.0",
    rate: Rate = 0.01,
    on_detection: Annotated[
        Literal["flag", "reject", "shadow"], typer.Option(help="shadow counts, and says nothing")
    ] = "flag",
    on_failure: Annotated[
        Literal["closed", "open"], typer.Option(help="Of purifier or detectors; open: no defence")
    ] = "closed",
    detail: Literal["full", "public"] = "full",
    query_store: QueryStore = None,
    on_query_attack: Annotated[
        Literal["alert", "throttle", "reject"], typer.Option(help="Needs a query store")
    ] = "alert",
    query_owner: Annotated[
        str | None, typer.Option(help="Header that tells whose queries to compare; default: all")
    ] = None,
    query_expiry: Annotated[float, typer.Option(help="Seconds to remember a query")] = 3600,
    query_capacity: Annotated[int, typer.Option(help="Queries to remember")] = 100_000,
    max_pixels: Annotated[int | None, typer.Option(help=MAX_PIXELS)] = None,
) -> None:
    """Export, check and pack a model folder as one TorchServe archive."""
    from export import archive as archives
    from hardening import folder as folders

    target = out or model.parent / f"{model.name}.mar"
    policy: dict[str, object] = {"false_alarm_rate": rate, "on_detection": on_detection}
    policy |= {"on_failure": on_failure, "detail": detail, "on_query_attack": on_query_attack}
    policy |= {"query_store": query_store, "query_owner": query_owner}
    policy |= {"query_expiry": query_expiry, "query_capacity": query_capacity}
    if max_pixels:
        policy["max_pixels"] = max_pixels
    folders.check_variant(model, variant)
    variant = variant or folders.best_variant(model)
    precision = precision or folders.best_precision(model, variant)
    parity = archives.archive(
        model,
        target,
        variant=variant,
        precision=precision,
        images=gate_images(model, data),
        plan=plan,
        version=model_version,
        settings={"rampart": policy},
    )
    say(parity)
    say(f"{target}: {variant}, {precision}, {target.stat().st_size / 1e6:.1f} MB")


@app.command()
def attack(
    image: Annotated[
        Path | None, typer.Argument(help="Picture; default scikit-image's cat")
    ] = None,
    model: Annotated[Path, typer.Option(help="Folder of the model")] = Path("model_store/cifar10"),
    out: Annotated[Path, typer.Option(help="Folder for the pictures")] = Path("attacked"),
    variant: Variant = None,
    norm: Norm = "Linf",
    eps: Eps = None,
    rate: Rate = 0.01,
) -> None:
    """White-box attack on the shipped defence, written as 8-bit PNGs at model resolution."""
    from PIL import Image

    from hardening import folder as folders
    from hardening import pipeline as pipelines
    from hardening import report
    from hardening.calibrate import load_variant
    from hardening.objectives import look_at
    from hardening.rungs import QUICK, fool

    variant = variant or folders.best_variant(model)
    pipeline, classes = pipelines.load(model / "weights.safetensors", variant)
    calibration = load_variant(model, variant)
    pixels = picture(image, pipeline.classifier.config.image_size)
    look = look_at(pipeline, calibration, rate)
    attacked = fool(look, pixels, threat_of(norm, eps), QUICK)
    panels = []
    out.mkdir(parents=True, exist_ok=True)
    for name, image_sent in (("clean", pixels), ("attacked", attacked)):
        caption = report.describe(pipeline, calibration, image_sent, classes, rate=rate)
        Image.fromarray(image_sent[0].numpy()).save(out / f"{name}.png")
        say(f"{out / name}.png: {caption}")
        panels.append((name, image_sent[0].numpy(), caption))
    panels.append(("purified", pipeline(attacked).purified[0].numpy(), "the classifier's view"))
    say(report.picture(panels, out / "panel.png"))


def picture(file: Path | None, size: int) -> "torch.Tensor":
    """A picture as uint8 (1, size, size, 3); without a file scikit-image's cat."""
    import torch
    from skimage.data import data_dir

    from hardening.data import read_picture

    return torch.from_numpy(read_picture(file or Path(data_dir) / "chelsea.png", size))[None]


@app.command()
def purify(
    image: Annotated[
        Path | None, typer.Argument(help="Picture; default scikit-image's cat")
    ] = None,
    model: Annotated[Path, typer.Option(help="Folder of the model")] = Path("model_store/cifar10"),
    out: Annotated[Path, typer.Option(help="The picture of before and after")] = Path(
        "purified.png"
    ),
    project: Annotated[
        bool, typer.Option("--project", help="Also the generator's own image nearest to it")
    ] = False,
    hide: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="LEFT TOP WIDTH HEIGHT to project without, at model resolution"),
    ] = None,
    rate: Rate = 0.01,
) -> None:
    """What the purifier makes of a picture, and how the verdict changes with it."""
    from hardening import pipeline as pipelines
    from hardening import report
    from hardening.calibrate import load_variant
    from hardening.data import to_float, to_uint8
    from hardening.project import project as nearest

    pipeline, classes = pipelines.load(model / "weights.safetensors", "full")
    calibration = load_variant(model, "full")
    assert pipeline.purifier is not None
    pixels = picture(image, pipeline.classifier.config.image_size)
    views = {"as sent": pixels, "purified": pipeline(pixels).purified}
    if project or hide:
        visible = window(hide, pixels.shape[1])
        made = nearest(pipeline.purifier, to_float(pixels), visible=visible)
        views["projected"] = to_uint8(made)
    panels = []
    for name, view in views.items():
        caption = report.describe(pipeline, calibration, view, classes, rate=rate)
        say(f"{name}: {caption}")
        panels.append((name, view[0].numpy(), caption))
    say(report.picture(panels, out))


def window(hide: tuple[int, int, int, int] | None, size: int) -> "torch.Tensor":
    """1 where a picture of `size` is to be seen and 0 where it is hidden, (size, size)."""
    import torch

    visible = torch.ones(size, size)
    if hide:
        left, top, width, height = hide
        if min(left, top) < 0 or min(width, height) < 1 or max(left, top) >= size:
            raise ValueError(f"--hide {hide}: name a part of the {size}x{size} picture")
        visible[top : top + height, left : left + width] = 0
    return visible


@app.command()
def certify(
    image: Annotated[
        Path | None, typer.Argument(help="Picture; default scikit-image's cat")
    ] = None,
    model: Annotated[Path, typer.Option(help="Folder of the model")] = Path("model_store/cifar10"),
    sigma: Annotated[float, typer.Option(help="Of the Gaussian noise, pixels in [0, 1]")] = 0.12,
    samples: Annotated[int, typer.Option(help="Noisy copies that vote")] = 10_000,
    alpha: Annotated[float, typer.Option(help="How often the certificate may be wrong")] = 0.001,
    device: Device = "auto",
) -> None:
    """A radius (L2) within which the smoothed classifier provably keeps its label, or abstains."""
    from hardening import certify as certificates
    from hardening import pipeline as pipelines
    from hardening.data import to_float

    pipeline, classes = pipelines.load(model / "weights.safetensors", "lean")
    net = pipeline.classifier.to(pick_device(device))
    x = to_float(picture(image, net.config.image_size)).to(net.mean.device)
    made = certificates.certify(net, x, sigma=sigma, samples=samples, alpha=alpha)
    say(certificates.in_words(made, classes))


@app.command()
def redteam(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT/predictions/NAME")],
    images: Annotated[Path, typer.Argument(help="Labelled: CIFAR-10 folder, ImageFolder or .npz")],
    out: Annotated[Path, typer.Option(help="Folder of this run; the same one goes on")] = Path(
        "runs/redteam"
    ),
    attack: Annotated[
        list[str] | None,
        typer.Option(help="square, simba, hopskipjump, boundary or oars; repeatable; default all"),
    ] = None,
    queries: Annotated[int, typer.Option(help="Budget of an image under one attack")] = 1000,
    limit: Annotated[int, typer.Option(min=1, help="Only so many images, evenly spaced")] = 50,
    eps: Annotated[int, typer.Option(help="Radius of the Linf ball, n/255")] = 8,
    image_size: Annotated[int, typer.Option(help="Pixels per side that the model takes")] = 32,
    beside: Annotated[
        Path | None, typer.Option(help="Another run's --out, drawn dashed into the same picture")
    ] = None,
    seed: int = 0,
    i_own_this_endpoint: Annotated[
        bool, typer.Option("--i-own-this-endpoint", help="A must beyond loopback")
    ] = False,
) -> None:
    """Black-box attacks on a running endpoint, over HTTP. Ctrl-C is safe: run it again."""
    from hardening import redteam as team
    from hardening.data import load

    data = load(images, train=False, size=image_size)
    outcomes = team.redteam(
        team.Endpoint(url, data.classes, owned=i_own_this_endpoint),
        data,
        out,
        attacks=attack or tuple(team.ATTACKS),
        limit=limit,
        eps=eps,
        budget=queries,
        seed=seed,
    )
    say(team.summary(outcomes))
    runs = {out.name: outcomes}
    if beside:
        runs[beside.name if beside.name != out.name else str(beside)] = team.read(beside)
    say(team.picture(runs, out / "queries.png"))


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="The .mar to serve")] = Path(
        "model_store/cifar10.mar"
    ),
    host: str = "127.0.0.1",
    port: int = 8080,
    workers: int = 1,
    device: Annotated[
        Literal["cpu", "cuda", "tensorrt", "plan", "auto"],
        typer.Option(help="ONNX Runtime on one of these, or the archive's TensorRT plan"),
    ] = "auto",
    token_authorization: Annotated[
        bool, typer.Option(help="Require TorchServe's tokens; a must beyond loopback")
    ] = False,
    grpc_port: Annotated[int, typer.Option(help="TorchServe's gRPC as well, on this port")] = 0,
    token_minutes: Annotated[int, typer.Option(help="That a token lives")] = 60,
    certificate: Annotated[
        Path | None, typer.Option(help="Serve predictions by https: certificate chain, PEM")
    ] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="Its private key, PEM")] = None,
    model_api: Annotated[
        bool, typer.Option("--model-api", help="Let this machine register and remove models")
    ] = False,
    query_store: QueryStore = None,
    quarantine: Annotated[
        Path | None, typer.Option(help="Keep the newest 1,000 flagged images in this folder")
    ] = None,
    java_memory: Annotated[
        int, typer.Option(help="MB of Java's heap, and as many beside it for bodies under way")
    ] = 300,
    logs: Annotated[
        Path | None,
        typer.Option(help="Keep logs in this folder", show_default="~/.local/state/rampart/..."),
    ] = None,
) -> None:
    """Serve an archive with TorchServe; the Java runtime comes along. Ctrl-C stops it."""
    from skimage.data import data_dir

    from handlers import launch

    if (certificate is None) != (certificate_key is None):
        raise ValueError("--certificate and --certificate-key go together")
    code = launch.serve(
        model,
        host=host,
        port=port,
        workers=workers,
        device=device,
        token_authorization=token_authorization,
        grpc_port=grpc_port,
        model_api=model_api,
        tls=(certificate, certificate_key) if certificate and certificate_key else None,
        token_minutes=token_minutes,
        query_store=query_store,
        quarantine=quarantine,
        java_memory=java_memory,
        log_folder=logs,
        samples=[Path(data_dir) / "chelsea.png"],
    )
    raise typer.Exit(code)


@app.command()
def probe(
    metrics: Annotated[str, typer.Option(help="Where Prometheus asks")] = (
        "http://127.0.0.1:8082/metrics"
    ),
    within: Annotated[float, typer.Option(help="Seconds that a model may be silent")] = 15.0,
    model: Annotated[str | None, typer.Option(help="This one alone, not all")] = None,
) -> None:
    """Whether the served models are alive, for liveness checks: needs no token."""
    from handlers.probe import probe as look

    for name, age in look(metrics, within, model).items():
        print(f"{name}: alive {age:.0f} s ago")


def main() -> Any:
    """Run the command line; an expected failure is one line, not a traceback."""
    from export.terminal import visible

    try:
        return app()
    except ModuleNotFoundError as error:
        typer.echo(f"rampart: this needs {error.name}: `make .venv/dev` installs it", err=True)
        return 1
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        # It may quote a name out of a file that others made.
        typer.echo(f"rampart: {visible(' '.join(str(error).splitlines()))}", err=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
