"""What the endpoint would say of one image, in words and as a picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float

SIDE = 288  # pixels of a panel's picture


def describe(
    pipeline: DefendedClassifier,
    calibration: Calibration,
    image: Tensor,
    classes: tuple[str, ...],
    *,
    rate: float,
) -> str:
    """The verdict on one image uint8 (1, H, W, 3) in a few words."""
    with torch.no_grad():
        out = pipeline(image)
    confidence, index = out.logits.softmax(1)[0].max(0)
    p = float(p_values(out.scores.double().numpy(), calibration)[0])
    decision = "flag" if p < rate else "accept"
    return f"{classes[int(index)]} {sure(float(confidence))}, p = {p:.2g}: {decision}"


def lead(pipeline: DefendedClassifier, image: Tensor) -> str:
    """By how many logits the label of an image uint8 (1, H, W, 3) leads before and after the step
    that `consistency` takes against it.
    """
    x = to_float(image)
    label = pipeline(image).logits.argmax(1)
    before, after = (float(pipeline.margin_after_step(x, label, share)) for share in (0.0, 1.0))
    return f"lead {before:.1f}, after a step {after:.1f}"


def sure(confidence: float) -> str:
    """A confidence in words; none is whole."""
    return "over 99%" if confidence >= 0.995 else f"{confidence:.0%}"


def picture(panels: Sequence[tuple[str, Pixels, str]], path: Path, legend: str = "") -> Path:
    """Write (title, image uint8 (H, W, 3), caption) panels side by side as one PNG, a `legend`
    below them.
    """
    side, margin, line = SIDE, 16, 24
    lines = max(caption.count("\n") + 1 for _, _, caption in panels)
    width = len(panels) * (side + margin) + margin
    below = side + (1 + lines) * line + 2 * margin
    height = below + (legend.count("\n") + 1) * line + 8 if legend else below
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    small = fitting([legend], width - 2 * margin)
    draw.text((margin, below), legend, fill="#444444", font=small, spacing=8)
    font = fitting([text for title, _, caption in panels for text in (title, caption)], side)
    for number, (title, image, caption) in enumerate(panels):
        left = margin + number * (side + margin)
        large = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(large, (left, margin + line))
        draw.text((left, margin), title, fill="black", font=font)
        draw.text((left, margin + line + side + 6), caption, fill="black", font=font, spacing=8)
    sheet.save(path)
    return path


def fitting(texts: Sequence[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font up to 15 pixels in which no line of `texts` is wider than `width`."""
    lines = [line for text in texts for line in text.split("\n")]
    fonts = (ImageFont.load_default(size=size) for size in range(15, 8, -1))
    small = ImageFont.load_default(size=8)
    return next((f for f in fonts if max(map(f.getlength, lines)) <= width), small)
