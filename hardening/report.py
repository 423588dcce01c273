"""Figures with their uncertainty, and the card that carries them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from handlers.verdict import Calibration, Policy, p_values
from hardening.metrics import Bools, Metric, wilson
from hardening.pipeline import DefendedClassifier

RATE = Policy.false_alarm_rate
LEAST = 100  # images, fewer of which choose no precision


def row(metric: Metric, *, data: str, command: str, rate: float = RATE) -> dict[str, Any]:
    """A metric as card.json lists it, with the `rate` it depends on if that is no usual one."""
    out: dict[str, Any] = {
        "subject": metric.subject,
        "variant": metric.variant,
        "name": metric.name,
        "value": round(metric.value, 6),
        "n": metric.n,
        "interval": [
            round(bound, 4) for bound in metric.interval or wilson(metric.value, metric.n)
        ],
        "data": data,
        "command": command,
    }
    if metric.threat is not None:
        eps = f"{metric.threat.eps * 255:g}/255" if metric.threat.norm == "Linf" else None
        out |= {"norm": metric.threat.norm, "eps": eps or f"{metric.threat.eps:g}"}
    if metric.attack:
        out |= {"attack": metric.attack}
    # The worst case of what never rejects depends on it too: images of joint attacks count.
    if rate != RATE and (metric.variant != "-" or metric.name == "robust"):
        out |= {"rate": rate}
    return out


def share(held: Bools) -> dict[str, Any]:
    """A share of images with its 95% interval."""
    value = float(held.mean())
    return rounded(value, wilson(value, len(held)))


def rounded(value: float, interval: tuple[float, float]) -> dict[str, Any]:
    """A figure with its interval."""
    return {"value": round(value, 4), "interval": [round(bound, 4) for bound in interval]}


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`new` rows, and those `old` ones that no new row replaces.

    Replaced is the same figure under the same threat, attack and data, and at the same rate of
    false alarms: a weaker attack never takes the place of a stronger one.
    """
    keys = ("subject", "variant", "name", "norm", "eps", "attack", "data", "rate")
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


ON_LABELS = ("pgd20", "autoattack", "autoattack_short")
# What README shows of a card: column title, figure.
COLUMNS = {
    "clean accuracy": "clean",
    "clean rejection": "clean_rejection",
    "PGD-20": "pgd20",
    "AutoAttack": "autoattack",
    "AutoAttack, short": "autoattack_short",
    "joint attack, right or rejected": "joint_apgd",
    "worst case, label right": "robust",
    "worst case, right or rejected": "robust_with_rejection@1%",
}
SUBJECTS = {
    ("classifier", "-"): "classifier alone",
    ("pipeline", "lean"): "`lean`",
    ("pipeline", "full"): "`full`",
    ("max_softmax", "full"): "`full`, rejecting by max-softmax instead",
    ("graph:fp16", "lean"): "`lean` in fp16",
    ("graph:fp16", "full"): "`full` in fp16",
    ("graph:int8", "lean"): "`lean` in int8",
    ("graph:int8", "full"): "`full` in int8",
    ("undefended", "-"): "undefended twin",
}


def markdown(card: dict[str, Any]) -> str:
    """The card's main figures under its threat model and at the usual rate of false alarms, one
    Markdown table for each data set.

    Where a figure was made by several attacks, the lowest counts; an attack of a later evaluation
    can leave fewer than the worst case of an earlier one, and then counts there too.
    """
    tables: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {}
    for r in card.get("metrics", []):
        title = f"{r['data']} (n = {r['n']}), {card['threat_model']}"
        lowest = tables.setdefault(title, {})
        key = (r["subject"], r["variant"], r["name"])
        shown = r["name"] in COLUMNS.values() and is_main(card, r)
        if shown and r["value"] <= lowest.get(key, {"value": 1})["value"]:
            lowest[key] = r
    for lowest in tables.values():
        for (subject, variant, name), worst in lowest.items():
            if name == "robust":
                others = [lowest.get((subject, variant, other), worst) for other in ON_LABELS]
                lowest[subject, variant, name] = min(worst, *others, key=lambda r: r["value"])
    return "\n\n".join(f"{title}:\n\n{one_table(rows)}" for title, rows in tables.items() if rows)


def one_table(rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """Figures by (subject, variant, name) as a Markdown table."""
    names = {name for _, _, name in rows}
    columns = {title: name for title, name in COLUMNS.items() if name in names}
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for (subject, variant), title in SUBJECTS.items():
        cells = [rows.get((subject, variant, name)) for name in columns.values()]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cell_text(cell) for cell in cells) + " |")
    return "\n".join(lines)


