"""One picture and what the defence makes of it: attacked, purified, certified."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rampart.hardening.attack.ladder import QUICK, fool
from rampart.hardening.attack.objectives import View, look_at
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge import certify as certificates
from rampart.hardening.judge.certify import Certificate
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.files import CAPTION, SAMPLE, SAMPLES
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.model.project import project
from rampart.hardening.report import verdicts
from rampart.hardening.train.decoding import read_picture
from rampart.model import Model
from rampart.training import pick_device

# What the pictures of an attack are, by the names of their files.
TITLES = {
    "clean": "clean",
    "attacked-twin": "attacked, to fool the undefended network",
    "attacked": "attacked, with full knowledge of Rampart",
}
TABBY = "cat"  # what scikit-image's picture shows, where a model knows it
Panel = tuple[str, NDArray[np.uint8], str]  # title, image (H, W, 3), caption
Box = tuple[int, int, int, int]  # left, top, width, height in pixels


class Smoothing(NamedTuple):
    """How a prediction is certified."""

    sigma: float = 0.12  # of the Gaussian, pixels in [0, 1]
    samples: int = 10_000  # noisy copies that vote
    alpha: float = 0.001  # how often the certificate may be wrong


def shown(model: Model, file: Path | None) -> Tensor:
    """A picture as uint8 (1, size, size, 3); without a file the model's own, else the cat."""
    own = model.folder and model.folder / SAMPLE
    return picture(file or (own if own and own.is_file() else None), model.image_size)


def picture(file: Path | None, size: int) -> Tensor:
    """A picture as uint8 (1, size, size, 3); without a file scikit-image's cat."""
    from skimage.data import data_dir

    return torch.from_numpy(read_picture(file or Path(data_dir) / "chelsea.png", size))[None]


class Aim(NamedTuple):
    """What an attack on one picture may do, what is shown beside, and what is kept."""

    threat: Threat
    twin: Classifier | None = None  # an undefended network, attacked as well
    also: Path | None = None  # another picture, shown as it is
    rate: float = 0.01
    as_samples: bool = False  # whether the pictures become the model's samples


def attack(
    model: Model, image: Path | None, out: Path, aim: Aim, variant: Variant | None = None
) -> list[str]:
    """White-box attack on one picture: 8-bit PNGs in the folder `out`, at the model's size."""
    chosen = model.chosen_variant(variant)
    pipeline, pixels = model.pipeline(chosen), shown(model, image)
    views = {"clean": pixels}
    if twin := aim.twin:
        views["attacked-twin"] = fool(lambda x: View(twin(x)), pixels, aim.threat, QUICK)
    look = look_at(pipeline, model.calibration(chosen), aim.rate)
    views["attacked"] = attacked = fool(look, pixels, aim.threat, QUICK)
    if aim.also:
        views["also"] = picture(aim.also, model.image_size)
    panels = verdict_panels(model, chosen, views, rate=aim.rate)
    if aim.twin:
        panels = [beside(panel, aim.twin, model.classes) for panel in panels]
    out.mkdir(parents=True, exist_ok=True)
    for name, view, _ in panels:
        Image.fromarray(view).save(out / f"{name}.png")
    lines = [f"{out / name}.png: {caption.replace(chr(10), '; ')}" for name, _, caption in panels]
    if aim.as_samples:
        lines += keep_samples(model, image, views, aim)
    if pipeline.purifier is not None:
        panels.append(("purified", pipeline(attacked).purified[0].numpy(), "the classifier's view"))
    titles = TITLES | ({"also": f"{aim.also.stem}, not attacked"} if aim.also else {})
    panels = [(titles.get(name, name), view, text) for name, view, text in panels]
    return [*lines, str(verdicts.picture(panels, out / "panel.png", legend(aim, chosen)))]


def keep_samples(
    model: Model, image: Path | None, views: Mapping[str, Tensor], aim: Aim
) -> list[str]:
    """Write the pictures into the model's folder, from where archives take them, with captions.

    Attacked is what fools the twin, where there is one. A sample that was there keeps its size.
    Returns a line for each.
    """
    assert model.folder is not None
    name = image.name if image else "the model's sample"
    pictures = {view: Image.fromarray(pixels[0].numpy()) for view, pixels in views.items()}
    if not image and (model.folder / SAMPLE).is_file():
        with Image.open(model.folder / SAMPLE) as own:
            pictures["clean"] = own.convert("RGB")
    seen = "attacked-twin" if aim.twin else "attacked"
    attacked = f"{name}, attacked within {aim.threat}"
    if aim.twin:
        label, confidence = _answer(aim.twin, views[seen][0].numpy(), model.classes)
        attacked += f" (an undefended network answers '{label}', {confidence:.0%})"
    captions = {"clean": name, seen: attacked}
    if aim.also:
        captions["also"] = f"{aim.also.name}, not attacked"
    lines = []
    for (view, caption), file in zip(captions.items(), SAMPLES, strict=False):
        described = PngInfo()
        described.add_text(CAPTION, caption)
        pictures[view].save(model.folder / file, optimize=True, pnginfo=described)
        lines.append(f"{model.folder / file}: {caption}")
    return lines


