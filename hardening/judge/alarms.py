"""False alarms on what clients really send, and how far a calibration of this size scatters. The
promise covers images exchangeable with the calibration images; here these come enlarged, compressed
or photographed, through the endpoint's own decoder, and so do other photographs.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import betabinom, binomtest
from skimage.data import data_dir
from torch import Tensor
from tqdm import tqdm

from rampart.handlers.image import decode, fit
from rampart.handlers.verdict import Calibration, drift, p_values
from rampart.hardening.judge.metrics import rounded, wilson
from rampart.hardening.model.arrays import Floats
from rampart.hardening.model.calibrate import outputs_of, scores_of
from rampart.hardening.model.card import Row, cell_text
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import as_file
from rampart.hardening.model.promise import flagged_ranks

Send = Callable[[Image.Image], bytes]

# Colour photographs that scikit-image carries, and how many crops of each are sent.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
CROPS = 40
ALPHAS = (0.01, 0.05, 0.1)
SPLITS = 1000
WORTH_NAMING = 2  # times the promised rate
TAKEN_FOR = "taken for"


def enlarged(picture: Image.Image) -> bytes:
    """As a large JPEG, which the endpoint scales down."""
    factor = min(7.0, 2000 / max(picture.size))
    return as_file(ImageOps.scale(picture, factor), "JPEG", quality=95)


def cropped(picture: Image.Image) -> bytes:
    """Without a tenth at the left and at the top; the endpoint scales it up again."""
    return as_file(ImageOps.crop(picture, (picture.width // 10, picture.height // 10, 0, 0)))


def noisy(picture: Image.Image) -> bytes:
    """Sensor noise of three levels, the same for the same picture, then a phone's JPEG."""
    pixels = np.asarray(picture)
    draws = np.random.default_rng(int(pixels.sum()))
    grain = (pixels + draws.normal(0, 3, pixels.shape)).round().clip(0, 255)
    return as_file(Image.fromarray(grain.astype(np.uint8)), "JPEG", quality=90)


AS_RANKED = "PNG, as ranked"
WAYS: dict[str, Send] = {
    AS_RANKED: as_file,
    "enlarged, JPEG": enlarged,
    "JPEG, quality 95": lambda picture: as_file(picture, "JPEG", quality=95),
    "JPEG, quality 75": lambda picture: as_file(picture, "JPEG", quality=75),
    "JPEG, quality 50": lambda picture: as_file(picture, "JPEG", quality=50),
    "screenshot": lambda picture: as_file(ImageOps.scale(picture, 2.5, Image.Resampling.BILINEAR)),
    "slight blur": lambda picture: as_file(picture.filter(ImageFilter.GaussianBlur(0.5))),
    "small crop": cropped,
    "phone noise": noisy,
}


def sent(image: Tensor, way: Send) -> Tensor:
    """Images uint8 (N, H, W, 3) as the endpoint decodes them after they came that `way`."""
    pixels = [decode(way(Image.fromarray(one)), image.shape[1]) for one in image.cpu().numpy()]
    return torch.from_numpy(np.stack(pixels)).to(image.device)


def photographs(size: int) -> Tensor:
    """Crops of photographs, uint8 (N, size, size, 3): scenes that nobody calibrated on."""
    draws, out = np.random.default_rng(0), []
    for name in PHOTOGRAPHS:
        with Image.open(Path(data_dir) / name) as file:
            picture = file.convert("RGB")
        for _ in range(CROPS):
            side = int(draws.integers(min(64, *picture.size), min(picture.size) + 1))
            left = int(draws.integers(picture.width - side + 1))
            top = int(draws.integers(picture.height - side + 1))
            crop = picture.crop((left, top, left + side, top + side))
            out.append(fit(np.asarray(crop), size))
    return torch.from_numpy(np.stack(out))


class Judged(NamedTuple):
    """A variant with the calibration that it is served with."""

    pipeline: DefendedClassifier
    calibration: Calibration


def false_alarms(every: Sequence[Judged], images: Images, *, rate: float) -> Iterator[Row]:
    """How many of `images` are flagged at `rate`, by the way they came, as the card lists it."""
    for name, way in tqdm(WAYS.items(), leave=False):
        image = sent(images.image, way)
        for judged in every:
            yield figures(judged, name, p_of(judged, image), rate)
    crops = photographs(images.image.shape[1]).to(images.image.device)
    for judged in every:
        p = p_of(judged, crops)
        # Crops of one photograph are no independent images: the range over photographs is given.
        each = (p.reshape(len(PHOTOGRAPHS), CROPS) < rate).mean(1)
        name = f"{len(p)} crops of {len(PHOTOGRAPHS)} photographs, with their range"
        row = figures(judged, name, p, rate, (each.min(), each.max()))
        many = sum(wilson(share, CROPS)[0] > rate for share in each)
        yield row | {"too_many": many > 1 and row["value"] > WORTH_NAMING * rate}


