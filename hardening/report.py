"""Figures with their uncertainty, and the card that carries them."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hardening.attacks import Threat


class Metric(NamedTuple):
    """One share in [0, 1] of `n` images; `threat` is None for clean figures."""

    subject: str
    variant: str
    name: str
    value: float
    n: int
    threat: Threat | None = None


def wilson(value: float, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share `value` of `n` images (Wilson 1927)."""
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def row(metric: Metric, *, data: str, command: str) -> dict[str, Any]:
    """A metric as card.json lists it."""
    out: dict[str, Any] = {
        "subject": metric.subject,
        "variant": metric.variant,
        "name": metric.name,
        "value": round(metric.value, 6),
        "n": metric.n,
        "interval": [round(bound, 4) for bound in wilson(metric.value, metric.n)],
        "data": data,
        "command": command,
    }
    if metric.threat is not None:
        eps = f"{metric.threat.eps * 255:g}/255" if metric.threat.norm == "Linf" else None
        out |= {"norm": metric.threat.norm, "eps": eps or f"{metric.threat.eps:g}"}
    return out


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`new` rows, and those `old` ones that no new row replaces (same figure, threat and data)."""
    keys = ("subject", "variant", "name", "norm", "eps", "data")
    replaced = {tuple(r.get(key) for key in keys) for r in new}
    return [r for r in old if tuple(r.get(key) for key in keys) not in replaced] + new


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The metrics of a card as an aligned text table."""
    lines = [("subject", "variant", "figure", "threat", "value", "95% interval", "n")]
    for r in rows:
        threat = f"{r['norm']} {r['eps']}" if "eps" in r else "-"
        low, high = r["interval"]
        interval = f"{low:.1%} to {high:.1%}"
        value = f"{r['value']:.1%}"
        lines.append((r["subject"], r["variant"], r["name"], threat, value, interval, str(r["n"])))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a model folder; empty where none was written yet."""
    file = folder / "card.json"
    card: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return card


def write_card(folder: Path, card: dict[str, Any]) -> Path:
    """Write card.json in a model folder."""
    file = folder / "card.json"
    file.write_text(json.dumps(card, indent=1) + "\n")
    return file


def picture(
    panels: Sequence[tuple[str, NDArray[np.uint8], str]], path: Path, *, side: int = 288
) -> Path:
    """Write (title, image uint8 (H, W, 3), caption) panels side by side as one PNG."""
    margin, line = 12, 26
    width = len(panels) * (side + margin) + margin
    sheet = Image.new("RGB", (width, side + 2 * line + 2 * margin), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for number, (title, image, caption) in enumerate(panels):
        left = margin + number * (side + margin)
        large = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(large, (left, margin + line))
        draw.text((left, margin), title, fill="black", font=font)
        draw.text((left, margin + line + side + 4), caption, fill="black", font=font)
    sheet.save(path)
    return path
