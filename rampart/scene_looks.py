"""One picture of objects and what attacks make of it, with boxes drawn."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rampart.handlers.image import View
from rampart.handlers.scenes import SceneVerdict
from rampart.handlers.verdict import Calibration, Policy
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Outcome, Threat, apgd, random_start
from rampart.hardening.model.calibrate import detection_margin
from rampart.hardening.model.files import SAMPLE
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.objects import attack as attacks
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.defended import DefendedDetector
from rampart.hardening.report import verdicts
from rampart.scenes import SceneModel

AIMS = ("vanish", "fabricate", "mislabel")
UNFLAGGED = "vanish-unflagged"
STEPS = 50
PALETTE = ("red", "blue", "darkorange", "purple", "teal", "magenta")  # by class
Pixels = NDArray[np.uint8]  # (H, W, 3)


class Plan(NamedTuple):
    """What an attack may change, and against which decision."""

    threat: Threat
    also: Path | None = None  # another picture, shown as it is
    rate: float = 0.01


def attack(
    model: SceneModel, image: Path | None, out: Path, plan: Plan, variant: Variant | None = None
) -> list[str]:
    """Attacks with each aim on one picture: 8-bit PNGs in `out`, at the model's size, and a panel
    with boxes. The last of them also wants not to be flagged, and knows all of Rampart.
    """
    chosen = model.chosen_variant(variant)
    pipeline, table = model.pipeline(chosen), model.calibration(chosen)
    policy = Policy(plan.rate)
    views = {"clean": View(model.view(shown(model, image)).pixels)}
    (clean,) = model.judged([views["clean"]], policy=policy, variant=chosen)
    make = partial(craft, pipeline, table, views["clean"].pixels, clean, plan)
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
    return [*lines, str(verdicts.picture(panels, out / "panel.png"))]


def shown(model: SceneModel, file: Path | None) -> Path:
    """A picture; without a file the model's own, else scikit-image's cat."""
    from skimage.data import data_dir

    own = model.folder and model.folder / SAMPLE
    return file or (own if own and own.is_file() else Path(data_dir) / "chelsea.png")


def craft(
    pipeline: DefendedDetector,
    calibration: Calibration,
    pixels: Pixels,
    clean: SceneVerdict,
    plan: Plan,
    name: str,
    *,
    unflagged: bool = False,
) -> Pixels:
    """Pixels after Auto-PGD on an aim against what the `clean` verdict shows.

    To be `unflagged` weighs as much as the aim, as a share of its size on the clean picture.
    """
    x = to_float(torch.from_numpy(pixels)[None])
    boxes = [box["box"] for box in clean.boxes]
    labels = torch.tensor([box["index"] for box in clean.boxes], dtype=torch.int64)
    truth = [Truth(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels)]
    goal = attacks.aims_of(pipeline.detector)[name]

    def wanted(near: Tensor) -> Tensor:
        return goal(pipeline.detector, near, truth)

    with torch.no_grad():
        size = 1 + wanted(x).abs()

    def objective(near: Tensor, rows: Tensor) -> Outcome:
        margin = detection_margin(pipeline.defend(near).scores, calibration, plan.rate)
        value = wanted(near) / size - margin.clamp(0) * unflagged
        return Outcome(value, value, torch.zeros_like(value, dtype=torch.bool))

    start = random_start(x, plan.threat, Noise(torch.zeros(1, dtype=torch.int64)))
    near = apgd(objective, x, plan.threat, steps=STEPS, start=start)[0]
    return to_uint8(near)[0].numpy()


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
