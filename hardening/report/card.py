"""The card as it is written, and its figures as tables: for the terminal, and for docs/."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rampart.handlers.engine import sha256
from rampart.hardening.attack import ladder
from rampart.hardening.judge.metrics import Metric, wilson
from rampart.hardening.model.card import (
    FILE,
    NO_VARIANT,
    RATE,
    Figure,
    Row,
    Subject,
    cell_text,
    joined,
    main_figures,
    of_others,
    percent,
)
from rampart.hardening.model.card import MEASURED as MEASURED
from rampart.hardening.model.card import failed_checks as failed_checks
from rampart.hardening.model.card import merge as merge
from rampart.hardening.model.card import merge_checks as merge_checks
from rampart.hardening.model.card import outnumbered as outnumbered
from rampart.hardening.model.card import read_card as read_card
from rampart.hardening.model.card import robust_in_int8 as robust_in_int8
from rampart.hardening.model.card import unfit as unfit
from rampart.hardening.model.card import write_card as write_card
from rampart.hardening.model.folder import LOG, logged

# The rows that the documents show of a card.
SUBJECTS = {
    Subject("classifier"): "classifier alone",
    Subject("pipeline", "lean"): "`lean`",
    Subject("pipeline", "full"): "`full`",
    Subject("max_softmax", "full"): "`full`, rejecting by max-softmax instead",
    Subject("pipeline", "lean", "fp16"): "`lean` in fp16",
    Subject("pipeline", "full", "fp16"): "`full` in fp16",
    Subject("pipeline", "lean", "int8"): "`lean` in int8",
    Subject("pipeline", "full", "int8"): "`full` in int8",
    Subject("undefended"): "undefended twin",
}
MODELS = ("model", "network", "weights", "training", "clean accuracy", "under attack")

HARMS = ("clean_rejection", "accepted_and_wrong")  # beside rejections that an attack forces

Lowest = dict[tuple[Subject, str], Figure]  # the worst figure of a subject under a name


def merit(figure: Figure) -> float:
    """How far a figure speaks for the defence: of what it wants to be rare, the negative share."""
    floods = (attack.name for attack in ladder.RUNGS if attack.aim == "flood")
    return -figure.value if figure.name in (*HARMS, *floods) else figure.value


def row(metric: Metric, *, data: str, command: str, rate: float = RATE) -> Row:
    """A metric as card.json lists it, with the `rate` it depends on if that is no usual one."""
    threat = metric.threat
    low, high = metric.interval or wilson(metric.value, metric.n)
    # The worst case of what never rejects depends on it too: images of joint attacks count.
    depends = metric.subject.variant != NO_VARIANT or metric.name == "robust"
    value, interval = round(metric.value, 6), (round(low, 4), round(high, 4))
    figure = Figure(metric.subject, metric.name, value, metric.n, interval, data, command)
    norm, eps = str(threat).split() if threat else (None, None)
    unusual = rate if depends and rate != RATE else None
    return replace(figure, norm=norm, eps=eps, attack=metric.attack or None, rate=unusual).row()


def check_card(card: Row) -> None:
    """Raise ValueError where a card breaks the schema that stands beside this file."""
    from jsonschema import Draft202012Validator

    schema = json.loads(Path(__file__).with_name("card.schema.json").read_text())
    errors = list(Draft202012Validator(schema).iter_errors(card))
    if errors:
        raise ValueError("; ".join(f"card.json {e.json_path}: {e.message}" for e in errors[:3]))


def add_to_card(folder: Path, entries: Row, name: str = FILE) -> Row:
    """Put `entries` into the card, or into the file beside it, figures and self-checks beside those
    that others have put there by now; returns what that holds then.

    Raises ValueError, and writes no file, for a broken schema.
    """
    with alone(folder):
        content = joined(read_card(folder, name), entries)
        check_card(read_card(folder) | content)
        write_card(folder, content, name)
    return content


def forget_form(folder: Path, precision: str, name: str = FILE) -> Row:
    """Take what was measured of graphs in `precision` out of the card: a new graph has no figures
    yet. Returns what is left.
    """
    with alone(folder):
        content = of_others(read_card(folder, name), precision)
        if content:
            write_card(folder, content, name)
    return content


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While others who want to change a card of `folder` wait."""
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def log_evaluation(folder: Path, entry: Row) -> None:
    """Append to the log of all evaluations, with the time (UTC) and the SHA-256 of the weights."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stamp = {"time": now, "weights": sha256(folder / "weights.safetensors")}
    with (folder / LOG).open("a") as stream:
        stream.write(json.dumps(stamp | entry) + "\n")


def measured_on(folder: Path, data: str) -> str:
    """The day (UTC) of the last evaluation on `data` that the log has; empty without one."""
    runs = map(json.loads, logged(folder))
    return max((run["time"][:10] for run in runs if run["data"] == data), default="")


def accuracy_in_words(accuracy: Row) -> str:
    """What a card says of accuracy on held-out images, beside chance."""
    low, chance = accuracy["interval"][0], accuracy["chance"]
    text = f"accuracy {cell_text(accuracy)} on {accuracy['n']:,} held-out images, the most frequent"
    text += f" class alone would be {chance:.1%}"
    if accuracy["value"] <= chance:
        return f"{text}. Warning: at or below chance"
    return text if low > chance else f"{text}. Warning: not beyond doubt above chance"


def table(rows: Iterable[Row]) -> str:
    """The metrics of a card as an aligned text table."""
    lines = [("subject", "variant", "figure", "threat", "value", "95% interval", "n")]
    for figure in map(Figure.of, rows):
        low, high = figure.interval
        who = (figure.subject.text, figure.subject.variant, figure.name, figure.threat or "-")
        lines.append((*who, f"{figure.value:.1%}", f"{low:.1%} to {high:.1%}", str(figure.n)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)) for line in lines)


def markdown(card: Row) -> str:
    """The card's main figures, the worst of each, as one Markdown table for each data set."""
    if "objects" in card:
        every = [attacks for name, attacks in card.items() if name.startswith("attacks")]
        return "\n\n".join(map(objects_markdown, every))
    tables: dict[str, Lowest] = {}
    for figure in main_figures(card):
        title = f"{figure.data} (n = {figure.n}), {card.get('threat_model')}"
        lowest, key = tables.setdefault(title, {}), (figure.subject, figure.name)
        if key not in lowest or merit(figure) <= merit(lowest[key]):
            lowest[key] = figure
    parts = {title: one_table(worst_cases(lowest)) for title, lowest in tables.items()}
    return "\n\n".join(f"{title}:\n\n{text}" for title, text in parts.items() if text)


