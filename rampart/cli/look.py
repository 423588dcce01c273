"""Verbs that show what happens to one picture."""

from pathlib import Path
from typing import Annotated

import typer

from rampart.cli import options as o
from rampart.cli.options import say, threat_of

HIDE = "LEFT TOP WIDTH HEIGHT to project without, in pixels at model resolution"
PROJECT = "Also the generator's own image nearest to it"
Sheet = Annotated[Path, typer.Option(help="The picture of before and after")]
SIGMA = "Of the Gaussian noise, pixels in [0, 1]"
ALPHA = "How often the certificate may be wrong"


def add_to(app: typer.Typer) -> None:
    """Put these verbs into the command line."""
    verbs: o.Verbs = {
        attack: ("attack", "attack cat.jpg --model model_store/mine --eps 4"),
        purify: ("purify cat.jpg --hide 0 0 8 8",),
        certify: ("certify cat.jpg --sigma 0.25",),
    }
    o.add(app, o.LOOK, verbs)


def attack(
    image: o.Picture = None,
    model: o.Shown = o.SHIPPED,
    out: Annotated[Path, typer.Option(help="Folder for the pictures")] = Path("attacked"),
    variant: o.Variant = None,
    norm: o.Norm = "Linf",
    eps: o.Eps = None,
    rate: o.Rate = 0.01,
    arch: o.Own = None,
) -> None:
    """White-box attack on the shipped defence, written as 8-bit PNGs at model resolution."""
    from rampart import looks
    from rampart.model import Model

    subject, threat = Model.load(model), threat_of(norm, eps)
    lines = looks.attack(subject, image, out, threat=threat, variant=variant, rate=rate)
    say("\n".join(lines))


def purify(
    image: o.Picture = None,
    model: o.Shown = o.SHIPPED,
    out: Sheet = Path("purified.png"),
    project: Annotated[bool, typer.Option("--project", help=PROJECT)] = False,
    hide: Annotated[tuple[int, int, int, int] | None, typer.Option(help=HIDE)] = None,
    rate: o.Rate = 0.01,
    arch: o.Own = None,
) -> None:
    """What the purifier makes of a picture, and how the verdict changes with it."""
    from rampart import looks
    from rampart.model import Model

    subject = Model.load(model)
    lines = looks.purify(subject, image, out, projected=project, hide=hide, rate=rate)
    say("\n".join(lines))


def certify(
    image: o.Picture = None,
    model: o.Shown = o.SHIPPED,
    sigma: Annotated[float, typer.Option(help=SIGMA)] = 0.12,
    samples: Annotated[int, typer.Option(help="Noisy copies that vote")] = 10_000,
    alpha: Annotated[float, typer.Option(help=ALPHA)] = 0.001,
    device: o.Device = "auto",
    arch: o.Own = None,
) -> None:
    """A radius (L2) within which the smoothed classifier provably keeps its label, or abstains."""
    from rampart import looks
    from rampart.model import Model

    noise = looks.Noise(sigma, samples, alpha)
    say(looks.certify(Model.load(model), image, noise, device=device))
