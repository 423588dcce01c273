"""Verbs that show what happens to one picture."""

from pathlib import Path
from typing import Annotated

from typer import Option

import rampart as rp
from rampart.cli import options as o
from rampart.cli.options import say, threat_of

HIDE = "LEFT TOP WIDTH HEIGHT to project without, in pixels at model resolution"
PROJECT = "Also the generator's own image nearest to it"
Sheet = Annotated[Path, Option(help="The picture of before and after")]

verb, app = o.theme("Look")


@verb("attack", "attack cat.jpg --model model_store/mine --eps 4")
def attack(
    image: o.Picture = None,
    model: o.Shown = o.SHIPPED,
    out: Annotated[Path, Option(help="Folder for the pictures")] = Path("attacked"),
    variant: o.Variant = None,
    norm: o.Norm = "Linf",
    eps: o.Eps = None,
    rate: o.Rate = 0.01,
    arch: o.Own = None,
) -> None:
    """White-box attack on the shipped defence, written as 8-bit PNGs at model resolution."""
    from rampart import looks

    subject, threat = rp.Model.load(model), threat_of(norm, eps)
    lines = looks.attack(subject, image, out, threat=threat, variant=variant, rate=rate)
    say("\n".join(lines))


@verb("purify cat.jpg --hide 0 0 8 8")
def purify(
    image: o.Picture = None,
    model: o.Shown = o.SHIPPED,
    out: Sheet = Path("purified.png"),
    project: Annotated[bool, Option("--project", help=PROJECT)] = False,
    hide: Annotated[tuple[int, int, int, int] | None, Option(help=HIDE)] = None,
    rate: o.Rate = 0.01,
    arch: o.Own = None,
) -> None:
    """What the purifier makes of a picture, and how the verdict changes with it."""
    from rampart import looks

    subject = rp.Model.load(model)
    lines = looks.purify(subject, image, out, projected=project, hide=hide, rate=rate)
    say("\n".join(lines))


@verb("certify cat.jpg --sigma 0.25")
def certify(
    image: o.Picture = None,
    model: o.Shown = o.SHIPPED,
    sigma: Annotated[float, Option(help="Of the Gaussian noise, pixels in [0, 1]")] = 0.12,
    samples: Annotated[int, Option(help="Noisy copies that vote")] = 10_000,
    alpha: Annotated[float, Option(help="How often the certificate may be wrong")] = 0.001,
    device: o.Device = "auto",
    arch: o.Own = None,
) -> None:
    """A radius (L2) within which the smoothed classifier provably keeps its label, or abstains."""
    from rampart import looks

    noise = looks.Noise(sigma, samples, alpha)
    say(looks.certify(rp.Model.load(model), image, noise, device=device))