def objects_markdown(attacks: Row) -> str:
    """An object detector's figures as a Markdown table."""
    classes = list(attacks["rows"]["clean"]["classes"])
    head = ["", "mAP50", "COCO AP", *(f"AP50 {name}" for name in classes)]
    head += ["objects kept", "false boxes a picture"]
    guarded = any("flagged" in row for row in attacks["rows"].values())
    head += ["flagged"] if guarded else []
    body = [
        [
            name,
            percent(row["map50"], row["interval"]),
            f"{row['ap']:.1%}",
            *(told(row["classes"][one]) for one in classes),
            f"{row['objects_kept']:.1%}",
            f"{row['false_boxes']:.2f}",
            *([f"{row['flagged']:.1%}" if "flagged" in row else ""] if guarded else []),
        ]
        for name, row in attacks["rows"].items()
    ]
    said = f"{attacks['data']} (n = {attacks['n']}), {attacks['threat_model']}, {attacks['budget']}"
    said += f", flagged as {attacks['variant']}" if "variant" in attacks else ""
    return f"{said}:\n\n{piped(head, body)}"


def told(share: float | None) -> str:
    """A share in percent; of a class that no picture shows there is none."""
    return "-" if share is None else f"{share:.1%}"


def worst_cases(lowest: Lowest) -> Lowest:
    """`lowest`, with a later attack on a label in place of a worst case that it undercuts."""
    out = dict(lowest)
    on_labels = [attack.name for attack in ladder.RUNGS if attack.aim == "label"]
    for subject, name in lowest:
        if name == "robust":
            others = [lowest.get((subject, other)) for other in (name, *on_labels)]
            out[subject, name] = min(filter(None, others), key=lambda figure: figure.value)
    return out


