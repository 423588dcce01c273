"""The part of a model's card that a client needs; the card itself also holds the history."""

from collections.abc import Mapping
from typing import Any

FACTS = (
    "name",
    "model",
    "variant",
    "precision",
    "data",
    "classifier",
    "threat_model",
    "calibration_images",
    "max_pixels",
    "task",
    "objects",
    "min_confidence",
    "max_overlap",
    "recalibrated_on",
)
FILES = ("graph.onnx", "calibration.json", "weights.safetensors")
FIGURES = (
    "clean",
    "clean_rejection",
    "pgd20",
    "autoattack",
    "autoattack_short",
    "joint_apgd",
    "robust",
    "robust_with_rejection@1%",
)
COLUMNS = ("name", "norm", "eps", "value", "n", "interval", "data")


def summary(card: Mapping[str, Any]) -> dict[str, Any]:
    """Facts, the main figures of what is served, and hashes, out of an archive's card."""
    facts = {name: card[name] for name in FACTS if name in card}
    hashes = card.get("sha256") or {}
    return facts | {
        "metrics": figures(card),
        "sha256": {name: hashes[name] for name in FILES if name in hashes},
    }


def figures(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The main figures of the card's variant and precision, at the usual false-alarm rate.

    Where several attacks give one figure, the strongest counts. Each figure names its data: the
    validation images chose the model, so figures on them are worth less than those on test images.
    """
    precision = card.get("precision", "fp32")
    subject = "pipeline" if precision == "fp32" else f"graph:{precision}"
    lowest: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in card.get("metrics") or []:
        ours = row["subject"] == subject and row["variant"] == card.get("variant")
        if not ours or row["name"] not in FIGURES or "rate" in row:
            continue
        figure = {name: row[name] for name in COLUMNS if name in row}
        key = tuple(figure.get(name) for name in ("name", "norm", "eps", "data"))
        if figure["value"] <= lowest.get(key, figure)["value"]:
            lowest[key] = figure
    return list(lowest.values())
