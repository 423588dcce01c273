"""Why a verdict: which detector spoke, and where in the picture, by hiding one patch after another.

Serving has no gradients, so "where" is occlusion: Zeiler and Fergus (2014), "Visualizing and
Understanding Convolutional Networks", section 4.2.
"""

import base64
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.engine import Outputs
from rampart.handlers.errors import ImageError
from rampart.handlers.image import as_png
from rampart.handlers.types import Pixels
from rampart.handlers.verdict import Calibration, Floats, Judge, combine, rounded, surprises

GRID = 8  # patches a side
IMAGES = GRID * GRID + 1  # that an explanation costs beside the verdict's own
GREY = 127  # of a patch that is hidden
STRENGTH = 0.7  # of the strongest patch's colour in a picture
FOR, AGAINST = (255, 0, 0), (0, 0, 255)  # red raises the value, blue lowers it

CHOICES = {"": True, "true": True, "1": True, "false": False, "0": False}
NOT_EXPLAINED = ImageError(
    403,
    "not_explained",
    "this endpoint does not explain its verdicts: leave out explain, or ask its operator for"
    " `serve --explain`",
)
ONE_PICTURE = ImageError(
    422,
    "explain_one",
    "an explanation covers one picture, as raw bytes or in KServe v1's JSON: send one picture per"
    " request, or leave out explain",
)
NO_CHOICE = ImageError(422, "explain_value", "explain must be true or false: send ?explain=true")


def wanted(text: str) -> bool:
    """What the parameter `explain` says. Raises ImageError."""
    if text.lower() not in CHOICES:
        raise NO_CHOICE.bare()
    return CHOICES[text.lower()]


def patches(size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each patch, row by row; a picture of fewer than GRID pixels has fewer."""
    edges = np.linspace(0, size, min(GRID, size) + 1).round().astype(int).tolist()
    spans = [slice(*pair) for pair in pairwise(edges)]
    return ((rows, columns) for rows in spans for columns in spans)


def occlusions(pixels: Pixels) -> NDArray[np.uint8]:
    """The picture (S, S, 3), then once for each patch with that hidden: (1 + patches, S, S, 3)."""
    places = list(patches(len(pixels)))
    images = np.repeat(pixels[None], 1 + len(places), axis=0)
    for image, place in zip(images[1:], places, strict=True):
        image[place] = GREY
    return images


def explanation(pixels: Pixels, outputs: Outputs, judge: Judge) -> dict[str, Any]:
    """The contents for JSON, from the outputs for `occlusions(pixels)`.

    Effects are what a value loses where a patch is hidden: of the likeliest label's logit, and of
    the suspicion, the sum of -log p over the detectors. A picture of each is a PNG in base64.
    """
    logits = outputs.logits if np.isfinite(outputs.logits).all() else outputs.raw_logits
    index = int(logits[0].argmax())
    suspicion = combine(outputs.scores, judge.calibration)  # (1 + patches,)
    return {
        "detectors": detectors(outputs.scores[:1], judge.calibration),
        "label": {"label": judge.labels[index], "index": index} | _map(pixels, logits[:, index]),
        "suspicion": _map(pixels, suspicion),
    }


def detectors(scores: NDArray[np.float32], calibration: Calibration) -> list[dict[str, Any]]:
    """Score and p-value of each detector alone, the most suspicious first: scores (1, D).

    The p-value is the share of clean images to which it gives as much; as few images as there are
    tell none below one in their number.
    """
    least = 1 / (calibration.images + 1)
    (surprise,) = surprises(scores, calibration)  # (D,)
    rows = zip(calibration.detectors, scores[0].tolist(), surprise.tolist(), strict=True)
    found = [
        {"name": name, "score": rounded(score), "p_value": rounded(max(math.exp(-high), least))}
        for name, score, high in rows
    ]
    return sorted(found, key=lambda row: row["p_value"])


def _map(pixels: Pixels, values: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """What the value of the whole picture, the first, loses by each patch; and a picture of it."""
    with np.errstate(invalid="ignore"):  # of a defence that fails
        lost = values[0] - values[1:].astype(np.float64)  # (patches,)
    side = math.isqrt(len(lost))
    rows = [[rounded(value) for value in row] for row in lost.reshape(side, side).tolist()]
    overlay = base64.b64encode(as_png(_overlay(pixels, np.nan_to_num(lost)))).decode()
    return {"effect": rows, "picture": overlay}


def _overlay(pixels: Pixels, lost: Floats) -> Pixels:
    """The picture, each patch coloured as strongly as it matters."""
    out = pixels.astype(np.float64)
    shares = STRENGTH * lost / max(float(np.abs(lost).max()), 1e-9)
    for share, place in zip(shares.tolist(), patches(len(pixels)), strict=True):
        colour = np.array(FOR if share > 0 else AGAINST)
        out[place] += abs(share) * (colour - out[place])
    return out.round().astype(np.uint8)
