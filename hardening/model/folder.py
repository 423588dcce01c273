"""A folder of model_store: weights.safetensors, calibration-VARIANT.json and card.json."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args
from zipfile import BadZipFile, ZipFile

from rampart.hardening.model.card import FILE as CARD
from rampart.hardening.model.card import (
    MEASURED,
    joined,
    read_card,
    robust_in_int8,
    write_card,
)
from rampart.hardening.model.files import SAMPLES, TRAINED_ON, Precision, calibration_file

if TYPE_CHECKING:
    from rampart.hardening.model.pipeline import Variant

# The first that there is stands for the model, unless an ablation has chosen.
VARIANTS: tuple[Variant, ...] = ("full", "lean", "guarded")
WEIGHTS = "weights.safetensors"
LOG = "evaluations.jsonl"  # a line of JSON for each evaluation
# What is drawn of a model, and all that goes with its weights beside calibrations.
DRAWN = ("ablation.png", "curve.png", "report.html")
MADE_OF = (CARD, MEASURED, TRAINED_ON, *SAMPLES, *DRAWN, *(f"measured-{name}" for name in DRAWN))


def variants_in(model: Path) -> list[Variant]:
    """The variants that a model folder is calibrated for, `full` first."""
    return [v for v in VARIANTS if (model / f"calibration-{v}.json").is_file()]


def forms(model: Path) -> list[tuple[Variant, Precision]]:
    """The variants of a model folder, each with every precision it is calibrated in."""
    pairs = product(calibrated(model), get_args(Precision))
    return [(v, p) for v, p in pairs if calibration_file(model, v, p).is_file()]


def calibrated(model: Path) -> list[Variant]:
    """`variants_in`, at least one. Raises ValueError that says how to make it."""
    if variants := variants_in(model):
        return variants
    raise ValueError(
        f"{model} is not a calibrated model folder: create one with `rampart calibrate`"
    )


def best_variant(card: dict[str, Any], variants: Sequence[Variant]) -> Variant:
    """The variant to take where you name none: the ablation's choice, else `full`."""
    chosen: Variant = card.get("ablation", {}).get("default", {}).get("variant")
    return chosen if chosen in variants else variants[0]


def form(
    model: Path, variant: Variant | None, precision: Precision | None
) -> tuple[Variant, Precision]:
    """The variant and precision to export, the best for None. ValueError for no such variant."""
    variants = calibrated(model)
    if variant and variant not in variants:
        raise ValueError(f"{model} is not calibrated as {variant}: leave out --variant")
    chosen = variant or best_variant(read_card(model), variants)
    return chosen, precision or best_precision(model, chosen)


def best_precision(model: Path, variant: str) -> Precision:
    """int8 where its worst case was measured and is within a point of the float one's.

    An object detector's int8 form exists only where its gate, an attack among it, says so.
    """
    card = read_card(model)
    if "objects" in card:
        return "int8" if variant in card.get("int8", {}) else "fp32"
    loss = robust_in_int8(model, variant)
    return "int8" if loss is not None and loss <= 0.01 else "fp32"


def sibling(model: Path) -> Path | None:
    """The undefended twin that stands beside `model`, where there is one."""
    twin = model.with_name(f"{model.name}-undefended")
    return twin if twin.is_dir() else None


def trained_on(card: dict[str, Any], data: Path) -> bool:
    """Whether the card names `data` as the images of training, by itself or in a command."""
    return data.name in (card.get("data"), *(options.get("--data") for options in commands(card)))


def held_beside(card: dict[str, Any], data: Path) -> list[str]:
    """What the card's commands on `data` named as held-out images."""
    same = (options for options in commands(card) if options.get("--data") == data.name)
    return [options["--held"] for options in same if options.get("--held")]


def skipped_bad(card: dict[str, Any], data: Path) -> bool:
    """Whether the card's commands on `data` left out pictures that cannot be read."""
    lines = [shlex.split(line) for line in card.get("commands", [])]
    return any("--skip-bad" in line and data.name in map(last_name, line) for line in lines)


def last_name(word: str) -> str:
    """The file or folder that a word of a command names, as `a/b` or `--data=a/b`."""
    return Path(word.rpartition("=")[2]).name


def commands(card: dict[str, Any]) -> list[dict[str, str]]:
    """Each command of the card as its options, the last folder or file name of each value."""
    out = []
    for line in card.get("commands", []):
        words = [w for word in shlex.split(line) for w in word.split("=", word.startswith("--"))]
        options = {word: Path(value).name for word, value in pairwise(words)}
        out.append({word: name for word, name in options.items() if word.startswith("--")})
    return out


def contents(model: Path) -> dict[str, Any]:
    """The files of a model folder, by name."""
    return {file.name: file for file in sorted(model.iterdir()) if file.is_file()}


def calibrations(model: Path) -> list[Path]:
    """The files of a model folder that belong to its weights alone."""
    kinds = ("calibration-*.json", "ranges-*.json", "graph-*.*")
    return [file for kind in kinds for file in model.glob(kind)]


def deliver(model: Path, target: Path) -> bool:
    """Copy a finished model folder, the newer of each file; whether `target` had the same model.

    All is copied before anything is replaced, and what is half replaced has no calibration: an
    interruption leaves no weights under the calibrations of others.
    """
    same = _decides(target) == _decides(model)
    lines = dict.fromkeys([*logged(target), *logged(model)])
    cards = [read_card(target), read_card(model)] if same else []
    if same and _newer(target / CARD, model / CARD):
        cards.reverse()
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target) as scratch:
        work = Path(scratch)
        for file in contents(model).values():
            if not (same and _newer(target / file.name, file)):
                shutil.copy2(file, work)
        if lines:
            (work / LOG).write_text("".join(f"{line}\n" for line in lines))
        if cards:
            write_card(work, joined(*cards))
        if not same:
            for file in [*calibrations(target), *(target / name for name in MADE_OF)]:
                file.unlink(missing_ok=True)
        for name in sorted(contents(work), key=_turn):
            (work / name).replace(target / name)
    return same


def _turn(name: str) -> int:
    """When a file of a model is put in its place: weights first, the card last."""
    return {WEIGHTS: 0, CARD: 2}.get(name, 1)


def _decides(model: Path) -> dict[str, bytes]:
    """What makes it another model."""
    names = (WEIGHTS, *(f"calibration-{variant}.json" for variant in VARIANTS))
    return {name: (model / name).read_bytes() for name in names if (model / name).is_file()}


def logged(model: Path) -> list[str]:
    """The lines of JSON in a model folder's log of evaluations."""
    log = model / LOG
    return log.read_text().splitlines() if log.is_file() else []


def _newer(file: Path, other: Path) -> bool:
    return file.is_file() and file.stat().st_mtime > other.stat().st_mtime


def is_of(archive: Path, model: Path) -> bool:
    """Whether an archive was packed from the weights in a model folder."""
    try:
        with ZipFile(archive) as packed:
            digest = json.loads(packed.read(CARD))["sha256"][WEIGHTS]
    except (OSError, BadZipFile, ValueError, KeyError, TypeError):
        return False
    with (model / WEIGHTS).open("rb") as weights:
        return bool(digest == hashlib.file_digest(weights, "sha256").hexdigest())


def samples_in(archive: Path) -> set[str]:
    """The sample pictures that an archive holds, by name."""
    with ZipFile(archive) as packed:
        return set(SAMPLES).intersection(packed.namelist())
