"""Verbs that show what happens to one picture."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say

ALSO = "Another picture, shown as it is; as one of nothing that the model knows"
HIDE = "LEFT TOP WIDTH HEIGHT to project without, in pixels at model resolution"
BEFORE = "The picture of before and after"
ATTACKED, PURIFIED = Path("attacked"), Path("purified.png")
SHOWN = "The class that the picture shows, to tell whether the certified one is right"
OFFERED = "Picture to begin with; others are on offer"
PROJECT = "Also the generator's own image nearest to it"

verb, app = o.theme("Look")


@verb("attack", "attack stop.png --model model_store/mine --eps 4", together=inputs.form)
def attack(
    look: o.Look,
    threat: o.Threat,
    out: Annotated[Path, Option(help="Folder for the pictures"), inputs.folder_to_write] = ATTACKED,
    twin: o.Twin = None,
    also: Annotated[Path | None, Option(help=ALSO), inputs.picture] = None,
    variant: o.Variant = None,
    rate: o.Rate = None,
) -> None:
    """White-box attack on the shipped defence, written as 8-bit PNGs at model resolution.

    Where an undefended twin is at hand, a second attack is on that, and both answer each picture.
    On an object detector there is one with each aim, and one that wants not to be flagged.
    """
    from rampart import looks, scene_looks
    from rampart.model import twin_of
    from rampart.models import load

    model = load(look.model)
    if isinstance(model, rp.SceneModel):
        if twin:
            raise ValueError(f"--twin {twin}: it is of classifiers, leave it out")
        plan = scene_looks.Plan(threat.ball(model), also, model.chosen_rate(rate))
        say(*scene_looks.attack(model, look.image, out, plan, variant))
        return
    aim = looks.Aim(threat.ball(model), twin_of(model, twin), also, model.chosen_rate(rate))
    say(*looks.attack(model, look.image, out, aim, variant))


@verb("purify cat.jpg --hide 0 0 8 8", together=inputs.purifying)
def purify(
    look: o.Look,
    out: Annotated[Path, Option(help=BEFORE), inputs.file_to_write] = PURIFIED,
    project: Annotated[bool, Option("--project", help=PROJECT)] = False,
    hide: Annotated[tuple[int, int, int, int] | None, Option(help=HIDE)] = None,
    rate: o.Rate = None,
) -> None:
    """What the purifier makes of a picture, and how the verdict changes with it."""
    from rampart import looks

    model = rp.Model.load(look.model)
    rate = model.chosen_rate(rate)
    say(*looks.purify(model, look.image, out, projected=project, hide=hide, rate=rate))


@verb("certify cat.jpg --sigma 0.25", together=inputs.certifying)
def certify(
    look: o.Look,
    sigma: Annotated[float, Option(help="Of the Gaussian noise, pixels in [0, 1]")] = 0.12,
    samples: Annotated[int, Option(help="Noisy copies that vote")] = 10_000,
    alpha: Annotated[float, Option(help="How often the certificate may be wrong")] = 0.001,
    label: Annotated[str | None, Option(help=SHOWN)] = None,
    device: o.Device = "auto",
) -> None:
    """A radius (L2) within which the smoothed classifier provably keeps its label, or abstains."""
    from rampart import looks

    noise = looks.Noise(sigma, samples, alpha)
    model = rp.Model.load(look.model)
    say(*looks.certify(model, look.image, noise, label=label, device=device))


@verb("play", "play cat.jpg --model model_store/mine")
def play(
    model: Annotated[Path, Option(help="Folder of the model"), inputs.folder] = o.SHIPPED,
    image: Annotated[Path | None, Argument(help=OFFERED), inputs.picture] = None,
    twin: o.Twin = None,
    arch: o.Own = None,
    rate: o.Rate = None,
    port: Annotated[int, Option(min=0, max=65535, help="On loopback; 0 takes a free one")] = 8090,
    browser: Annotated[bool, Option(help="Open the page in a browser")] = True,
) -> None:
    """A page on this machine: drop, draw or pick a picture, see its verdict, attack it.

    Ctrl-C ends it.
    """
    from rampart.play.server import play

    play(model, image, twin=twin, rate=rate, port=port, browser=browser)


@verb("samples signs/", "samples signs/ --count 10")
def samples(
    folder: Annotated[Path, Argument(help="Where to put them")],
    count: Annotated[int, Option(min=1, help="Of each sign")] = 1,
    seed: Annotated[
        int, Option(min=0, help="Of the first one; each number is another picture")
    ] = 0,
) -> None:
    """Draw traffic signs to send to a model: PNGs that need no download and belong to nobody."""
    from rampart.samples import write

    files = write(folder, count=count, seed=seed)
    say(f"{folder}: {len(files)} pictures, as {files[0].name}")
