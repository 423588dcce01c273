"""One picture of objects and what attacks make of it, with boxes drawn."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rampart.handlers.image import View
from rampart.handlers.scenes import SceneVerdict
from rampart.handlers.verdict import Calibration, Policy
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Outcome, Threat, apgd, random_start
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.calibrate import detection_margin
from rampart.hardening.model.files import SAMPLE
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.objects import attack as attacks
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.defended import DefendedDetector, SceneOutputs
from rampart.hardening.report import verdicts
from rampart.scenes import SceneModel

AIMS = ("vanish", "fabricate", "mislabel")
UNFLAGGED = "vanish-unflagged"
STEPS = 50
PALETTE = ("red", "blue", "darkorange", "purple", "teal", "magenta")  # by class
Boxes = Sequence[Mapping[str, Any]]  # of a verdict
# What a victim gives of one picture, and how far beyond the threshold (1,) that is.
Watch = Callable[[SceneOutputs, Tensor], None]


class Plan(NamedTuple):
    """What an attack may change, and against which decision."""

    threat: Threat
    also: Path | None = None  # another picture, shown as it is
    rate: float = 0.01
    steps: int = STEPS


class Victim(NamedTuple):
    """One variant of an object detector, with the ranks that its flags are cut from."""

    pipeline: DefendedDetector
    calibration: Calibration


def attack(
    model: SceneModel, image: Path | None, out: Path, plan: Plan, variant: Variant | None = None
) -> list[str]:
    """Attacks with each aim on one picture: 8-bit PNGs in `out`, at the model's size, and a panel
    with boxes. The last of them also wants not to be flagged, and knows all of Rampart.
    """
    chosen = model.chosen_variant(variant)
    victim = Victim(model.pipeline(chosen), model.calibration(chosen))
    policy = Policy(plan.rate)
    views = {"clean": View(model.view(shown(model, image)).pixels)}
    (clean,) = model.judged([views["clean"]], policy=policy, variant=chosen)
    make = partial(craft, victim, views["clean"], clean.boxes, plan)
    for name in AIMS[: 2 if len(model.classes) == 1 else 3]:
        views[name] = View(make(name))
    views[UNFLAGGED] = View(make(AIMS[0], unflagged=True))
    if plan.also:
        views["also"] = View(model.view(plan.also).pixels)
    found = model.judged(list(views.values()), policy=policy, variant=chosen)
    out.mkdir(parents=True, exist_ok=True)
    lines, panels = [], []
    for (name, view), verdict in zip(views.items(), found, strict=True):
        file = out / f"{name}.png"
        Image.fromarray(view.pixels).save(file)
        lines.append(f"{file}: {in_words(verdict)}")
        title = name if name in ("clean", "also") else f"{name}, {plan.threat}"
        panels.append((title, drawn(view.pixels, verdict), in_words(verdict)))
        if name == UNFLAGGED and victim.pipeline.detector.purifier is not None:
            purified = victim.pipeline.detector.purified(
                to_float(torch.from_numpy(view.pixels)[None])
            )
            pixels = to_uint8(purified)[0].numpy()
            panels.append(("the same, purified", drawn(pixels, verdict), "what the detector sees"))
    return [*lines, str(verdicts.picture(panels, out / "panel.png"))]


def shown(model: SceneModel, file: Path | None) -> Path:
    """A picture; without a file the model's own, else scikit-image's cat."""
    from skimage.data import data_dir

    own = model.folder and model.folder / SAMPLE
    return file or (own if own and own.is_file() else Path(data_dir) / "chelsea.png")


def craft(
    victim: Victim,
    view: View,
    boxes: Boxes,
    plan: Plan,
    name: str,
    *,
    unflagged: bool = False,
    watch: Watch = lambda outputs, margin: None,
) -> Pixels:
    """Pixels after Auto-PGD on an aim against `boxes`, those that a verdict shows.

    To be `unflagged` weighs as much as the aim, as a share of its size on the clean picture. Where
    the view has a frame, its border stays grey, since no client can send another one. `watch` is
    told what the victim gives at each step.
    """
    x, inside = to_float(torch.from_numpy(view.pixels)[None]), sent(view)
    truth = [truth_of(view, boxes)]
    goal = attacks.aims_of(victim.pipeline.detector)[name]

    def wanted(near: Tensor) -> Tensor:
        return goal(victim.pipeline.detector, near, truth)

    with torch.no_grad():
        size = 1 + wanted(x).abs()

    def objective(near: Tensor, rows: Tensor) -> Outcome:
        framed = torch.where(inside, near, x)
        outputs = victim.pipeline.defend(framed)
        margin = detection_margin(outputs.scores, victim.calibration, plan.rate)
        watch(outputs, margin)
        value = wanted(framed) / size - margin.clamp(0) * unflagged
        return Outcome(value, value, torch.zeros_like(value, dtype=torch.bool))

    start = random_start(x, plan.threat, Noise(torch.zeros(1, dtype=torch.int64)))
    near = apgd(objective, x, plan.threat, steps=plan.steps, start=start)[0]
    return to_uint8(torch.where(inside, near, x))[0].numpy()


def sent(view: View) -> Tensor:
    """Which pixels (1, 1, S, S) of a view are of the picture as sent, and not of its border."""
    inside = torch.zeros(1, 1, *view.pixels.shape[:2], dtype=torch.bool)
    left, top, width, height = within(view)
    inside[..., top : top + height, left : left + width] = True
    return inside


def within(view: View) -> tuple[int, int, int, int]:
    """Left, top, width and height of the picture in what the model sees of it, in pixels."""
    side = view.pixels.shape[0]
    if view.frame is None:
        return 0, 0, side, side
    (scale, left, top), width, height = view.frame
    return left, top, max(1, round(width * scale)), max(1, round(height * scale))


def truth_of(view: View, boxes: Boxes) -> Truth:
    """The boxes of a verdict as the truth of what the model sees."""
    corners = np.array([box["box"] for box in boxes], np.float32).reshape(-1, 4)
    if view.frame is not None:
        corners = view.frame.placement.inside(corners)
    labels = torch.tensor([box["index"] for box in boxes], dtype=torch.int64)
    return Truth(torch.from_numpy(corners), labels)


def in_words(verdict: SceneVerdict) -> str:
    """A verdict in a few words."""
    counts = Counter(box["label"] for box in verdict.boxes)
    objects = ", ".join(f"{count} {label}" for label, count in counts.most_common(3)) or "nothing"
    return f"{objects}; p = {verdict.p_value:.2g}: {verdict.decision}"


def drawn(pixels: Pixels, verdict: SceneVerdict) -> Pixels:
    """A panel's picture (288, 288, 3) with the boxes of a verdict on these pixels."""
    side = verdicts.SIDE
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=10)
    scale = side / pixels.shape[1]
    for box in reversed(verdict.boxes):  # the most confident on top
        corners = [corner * scale for corner in box["box"]]
        colour = PALETTE[box["index"] % len(PALETTE)]
        draw.rectangle(corners, outline=colour, width=2)
        text = f"{box['label']} {box['confidence']:.0%}"
        draw.text((corners[0] + 3, corners[1] + 1), text, fill=colour, font=font)
    return np.asarray(picture)
