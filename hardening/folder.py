"""A folder of model_store: which variants it holds, which are best, of what it was made.

weights.safetensors, calibration-VARIANT.json and card.json make a model; figures and pictures are
added as they are measured.
"""

import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from hardening import report
from hardening.calibrate import Precision
from hardening.pipeline import Variant

VARIANTS: tuple[Variant, ...] = ("full", "lean")


def variants_in(model: Path) -> list[Variant]:
    """The variants that a model folder is calibrated for, `full` first."""
    return [v for v in VARIANTS if (model / f"calibration-{v}.json").is_file()]


def calibrated(model: Path) -> list[Variant]:
    """`variants_in`, at least one. Raises ValueError that says how to make it."""
    if known := variants_in(model):
        return known
    raise ValueError(f"{model} is no folder of a calibrated model: `rampart calibrate` makes it")


def best_variant(model: Path) -> Variant:
    """The variant that is taken where none is asked for: what the ablation chose, else `full`.

    An empty folder is complained of later.
    """
    known = variants_in(model)
    chosen = report.read_card(model).get("ablation", {}).get("default", {}).get("variant")
    return chosen if chosen in known else next(iter(known), VARIANTS[0])


def best_precision(model: Path, variant: str) -> Precision:
    """int8 where its worst case was measured and is within a point of the float one's."""
    loss = report.robust_in_int8(model, variant)
    return "int8" if loss is not None and loss <= 0.01 else "fp32"


def sibling(model: Path) -> Path | None:
    """The undefended twin that stands beside `model`, where there is one."""
    twin = model.with_name(f"{model.name}-undefended")
    return twin if twin.is_dir() else None


def trained_on(card: dict[str, Any], data: Path) -> bool:
    """Whether the card names `data` as the images of training, by itself or in a command."""
    return data.name in (card.get("data"), *passed(card, "--data"))


def passed(card: dict[str, Any], option: str) -> list[str]:
    """The names of the files that a model's commands were given as `option`."""
    lines = map(shlex.split, card.get("commands", []))
    return [Path(name).name for words in lines for word, name in pairwise(words) if word == option]


def contents(model: Path) -> dict[str, Any]:
    """The files of a model folder, by name."""
    return {file.name: file for file in sorted(model.iterdir()) if file.is_file()}


def calibrations(model: Path) -> list[Path]:
    """The files of a model folder that belong to its weights alone."""
    return [*model.glob("calibration-*.json"), *model.glob("ranges-*.json")]


def deliver(model: Path, target: Path) -> bool:
    """Copy a finished model folder; what was measured since on the same model stays.

    Returns whether it is the same. The log of evaluations only grows.
    """

    def decides(folder: Path) -> dict[str, bytes]:
        names = ("weights.safetensors", *(f"calibration-{variant}.json" for variant in VARIANTS))
        files = [folder / name for name in names]
        return {file.name: file.read_bytes() for file in files if file.is_file()}

    def logged(folder: Path) -> list[str]:
        log = folder / "evaluations.jsonl"
        return log.read_text().splitlines() if log.is_file() else []

    known, lines = report.read_card(target), [*logged(target), *logged(model)]
    same = decides(target) == decides(model)
    if not same:  # an earlier model's would not fit this one's weights
        for file in [*calibrations(target), *target.glob("*.png"), *target.glob("report.html")]:
            file.unlink()
    shutil.copytree(model, target, dirs_exist_ok=True)
    if lines:
        once = "".join(f"{line}\n" for line in dict.fromkeys(lines))
        (target / "evaluations.jsonl").write_text(once)
    if same:
        card = report.read_card(target)
        rows = report.merge(known.get("metrics", []), card.get("metrics", []))
        report.write_card(target, known | card | {"metrics": rows})
    return same