def legend(aim: Aim, variant: Variant = "lean") -> str:
    """What has to be known to read the panels."""
    change = f"changes no colour by more than {255 * aim.threat.eps:g} of 255"
    if aim.threat.norm != "Linf":
        change = f"stays within {aim.threat}"
    first = f"An attack {change}. Percent: how sure a network is."
    if aim.twin:
        first += " Undefended: the same network, trained without attacks."
    p_value = "p: the share of clean images that look at least as unusual."
    words = f"{first}\n{p_value} Below {aim.rate:g} Rampart flags a picture, else it accepts it."
    if variant == "guarded":
        words += "\nLead: by how many logits the label is ahead. The step against it is small."
    return words


def verdict_panels(
    model: Model, variant: Variant, views: Mapping[str, Tensor], *, rate: float
) -> list[Panel]:
    """Pictures uint8 (1, H, W, 3), each with its verdict."""
    pipeline, calibration = model.pipeline(variant), model.calibration(variant)
    panels = []
    for name, view in views.items():
        words = verdicts.describe(pipeline, calibration, view, model.classes, rate=rate)
        if variant == "guarded":
            words += f"\n{verdicts.lead(pipeline, view)}"
        panels.append((name, view[0].numpy(), words))
    return panels


def beside(panel: Panel, twin: Classifier, classes: Sequence[str]) -> Panel:
    """A panel whose caption also has what the undefended network says."""
    title, view, caption = panel
    label, confidence = _answer(twin, view, classes)
    return title, view, f"Rampart: {caption}\nundefended: {label} {verdicts.sure(confidence)}"


def _answer(net: Classifier, view: NDArray[np.uint8], classes: Sequence[str]) -> tuple[str, float]:
    with torch.no_grad():
        logits = net(to_float(torch.from_numpy(view)[None]))
    confidence, index = logits.softmax(1)[0].max(0)
    return classes[int(index)], float(confidence)


def purify(
    model: Model, image: Path | None, out: Path, *, projected: bool, hide: Box | None, rate: float
) -> list[str]:
    """What the purifier makes of a picture, drawn into `out`, and how the verdict changes."""
    pipeline = model.pipeline("full")
    assert pipeline.purifier is not None
    pixels = shown(model, image)
    views = {"as sent": pixels, "purified": pipeline(pixels).purified}
    if projected or hide:
        visible = window(hide, pixels.shape[1])
        nearest = project(pipeline.purifier, to_float(pixels), visible=visible)
        views["projected"] = to_uint8(nearest)
    panels = verdict_panels(model, "full", views, rate=rate)
    lines = [f"{name}: {caption}" for name, _, caption in panels]
    return [*lines, str(verdicts.picture(panels, out))]


def window(hide: Box | None, size: int) -> Tensor:
    """1 where a picture of `size` is to be seen and 0 where it is hidden, (size, size)."""
    visible = torch.ones(size, size)
    if hide:
        left, top, width, height = hide
        if min(left, top) < 0 or min(width, height) < 1 or max(left, top) >= size:
            raise ValueError(f"--hide {hide}: pass a region inside the {size}x{size} picture")
        visible[top : top + height, left : left + width] = 0
    return visible


def certify(
    model: Model,
    image: Path | None,
    smoothing: Smoothing | None = None,
    *,
    label: str | None = None,
    device: str = "auto",
) -> list[str]:
    """A radius (L2) within which the smoothed classifier provably keeps its label, in words.

    `label` is what the picture shows, by which the certified one is judged. Raises ValueError where
    the model has no such class.
    """
    if label is not None and label not in model.classes:
        raise ValueError(f"--label {label}: the model's classes are {', '.join(model.classes)}")
    net = model.pipeline("lean").classifier.to(pick_device(device))
    sigma, samples, alpha = smoothing or Smoothing()
    x = to_float(shown(model, image)).to(net.mean.device)
    found = certificates.certify(net, x, sigma=sigma, samples=samples, alpha=alpha)
    if image is None and TABBY in model.classes:
        label = label or TABBY
    with torch.no_grad():
        plain = model.classes[int(net(x).argmax())]
    return [certificates.in_words(found, model.classes), judged(found, model.classes, plain, label)]


def judged(proof: Certificate, classes: Sequence[str], plain: str, label: str | None) -> str:
    """Whether a certified label is right, as far as that is known; `plain` is that without noise.

    A label that provably stays may be wrong.
    """
    if proof.label is None:
        return f"without noise the classifier says {plain}"
    certified = classes[proof.label]
    beside = "" if certified == plain else f", where the classifier without noise says {plain}"
    if label is None:
        return f"pass --label to check whether {certified} is right{beside}"
    right = "right" if certified == label else f"wrong: the picture shows {label}"
    return f"{certified} is {right}{beside}"
