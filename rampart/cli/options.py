"""Options that several verbs share, and how all of them print."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

import rampart as rp

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

# Images.
DATA = "Images of training: CIFAR-10 folder, one folder a class, or .npz"
Data = Annotated[Path, Option(help=DATA)]
Held = Annotated[Path | None, Option(help="Held-out images; without it a tenth of --data is drawn")]
MEASURED = "Images to measure on: CIFAR-10 folder (its test half), one folder a class, or .npz"
Measured = Annotated[Path, Option("--images", help=MEASURED)]
GATED = "Images that the parity gate compares on, 64 of them; default crops of a photograph"
Gated = Annotated[Path | None, Option("--images", help=GATED)]
TITLE = "What the card calls these images; default the name of their file or folder"
Title = Annotated[str, Option(help=TITLE)]
PART = "Only this split of the images that training held out of --images"
Part = Annotated[Literal["validation", "tuning", "calibration"] | None, Option(help=PART)]
BESIDE = "The --held of training, where --part is a split of it"
Beside = Annotated[Path | None, Option("--held", help=BESIDE)]

# Networks.


def take_factory(arch: str | None) -> str | None:
    """Import the network that --arch names as package.module:factory, and nothing else."""
    if arch and ":" in arch:
        from rampart.hardening.model.registry import import_factory, is_factory

        if is_factory(arch):
            import_factory(arch)
    return arch


ARCH = "torchvision's name (resnet18, vgg11_bn, alexnet, googlenet ...), timm:NAME, or"
ARCH += " package.module:factory, code of yours that gives a network; --head goes with it"
Arch = Annotated[str, Option(help=ARCH, callback=take_factory)]
OWN = "package.module:factory of the network, where it is your own: files hold weights and no code"
Own = Annotated[str | None, Option("--arch", help=OWN, callback=take_factory)]
HEAD = "Of a network of your own: the layer that makes the logits, as fc"
Head = Annotated[str, Option(help=HEAD)]
CHANNELS = "Of a network of your own: 1 where it takes pictures in gray"
Channels = Annotated[int, Option(min=1, max=3, help=CHANNELS)]
LAST = "Of a network of your own: it takes (N, H, W, channels)"
ChannelsLast = Annotated[bool, Option("--channels-last", help=LAST)]
Width = Annotated[float, Option(help="Factor on the channels of a ResNet or VGG")]
Size = Annotated[int, Option(help="Pixels a side, a multiple of 8 from 16 up")]
METHOD = "nfgsm, gat, pgd, trades, mart, rslad; standard makes an undefended control"
Method = Annotated[str, Option(help=METHOD)]
DTYPE = "Arithmetic of training; default bf16 on GPUs and CPUs that compute in it, else fp32"
Dtype = Annotated[Literal["bf16", "fp32"] | None, Option(help=DTYPE)]
DEVICE = "Where to compute; auto takes CUDA where there is one"
Device = Annotated[Literal["cpu", "cuda", "auto"], Option(help=DEVICE)]
Out = Annotated[Path, Option(help="Folder of this run; an unfinished run there continues")]
Count = Annotated[int, Option(min=1)]
Epochs = Annotated[int, Option(min=1, help="Passes over the training images")]
Batch = Annotated[int, Option(min=1, help="Images a step, over all processes")]
Validated = Annotated[int, Option("--validate-on", min=1, help="Validation images used each epoch")]
Seed = Annotated[int, Option(help="Of all that is drawn at random")]

# Threat and policy.
Norm = Annotated[Literal["Linf", "L2"], Option(help="Norm of the threat model")]
EPS = "Radius of the threat: n/255 for Linf (default 8), plain for L2 (default 0.5)"
Eps = Annotated[float | None, Option(min=0, help=EPS)]
Rate = Annotated[float, Option(min=0, max=0.99, help="Share of clean images that may be flagged")]

# Models.
Model = Annotated[Path, Argument(help="Folder of the model, as model_store/NAME")]
Shown = Annotated[Path, Option("--model", help="Folder of the model")]
VARIANT = "full, or lean for tight latency; default what `rampart ablate` chose, else full"
Variant = Annotated[Literal["full", "lean"] | None, Option(help=VARIANT)]
PRECISION = "Form of the graph, fp16 and int8 after `rampart quantize`; default int8 where it was"
PRECISION += " measured to be as robust, on 100 validation images or more, at --rate 0.01"
Precision = Annotated[Literal["fp32", "fp16", "int8"] | None, Option(help=PRECISION)]
QUERIES = "Watch for query attacks: a local folder, or redis://HOST:PORT/NUMBER"
QueryStore = Annotated[str | None, Option(help=QUERIES)]

# Measuring.
LIMIT = "Only so many images, evenly spaced"
Cache = Annotated[Path, Option(help="Folder for what attacks found")]
TWIN = "Folder of the undefended twin, a control; default NAME-undefended beside the model"
Twin = Annotated[Path | None, Option(help=TWIN)]
Picture = Annotated[Path | None, Argument(help="Picture; default scikit-image's cat")]

FOUND = Path("runs/found")
SHIPPED = Path("model_store/cifar10")


def say(what: object) -> None:
    """Print a line, above whatever progress bars there are."""
    if bars := sys.modules.get("tqdm"):  # it is not there where one only packs and serves
        bars.tqdm.write(str(what))
    else:
        print(what, flush=True)


def threat_of(norm: str, eps: float | None) -> "rp.Threat":
    """The threat model of the options --norm and --eps."""
    if norm == "Linf":
        return rp.Threat(norm, (8 if eps is None else eps) / 255)
    return rp.Threat(norm, 0.5 if eps is None else eps)


def theme(title: str) -> tuple[Callable[..., Decorator], typer.Typer]:
    """(decorator that puts a verb, with its examples, under a title of the help; these verbs)."""
    app = typer.Typer()

    def verb(*examples: str) -> Decorator:
        lines = "\n\n".join(f"rampart {example}" for example in examples)
        return app.command(rich_help_panel=title, epilog=f"Examples:\n\n{lines}")

    return verb, app
