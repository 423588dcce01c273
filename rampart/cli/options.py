"""Options that several verbs share, and how all of them print."""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, Signature, signature
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.provenance import command_line

if TYPE_CHECKING:
    from rampart import sources, training

Verb = Callable[..., None]

DATA = "Training images: CIFAR-10 folder, one folder per class, tar shards, or .npz"
Data = Annotated[Path, Option(help=DATA), inputs.images]
HELD = "Held-out images; by default, a tenth of --data"
Held = Annotated[Path | None, Option(help=HELD), inputs.images]
SKIP_BAD = "Skip unreadable pictures and faulty boxes; by default, the command lists them and stops"
SkipBad = Annotated[bool, Option("--skip-bad", help=SKIP_BAD)]
MEASURED = "Images to measure on: CIFAR-10 folder (its test set), one folder per class, tar"
MEASURED += " shards, or .npz"
GATED = "Images for the parity gate, which uses 64; by default, crops of a photograph"
Gated = Annotated[Path | None, Option("--images", help=GATED), inputs.images]
TITLE = "Name of these images in the card; by default, their file or folder name"
PART = "Use only this split of the images that training held out of --images"
BESIDE = "The --held file of training, if --part refers to it"
LIMIT = "Use at most this many images, evenly spaced"
Limit = Annotated[int, Option(min=1, help=LIMIT)]


class Source(NamedTuple):
    """Images of training, and those held out of it."""

    data: Data
    held: Held = None
    skip_bad: SkipBad = False

    def open(self) -> "sources.Source":
        """The same in the library."""
        from rampart.sources import Source as Images

        return Images(*self)


class Sample(NamedTuple):
    """Images to measure on."""

    images: Annotated[Path, Option(help=MEASURED), inputs.images]
    data_name: Annotated[str, Option(help=TITLE)] = ""
    held: Annotated[Path | None, Option(help=BESIDE), inputs.images] = None
    part: Annotated[Literal["validation", "tuning", "calibration"] | None, Option(help=PART)] = None

    def read(self, model: "rp.Model", limit: int | None) -> "sources.Sample":
        """At most `limit` of them; what was found and makes figures doubtful is printed."""
        from rampart.sources import Source as Images
        from rampart.sources import sample_of

        source = Images(self.images, self.held)
        sample = sample_of(model, source, name=self.data_name, part=self.part, limit=limit)
        if sample.summary:
            say(*sample.summary)
        if sample.warning:
            typer.echo(sample.warning, err=True)
        return sample


def take_factory(arch: str | None) -> str | None:
    """Import the network that --arch names as package.module:factory, and nothing else."""
    if arch and ":" in arch:
        from rampart.hardening.model.registry import import_factory, is_factory

        if is_factory(arch):
            import_factory(arch)
    return arch


ARCH = "A torchvision name (resnet18, vgg11_bn, alexnet, googlenet ...), timm:NAME, or"
ARCH += " package.module:factory, a function of yours that builds the network; pass --head too"
Arch = Annotated[str, Option(help=ARCH, callback=take_factory), inputs.network]
OWN = "package.module:factory, if the network is your own: files hold only weights, no code"
Own = Annotated[str | None, Option("--arch", help=OWN, callback=take_factory)]
SIZE = "Pixels per side: a multiple of 8, at least 16"
Size = Annotated[int, Option(help=SIZE), inputs.size]
CHANNELS = "For your own network: 1 if it takes gray pictures"
LAST = "For your own network: it takes (N, H, W, channels)"
METHOD = (
    "Training method. In brackets: clean / AutoAttack accuracy, and cost relative to nfgsm, of "
)
METHOD += "a ResNet-18 on CIFAR-10 at 8/255 after 100 epochs (FastAT Benchmark, arXiv 2604.22853): "
METHOD += "nfgsm (78.6 / 47.8, 1); fgsm-cs (80.5 / 48.6, 0.94; 1.7 measured here; its first epochs "
METHOD += "are slow, so use it for long runs); gat (85.1 / 49.2, 1.5; 1.8 here); "
METHOD += "pgd (82.4 / 50.5, 3.6; 4.2 here). Not in the benchmark: trades and mart (5 here); "
METHOD += "rslad, which distils from --teacher. standard: no attacks"
Method = Annotated[inputs.Method, Option(help=METHOD)]
DTYPE = "Precision of training; by default, bf16 on GPUs and CPUs that support it, else fp32"
Dtype = Annotated[Literal["bf16", "fp32"] | None, Option(help=DTYPE)]
DEVICE = "Where to compute; auto uses CUDA if available"
Device = Annotated[Literal["cpu", "cuda", "auto"], Option(help=DEVICE)]
Seed = Annotated[int, Option(help="Random seed")]
Epochs = Annotated[int, Option(min=1, help="Passes over the training images")]
LearningRate = Annotated[float, Option("--lr", help="Peak learning rate of the one-cycle schedule")]


