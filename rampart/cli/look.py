"""Verbs that show what happens to one picture."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say

AS_SAMPLES = "Keep the pictures as the model's samples, for which `serve` prints curl commands"
ALSO = "Another picture to show without an attack, such as one with none of the model's classes"
HIDE = "LEFT TOP WIDTH HEIGHT of a region to fill in, in pixels at model resolution"
BEFORE = "Picture to write, before and after"
ATTACKED, PURIFIED = Path("attacked"), Path("purified.png")
SHOWN = "The true class, to check the certified label"
OFFERED = "Picture to start with; the page offers others"
PROJECT = "Also show the closest image that the generator can make"

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
    as_samples: Annotated[bool, Option("--as-samples", help=AS_SAMPLES)] = False,
) -> None:
    """Attack one picture with full knowledge of the model; write 8-bit PNGs at model resolution.

    If there is an undefended twin, attack it too, and show the answers of both. Attack an object
    detector once with each aim, and once more without being flagged.
    """
    from rampart import looks, scene_looks
    from rampart.model import twin_of
    from rampart.models import load

    model = load(look.model)
    if isinstance(model, rp.SceneModel):
        if twin or as_samples:
            raise ValueError("--twin and --as-samples are for classifiers: leave them out")
        plan = scene_looks.Plan(threat.ball(model), also, model.chosen_rate(rate))
        say(*scene_looks.attack(model, look.image, out, plan, variant))
        return
    chosen = model.chosen_rate(rate)
    aim = looks.Aim(threat.ball(model), twin_of(model, twin), also, chosen, as_samples)
    say(*looks.attack(model, look.image, out, aim, variant))


@verb("purify cat.jpg --model model_store/cifar10 --hide 0 0 8 8", together=inputs.purifying)
def purify(
    look: o.Look,
    out: Annotated[Path, Option(help=BEFORE), inputs.file_to_write] = PURIFIED,
    project: Annotated[bool, Option("--project", help=PROJECT)] = False,
    hide: Annotated[tuple[int, int, int, int] | None, Option(help=HIDE)] = None,
    rate: o.Rate = None,
) -> None:
    """Show the purifier's output for a picture, and how it changes the verdict."""
    from rampart import looks

    model = rp.Model.load(look.model)
    rate = model.chosen_rate(rate)
    say(*looks.purify(model, look.image, out, projected=project, hide=hide, rate=rate))


@verb("certify cat.jpg --sigma 0.25", together=inputs.certifying)
def certify(
    look: o.Look,
    sigma: Annotated[float, Option(help="Std of the Gaussian noise, pixels in [0, 1]")] = 0.12,
    samples: Annotated[int, Option(help="Noisy copies that vote")] = 10_000,
    alpha: Annotated[float, Option(help="How often a certificate may be wrong")] = 0.001,
    label: Annotated[str | None, Option(help=SHOWN)] = None,
    device: o.Device = "auto",
) -> None:
    """Certify an L2 radius within which the smoothed classifier keeps its label, or abstain."""
    from rampart import looks

    smoothing = looks.Smoothing(sigma, samples, alpha)
    model = rp.Model.load(look.model)
    say(*looks.certify(model, look.image, smoothing, label=label, device=device))


@verb("play", "play cat.jpg --model model_store/mine")
def play(
    model: Annotated[Path, Option(help="Folder of the model"), inputs.folder] = o.SHIPPED,
    image: Annotated[Path | None, Argument(help=OFFERED), inputs.picture] = None,
    twin: o.Twin = None,
    arch: o.Own = None,
    rate: o.Rate = None,
    port: Annotated[int, Option(min=0, max=65535, help="Loopback port; 0: any free one")] = 8090,
    browser: Annotated[bool, Option(help="Open the page in a browser")] = True,
) -> None:
    """Open a page on this machine: drop, draw or pick a picture, see its verdict, attack it.

    Ctrl-C stops it.
    """
    from rampart.play.server import play

    play(model, image, twin=twin, rate=rate, port=port, browser=browser)


@verb("samples signs/", "samples signs/ --count 10")
def samples(
    folder: Annotated[Path, Argument(help="Where to put them")],
    count: Annotated[int, Option(min=1, help="Pictures per sign")] = 1,
    seed: Annotated[
        int, Option(min=0, help="Seed of the first picture; each seed gives a different one")
    ] = 0,
) -> None:
    """Draw traffic signs, and copy photographs without signs, to try a model without a download."""
    from rampart.samples import write

    files = write(folder, count=count, seed=seed)
    say(f"{folder}: {len(files)} pictures, such as {files[0].name}")