def one_table(lowest: Lowest) -> str:
    """Figures as a Markdown table; empty where none of them is shown."""
    names = {name for _, name in lowest}
    columns = {"clean accuracy": "clean", "clean rejection": "clean_rejection"}
    columns |= {attack.title: attack.name for attack in ladder.RUNGS if attack.title}
    columns |= {"worst case, label right": "robust"}
    rejecting = [name for name in names if name.startswith("robust_with_rejection@")]
    columns |= dict(zip(["worst case, right or rejected"], sorted(rejecting), strict=False))
    shown = {title: name for title, name in columns.items() if name in names}
    body = []
    for subject, title in SUBJECTS.items():
        figures = [lowest.get((subject, name)) for name in shown.values()]
        if any(figures):
            body.append([title, *(figure.cell if figure else "-" for figure in figures)])
    return piped(["", *shown], body) if body else ""


def piped(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(" ".join(f"| {cell}".rstrip() for cell in line) + " |" for line in lines)


def model_table(folders: Sequence[Path]) -> str:
    """The classifiers side by side as a Markdown table: network, size, training, main figures."""
    cards = [(folder, read_card(folder)) for folder in folders]
    return piped(MODELS, [model_cells(*one) for one in cards if "classifier" in one[1]])


def model_cells(folder: Path, card: Row) -> list[str]:
    """One line of `model_table`; of several figures that of most images."""
    net, runs = card["classifier"], card.get("history", [])
    width = f" x {net['width']:g}" if net["width"] != 1 else ""
    size = (folder / "weights.safetensors").stat().st_size / 1e6
    epochs, minutes = sum(map(len, runs)), sum(run[-1]["minutes"] for run in runs)
    training = f"{epochs} epochs, {minutes / 60:.1f} h" if runs else "-"
    out = [f"`{folder.name}`", net["arch"] + width, f"{size:.1f} MB", training]
    own = [f for f in main_figures(card) if f.subject.kind == "classifier"]
    clean = max((f for f in own if f.name == "clean"), key=lambda f: f.n, default=None)
    out.append(f"{clean.cell}, n = {clean.n}" if clean else "-")
    standard = [f for f in own if (f.name, f.attack) == ("autoattack", "AutoAttack, standard")]
    # Of few classes there is no standard one; a model whose AutoAttack is not done yet has the
    # weaker PGD-20, by its name.
    other, weaker = ([f for f in own if f.name == name] for name in ("autoattack", "pgd20"))
    named = (("standard AutoAttack", standard), ("AutoAttack", other), ("PGD-20", weaker))
    for title, same in named:
        if best := max(same, key=lambda f: f.n, default=None):
            return [*out, f"{best.cell}, n = {best.n}, {title}, {best.threat}"]
    return [*out, "-"]


def with_figures(text: str, folders: Sequence[Path]) -> str:
    """`text` with what it has a place for, by model: "figures of NAME", "purifier of NAME"."""
    for folder in folders:
        card = read_card(folder)
        if f"<!-- figures of {folder.name}:" in text:
            text = fenced(text, f"figures of {folder.name}", markdown(card))
        if f"<!-- purifier of {folder.name}:" in text and "purifier" in card:
            text = fenced(text, f"purifier of {folder.name}", purifier_markdown(card["purifier"]))
    return text


def purifier_markdown(part: Row) -> str:
    """What a purifier is for, as a Markdown table between its data and when to switch it on."""
    from rampart.hardening.judge import purification  # it loads what corrupts images

    said = f"{part['data']} (n = {part['n']}), {part['threat_model']}, {part['attack']}"
    return "\n\n".join([f"{said}:", piped(*purification.table(part["rows"])), *part["advice"]])


def fenced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the two comment lines of `name`; ValueError without those."""
    first = f"<!-- {name}: made by `rampart table`, do not edit -->"
    last = f"<!-- end of {name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"the text needs one line {first!r} and, below it, one {last!r}")
    head, rest = text.split(first)
    return f"{head}{first}\n\n{content}\n\n{last}{rest.split(last)[1]}"
