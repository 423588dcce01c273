"""The card as it is written: figures made into rows, the schema that it obeys, and the log."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rampart.hardening.judge.metrics import Metric, wilson
from rampart.hardening.model.card import (
    NO_VARIANT,
    RATE,
    Figure,
    merge,
    read_card,
    robust_in_int8,
    write_card,
)
from rampart.hardening.report.tables import (
    fenced,
    markdown,
    model_table,
    piped,
    table,
    with_tables,
)
from rampart.hardening.report.verdicts import describe, picture

# One door to all that a command does with a card.
__all__ = [
    "add_to_card",
    "check_card",
    "describe",
    "fenced",
    "log_evaluation",
    "markdown",
    "merge",
    "model_table",
    "picture",
    "piped",
    "read_card",
    "robust_in_int8",
    "row",
    "table",
    "with_tables",
    "write_card",
]


def row(metric: Metric, *, data: str, command: str, rate: float = RATE) -> dict[str, Any]:
    """A metric as card.json lists it, with the `rate` it depends on if that is no usual one."""
    threat = metric.threat
    low, high = metric.interval or wilson(metric.value, metric.n)
    # The worst case of what never rejects depends on it too: images of joint attacks count.
    depends = metric.subject.variant != NO_VARIANT or metric.name == "robust"
    figure = Figure(
        metric.subject,
        metric.name,
        round(metric.value, 6),
        metric.n,
        (round(low, 4), round(high, 4)),
        data,
        command,
        norm=threat.norm if threat else None,
        eps=str(threat).partition(" ")[2] if threat else None,
        attack=metric.attack or None,
        rate=rate if depends and rate != RATE else None,
    )
    return figure.row()


def check_card(card: dict[str, Any]) -> None:
    """Raise ValueError where a card breaks the schema that stands beside this file."""
    from jsonschema import Draft202012Validator

    schema = json.loads(Path(__file__).with_name("card.schema.json").read_text())
    errors = list(Draft202012Validator(schema).iter_errors(card))
    if errors:
        raise ValueError("; ".join(f"card.json {e.json_path}: {e.message}" for e in errors[:3]))


def add_to_card(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Put `entries` in place of the card's own of the same names; returns the card.

    Raises ValueError, and writes nothing, where the card would break the schema.
    """
    card = read_card(folder) | entries
    check_card(card)
    write_card(folder, card)
    return card


def log_evaluation(folder: Path, entry: dict[str, Any]) -> None:
    """Append to the log of everything that was ever evaluated: nobody tunes on test unseen.

    The entry gains the time (UTC) and the SHA-256 of the weights.
    """
    weights = weights_digest(folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (folder / "evaluations.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": now, "weights": weights} | entry) + "\n")


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model folder's weights."""
    with (folder / "weights.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