ANYWAY = "Pack it even if it fails its self-checks or is no better than chance"
Anyway = Annotated[bool, Option("--anyway", help=ANYWAY)]
WIDTH = "Factor on the channels of a ResNet or VGG; default 1, or what harden proposes"
SMOOTH = "Activation of a ResNet, VGG, alexnet or squeezenet1_1: relu, or the smooth silu (Xie et "
SMOOTH += "al. 2020)"


class Network(NamedTuple):
    """What a network is built with, besides its architecture and the size of its images."""

    width: Annotated[float | None, Option(help=WIDTH)] = None
    head: Annotated[str, Option(help="For your own network: its logits layer, such as fc")] = ""
    channels: Annotated[int, Option(min=1, max=3, help=CHANNELS)] = 3
    channels_last: Annotated[bool, Option("--channels-last", help=LAST)] = False
    activation: Annotated[inputs.Activation, Option(help=SMOOTH)] = "relu"

    def config(self, arch: str, image_size: int, classes: int = 0) -> "rp.ClassifierConfig":
        """The same in the library; 0 classes stand for as many as the images have."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return rp.ClassifierConfig(arch, classes, image_size=image_size, **given)


RUN = "Folder of this run; an unfinished run in it resumes"
BATCH = "Images per step, over all processes; default 128, or 16 for pictures with boxes"


class Training(NamedTuple):
    """A run of `train` or `purifier`."""

    out: Annotated[Path, Option(help=RUN), inputs.folder_to_write]
    batch_size: Annotated[int | None, Option(min=1, help=BATCH)] = None
    dtype: Dtype = None
    validate_on: Annotated[int, Option(min=1, help="Validation images per epoch")] = 1500
    seed: Seed = 0
    device: Device = "auto"

    def place(self) -> "training.Run":
        """Where and how it computes, for the library."""
        from rampart.training import Run

        return Run(self.out, self.device, self.dtype, self.validate_on, command=command_line())


EPS = "Radius of the threat: n/255 for Linf, plain for L2; default the model's own, else 8 or 0.5"
RATE = "Share of clean images that may be flagged; default 0.01, or more if there are fewer than"
RATE += " 100 calibration images"
Rate = Annotated[float | None, Option("--rate", min=0, max=0.99, help=RATE)]


class Threat(NamedTuple):
    """What an attacker may change."""

    norm: Annotated[Literal["Linf", "L2"], Option(help="Norm of the threat model")] = "Linf"
    eps: Annotated[float | None, Option(min=0, help=EPS)] = None

    def ball(self, model: "rp.Model | rp.SceneModel | None" = None) -> "rp.Threat":
        """The same in the library; the eps that is not given is that of the `model`."""
        if self.eps is None and model and model.threat.norm == self.norm:
            return model.threat
        if self.norm == "Linf":
            return rp.Threat(self.norm, (8 if self.eps is None else self.eps) / 255)
        return rp.Threat(self.norm, 0.5 if self.eps is None else self.eps)


FOLDER = "Folder of the model, such as model_store/NAME"
Model = Annotated[Path, Argument(help=FOLDER), inputs.folder]
GUARDED = "Also make the variant guarded (detector consistency); it costs a gradient and two more "
GUARDED += "passes per request"
Guarded = Annotated[bool, Option("--guarded", help=GUARDED)]
VARIANT = (
    "full (with the purifier), guarded (with consistency) or lean (the fastest); by default, the"
    " choice of `rampart ablate`, else full if the model has it, else lean"
)
Variant = Annotated[Literal["full", "guarded", "lean"] | None, Option(help=VARIANT)]
PRECISION = (
    "Precision of the graph; run `rampart quantize` for fp16 or int8. Default int8 if it was"
)
PRECISION += " measured to be as robust on at least 100 validation images at --rate 0.01, else fp32"
Precision = Annotated[Literal["fp32", "fp16", "int8"] | None, Option(help=PRECISION)]
QUERIES = "Detect query attacks: a local folder, or redis://HOST:PORT/NUMBER"
QueryStore = Annotated[str | None, Option(help=QUERIES)]


class Subject(NamedTuple):
    """The model that is measured."""

    model: Model
    arch: Own = None


PICTURE = "Picture; by default, the model's own sample, else scikit-image's cat"
SHIPPED = Path("model_store/traffic-signs")


class Look(NamedTuple):
    """A picture, and the model that it is shown to."""

    image: Annotated[Path | None, Argument(help=PICTURE), inputs.picture] = None
    model: Annotated[Path, Option(help="Folder of the model"), inputs.folder] = SHIPPED
    arch: Own = None


Cache = Annotated[Path, Option(help="Folder that caches adversarial images")]
FOUND = Path("runs/found")
TWIN = "Folder of the undefended twin (the control); default NAME-undefended beside the model"
Twin = Annotated[Path | None, Option(help=TWIN), inputs.twin]


INTO_CARD = "Write the figures into card.json instead of measured.json beside it"
IntoCard = Annotated[bool, Option("--into-card", help=INTO_CARD)]


SAMPLE = "Include one held-out picture in the archive, to try the endpoint"
WithSample = Annotated[bool, Option(help=SAMPLE)]


def say(*lines: object) -> None:
    """Print lines, above whatever progress bars there are."""
    text = "\n".join(map(str, lines))
    if bars := sys.modules.get("tqdm"):  # it is not there where one only packs and serves
        bars.tqdm.write(text)
    else:
        print(text, flush=True)


def theme(title: str) -> tuple[Callable[..., Callable[[Verb], Verb]], typer.Typer]:
    """(decorator that puts a verb, with its examples, under a title of the help; these verbs).

    The decorator's `together` is told the options that its parameters are called after, and raises
    ValueError for those that do not go together.
    """
    app = typer.Typer()

    def verb(*examples: str, together: Verb | None = None) -> Callable[[Verb], Verb]:
        lines = "\n\n".join(f"rampart {example}" for example in examples)
        register = app.command(rich_help_panel=title, epilog=f"Examples:\n\n{lines}")
        return lambda function: register(flat(function, together))

    return verb, app


def flat(function: Verb, together: Verb | None = None) -> Verb:
    """The verb with an option for each field of the named tuples that it takes.

    What options name is looked at before the verb begins: first whether they go `together`.
    """
    taken = signature(function).parameters
    kinds = {name: one.annotation for name, one in taken.items()}
    groups = {name: kind for name, kind in kinds.items() if hasattr(kind, "_fields")}
    members = {name: signature(group).parameters for name, group in groups.items()}
    each = chain.from_iterable(members.get(name, {name: taken[name]}).values() for name in taken)
    options = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in each]

    @wraps(function)
    def call(**values: Any) -> None:
        if together:
            together(**{name: values[name] for name in signature(together).parameters})
        look_at(options, values)
        for name, group in groups.items():
            values[name] = group(*map(values.pop, group._fields))
        function(**values)

    vars(call)["__signature__"] = Signature(options)
    return call


def look_at(options: Iterable[Parameter], values: Mapping[str, Any]) -> None:
    """Call the checks that stand beside an Option with what is passed there."""
    for option in options:
        value = values[option.name]
        for check in filter(callable, getattr(option.annotation, "__metadata__", ())):
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    check(one)