def by_class(every: Sequence[Judged], images: Images, *, rate: float) -> Iterator[Row]:
    """How many of `images`, which rank nothing, are flagged in each class they are taken for."""
    looks = len(every) * len(images.classes)
    for judged in every:
        logits, scores = outputs_of(judged.pipeline, images.image)
        ranks, guess = p_values(scores, judged.calibration), logits.argmax(1)
        for index in np.unique(guess):
            p = ranks[guess == index]
            row = figures(judged, f"{TAKEN_FOR} {images.classes[index]}", p, rate)
            # Of so many looks at few images each some are high by chance (Bonferroni).
            chance = binomtest(int((p < rate).sum()), len(p), rate, alternative="greater")
            yield row | {"too_many": row["too_many"] and bool(chance.pvalue < 0.025 / looks)}


def figures(
    judged: Judged, way: str, p: Floats, rate: float, interval: tuple[float, float] | None = None
) -> Row:
    """One row of the card, from the p-values (N,) of images that came this way."""
    value = float((p < rate).mean())
    interval = interval or wilson(value, len(p))
    return {"way": way, "variant": judged.calibration.variant, **rounded(value, interval)} | {
        "n": len(p),
        "drift": round(drift(p), 3),
        # Beyond doubt: chance alone takes a figure above its promise half of the time.
        "too_many": bool(interval[0] > rate and value > WORTH_NAMING * rate),
    }


def p_of(judged: Judged, image: Tensor) -> Floats:
    """p-values (N,) of images uint8 (N, H, W, 3)."""
    return p_values(scores_of(judged.pipeline, image), judged.calibration)


def coverage(suspicion: Floats, *, splits: int = SPLITS) -> Iterator[Row]:
    """Share of clean images flagged when a random half of `suspicion` (N,) ranks the other half. In
    theory, with k of n + 1 ranks that flag, the count among m images is beta-binomial with
    parameters k and n + 1 - k (Vovk 2012, section 2). Rates that so few images cannot rank are left
    out.
    """
    draws, half = np.random.default_rng(0), len(suspicion) // 2
    rest = len(suspicion) - half
    flags = {alpha: np.empty(splits) for alpha in ALPHAS}
    for number in range(splits):
        order = draws.permutation(len(suspicion))
        ranked, others = np.sort(suspicion[order[:half]]), suspicion[order[half:]]
        at_least = half - np.searchsorted(ranked, others, "left")
        for alpha, share in flags.items():
            share[number] = ((1 + at_least) / (half + 1) < alpha).mean()
    for alpha, share in flags.items():
        ranks = flagged_ranks(alpha, half)
        if not ranks:
            continue
        theory = betabinom(rest, ranks, half + 1 - ranks)
        yield {
            "alpha": alpha,
            "splits": splits,
            "flagged": round(float(share.mean()), 5),
            "middle_95%": [round(float(bound), 5) for bound in np.quantile(share, (0.025, 0.975))],
            "theory": round(ranks / (half + 1), 5),
            "theory_95%": [round(float(theory.ppf(q)) / rest, 5) for q in (0.025, 0.975)],
        }


def remedies(rows: Sequence[Row]) -> list[str]:
    """A line for each way that flags too many, and each class."""
    of_way = (
        "if your clients send such pictures, collect a hundred or more clean ones and run"
        " `rampart calibrate --archive FILE.mar --images FOLDER`"
    )
    of_class = "the promise is over all classes together; to reject few of these, lower the rate"
    return [
        f"{row['variant']}: {row['way']} flags {row['value']:.1%}:"
        f" {of_class if row['way'].startswith(TAKEN_FOR) else of_way}"
        for row in rows
        if row["too_many"]
    ]


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of the rows, two columns a variant."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    head = ["clean images as they come", "images"]
    for variant in variants:
        head += [f"{variant}: flagged", "drift"]
    body: dict[str, list[str]] = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        same = {row["variant"]: row for row in rows if row["way"] == way}
        # Variants may take different images for one class.
        body[way] = [", ".join(dict.fromkeys(str(row["n"]) for row in same.values()))]
        for variant in variants:
            body[way] += flag_cells(same[variant]) if variant in same else ["-", "-"]
    return tuple(head), [(way, *cells) for way, cells in body.items()]


def flag_cells(row: Row) -> list[str]:
    """The share flagged and the drift of one row."""
    return [cell_text(row) + " too many" * row["too_many"], f"{row['drift']:.3f}"]


def in_words(point: Row) -> str:
    """What `coverage` found at one rate, beside the theory."""
    (low, high), (least, most) = point["middle_95%"], point["theory_95%"]
    return (
        f"{point['flagged']:.2%} flagged over {point['splits']} splits ({low:.2%} to {high:.2%});"
        f" theory {point['theory']:.2%} ({least:.2%} to {most:.2%})"
    )
