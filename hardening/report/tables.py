"""A card's figures as tables: text for the terminal, Markdown for README."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rampart.hardening.attack import ladder
from rampart.hardening.model.card import Card, Figure, Subject

# The rows that README shows of a card.
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
MODELS = ("model", "network", "weights", "training", "clean accuracy", "standard AutoAttack")

Lowest = dict[tuple[Subject, str], Figure]  # the lowest figure of a subject under a name


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The metrics of a card as an aligned text table."""
    lines = [("subject", "variant", "figure", "threat", "value", "95% interval", "n")]
    for figure in map(Figure.of, rows):
        low, high = figure.interval
        who = (figure.subject.text, figure.subject.variant, figure.name, figure.threat or "-")
        lines.append((*who, f"{figure.value:.1%}", f"{low:.1%} to {high:.1%}", str(figure.n)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def markdown(card: dict[str, Any]) -> str:
    """The card's main figures under its threat model and at the usual rate of false alarms, one
    Markdown table for each data set.

    Where a figure was made by several attacks, the lowest counts; an attack of a later evaluation
    can leave fewer than the worst case of an earlier one, and then counts there too.
    """
    typed = Card(card)
    tables: dict[str, Lowest] = {}
    for figure in typed.main_figures():
        title = f"{figure.data} (n = {figure.n}), {typed.threat_model}"
        lowest, key = tables.setdefault(title, {}), (figure.subject, figure.name)
        if key not in lowest or figure.value <= lowest[key].value:
            lowest[key] = figure
    parts = {title: one_table(worst_cases(lowest)) for title, lowest in tables.items()}
    return "\n\n".join(f"{title}:\n\n{text}" for title, text in parts.items() if text)


def columns() -> dict[str, str]:
    """The columns that README shows of a card: title and figure."""
    return {
        "clean accuracy": "clean",
        "clean rejection": "clean_rejection",
        **{attack.title: attack.name for attack in ladder.RUNGS if attack.title},
        "worst case, label right": "robust",
        "worst case, right or rejected": "robust_with_rejection@1%",
    }


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
    shown = {title: name for title, name in columns().items() if name in names}
    body = []
    for subject, title in SUBJECTS.items():
        found = [lowest.get((subject, name)) for name in shown.values()]
        if any(found):
            body.append([title, *(figure.cell if figure else "-" for figure in found)])
    return piped(["", *shown], body) if body else ""


def piped(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(" ".join(f"| {cell}".rstrip() for cell in line) + " |" for line in lines)


def model_table(folders: Sequence[Path]) -> str:
    """The models side by side as a Markdown table: network, size, training, main figures."""
    return piped(MODELS, [model_cells(folder, Card.load(folder)) for folder in folders])


def model_cells(folder: Path, card: Card) -> list[str]:
    """One line of `model_table`; of several figures that of most images."""
    net, runs = card.content["classifier"], card.history
    width = f" x {net['width']:g}" if net["width"] != 1 else ""
    size = (folder / "weights.safetensors").stat().st_size / 1e6
    epochs, minutes = sum(map(len, runs)), sum(run[-1]["minutes"] for run in runs)
    training = f"{epochs} epochs, {minutes / 60:.1f} h" if runs else "-"
    out = [f"`{folder.name}`", net["arch"] + width, f"{size:.1f} MB", training]
    for wanted in (("clean", None), ("autoattack", "AutoAttack, standard")):
        same = [
            figure
            for figure in card.main_figures()
            if figure.subject.kind == "classifier" and (figure.name, figure.attack) == wanted
        ]
        best = max(same, key=lambda figure: figure.n, default=None)
        out.append(counted(best) if best else "-")
    return out


def counted(figure: Figure) -> str:
    """A figure with its interval, its images and its threat."""
    threat = f", {figure.threat}" if figure.threat else ""
    return f"{figure.cell}, n = {figure.n}{threat}"


def with_tables(text: str, folders: Sequence[Path]) -> str:
    """`text` with its fenced parts made anew: "models" of all folders, "figures" of the first."""
    text = fenced(text, "models", model_table(folders))
    return fenced(text, "figures", markdown(Card.load(folders[0]).content))


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