def piped(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_main(card: dict[str, Any], r: dict[str, Any]) -> bool:
    """Whether a row is of the card's threat model, or of clean images, at the usual rate."""
    return "rate" not in r and ("eps" not in r or f"{r['norm']} {r['eps']}" == card["threat_model"])


def cell_text(r: dict[str, Any] | None) -> str:
    """One figure of a card with its interval."""
    if r is None:
        return "-"
    low, high = r["interval"]
    return f"{r['value']:.1%} ({low:.1%} to {high:.1%})"


def model_table(folders: Sequence[Path]) -> str:
    """The models side by side as a Markdown table: network, size, training, main figures."""
    titles = ("model", "network", "weights", "training", "clean accuracy", "standard AutoAttack")
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for folder in folders:
        card = read_card(folder)
        net, runs = card["classifier"], card.get("history", [])
        width = f" x {net['width']:g}" if net["width"] != 1 else ""
        size = (folder / "weights.safetensors").stat().st_size / 1e6
        epochs, minutes = sum(map(len, runs)), sum(run[-1]["minutes"] for run in runs)
        training = f"{epochs} epochs, {minutes / 60:.1f} h" if runs else "-"
        cells = [f"`{folder.name}`", net["arch"] + width, f"{size:.1f} MB", training]
        for name, attack in (("clean", None), ("autoattack", "AutoAttack, standard")):
            rows = [
                r
                for r in card.get("metrics", [])
                if (r["subject"], r["name"], r.get("attack")) == ("classifier", name, attack)
                and is_main(card, r)
            ]
            best = max(rows, key=lambda r: r["n"], default=None)
            threat = f", {card['threat_model']}" if best and "eps" in best else ""
            cells.append(cell_text(best) + (f", n = {best['n']}{threat}" if best else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def robust_in_int8(folder: Path, variant: str) -> float | None:
    """Worst-case robust accuracy, with or without rejection, that int8 costs a variant at most.

    Only validation images decide, and at least LEAST of them: test images must not choose what is
    served. Both figures are of the same images and attacks, under the card's threat model; of
    several such pairs that of most images counts. None where it was not measured.
    """
    pairs: dict[tuple[str, ...], dict[str, float]] = {}
    sizes: dict[tuple[str, ...], int] = {}
    card = read_card(folder)
    for r in card.get("metrics", []):
        kind = r["name"].partition("@")[0]
        wanted = r["variant"] == variant and kind in ("robust", "robust_with_rejection")
        wanted = wanted and r["n"] >= LEAST and is_main(card, r)
        if wanted and "validation split" in r["data"]:
            key = (r["name"], r["data"], r["attack"], r["norm"], r["eps"])
            pairs.setdefault(key, {})[r["subject"]] = r["value"]
            sizes[key] = r["n"]
    both = [key for key, found in pairs.items() if {"pipeline", "graph:int8"} <= set(found)]
    most = max((sizes[key] for key in both), default=0)
    losses = [
        pairs[key]["pipeline"] - pairs[key]["graph:int8"] for key in both if sizes[key] == most
    ]
    return round(max(losses), 6) if losses else None


def with_tables(text: str, folders: Sequence[Path]) -> str:
    """`text` with its fenced parts made anew: "models" of all folders, "figures" of the first."""
    text = fenced(text, "models", model_table(folders))
    return fenced(text, "figures", markdown(read_card(folders[0])))


def fenced(text: str, name: str, content: str) -> str:
    """`text` with what stands between the two comment lines of `name` replaced by `content`.

    Raises ValueError where it has no such lines.
    """
    first = f"<!-- {name}: made by `rampart table`, do not edit -->"
    last = f"<!-- end of {name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"the text needs one line {first!r} and, below it, one {last!r}")
    head, rest = text.split(first)
    return f"{head}{first}\n\n{content}\n\n{last}{rest.split(last)[1]}"


def check_card(card: dict[str, Any]) -> None:
    """Raise ValueError where a card breaks the schema that stands beside this file."""
    from jsonschema import Draft202012Validator

    schema = json.loads(Path(__file__).with_name("card.schema.json").read_text())
    errors = list(Draft202012Validator(schema).iter_errors(card))
    if errors:
        raise ValueError("; ".join(f"card.json {e.json_path}: {e.message}" for e in errors[:3]))


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
    weights = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (folder / "evaluations.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": now, "weights": weights} | entry) + "\n")


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
    return f"{classes[int(index)]} {float(confidence):.0%}, p = {p:.2g}: {decision}"


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
