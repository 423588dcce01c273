"""What a red team achieved, in a line an attack and as a picture; and the run itself."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rampart.hardening.attack.redteam import ATTACKS, Endpoint, Outcome, read, redteam
from rampart.hardening.attack.redteam.probe import Floats
from rampart.hardening.attack.redteam.run import require
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.card import Row, cell_text, read_card
from rampart.hardening.report.card import add_to_card, log_evaluation
from rampart.hardening.report.elements import Table

__all__ = [
    "ATTACKS", "Endpoint", "by_attack", "curve", "in_words", "into_card", "picture", "read",
    "redteam", "summary", "tables", "told",
]  # fmt: skip


def by_attack(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each attack, attacks in the order of ATTACKS."""
    groups = {name: [o for o in outcomes if o.attack == name] for name in ATTACKS}
    return {name: group for name, group in groups.items() if group}


# What a newer row of the card replaces.
SAME = ("attack", "eps", "queries", "target", "data")


def into_card(
    folder: Path, outcomes: Sequence[Outcome], classes: Sequence[str], *, data: str, command: str
) -> list[Row]:
    """Put what each attack achieved into a model's card, and into its log; returns these rows.

    Raises ValueError, and writes nothing, where the endpoint named another model.
    """
    card, model = read_card(folder), outcomes[0].settings.model
    if model and model != card["model"]:
        raise ValueError(
            f"the endpoint serves {model}, and {folder} is {card['model']}: pass --into-card the"
            " folder of the model that was attacked (nothing is asked again)"
        )
    rows = [
        row_of(name, group, classes) | {"data": data, "command": command}
        for name, group in by_attack(outcomes).items()
    ]
    new = [[row.get(name) for name in SAME] for row in rows]
    old = [row for row in card.get("redteam", []) if [row.get(n) for n in SAME] not in new]
    add_to_card(folder, {"redteam": [*old, *rows]})
    log_evaluation(folder, {"data": data, "n": rows[0]["n"], "command": command})
    return rows


def row_of(name: str, outcomes: Sequence[Outcome], classes: Sequence[str]) -> Row:
    """An attack as the card lists it: the share of images that fooled, wrong when clean or not."""
    settings, n = outcomes[0].settings, len(outcomes)
    value = sum(o.success is not None for o in outcomes) / n
    share = {"value": round(value, 6), "interval": [round(end, 4) for end in wilson(value, n)]}
    budget = {"eps": f"{settings.eps}/255", "queries": settings.budget}
    target = {} if settings.target is None else {"target": classes[settings.target]}
    return {"attack": name, "fooled": share, "n": n} | budget | target


def in_words(row: Row) -> str:
    """A row of the card with all that belongs to it, but for its command."""
    target = f" towards {row['target']}" if "target" in row else ""
    return (
        f"{row['attack']}{target}: {cell_text(row['fooled'])} of images fooled, n = {row['n']},"
        f" Linf {row['eps']}, up to {row['queries']:,} queries an image"
    )


def tables(card: Row) -> Iterator[Table]:
    """The table of a card's rows, if it has any."""
    if attacked := card.get("redteam"):
        yield Table(
            "Black-box attacks on the running endpoint",
            ("data", "what was measured", "command"),
            [(row["data"], in_words(row), row["command"]) for row in attacked],
        )


READ = {
    "probabilities": "probabilities",
    "logits": "logits, or scores that do not sum to 1: attacks follow their softmax",
    "a confidence": "a label with its confidence: the rest is spread evenly over other classes",
    "labels": "labels alone, which Square, SimBA and OARS cannot follow",
}


def told(endpoint: Endpoint) -> list[str]:
    """What the endpoint's answers are, where they are not Rampart's."""
    kind = endpoint.reading.kind
    return [f"{endpoint.url} answers with {READ[kind]}"] if kind else []


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line of text an attack: images, share fooled with its interval, queries, distance."""
    return "\n".join(_line(name, group) for name, group in by_attack(outcomes).items())


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    n, clean = len(outcomes), sum(o.clean_wrong for o in outcomes)
    needed = [o.success for o in outcomes if o.success is not None and not o.clean_wrong]
    share = (clean + len(needed)) / n
    low, high = wilson(share, n)
    noticed = [o.noticed for o in outcomes if o.noticed is not None]
    distances = [o.distance for o in outcomes if o.distance is not None and not o.clean_wrong]
    line = (
        f"{name:12} {share:.1%} of {n} images fooled ({low:.1%} to {high:.1%}): {clean} wrong when"
        f" clean, {len(needed)} by the attack"
    )
    if needed:
        line += f" after {median(needed):g} queries (median)"
    if distances:
        line += f"; nearest at {min(distances)}/255, median {median(distances):g}/255"
    if noticed:
        line += f"; noticed on {len(noticed)}, at query {median(noticed):g} (median)"
    return line


# Colours of Okabe and Ito (2008), and a mark for each, for print without colour.
LOOKS = {
    "square": ("#0072B2", "o"),
    "simba": ("#D55E00", "s"),
    "hopskipjump": ("#009E73", "^"),
    "boundary": ("#CC79A7", "D"),
    "oars": ("#E69F00", "v"),
}
STROKES = ("-", "--", ":", "-.")


def picture(results: Mapping[str, Sequence[Outcome]], path: Path) -> Path:
    """Draw the share of images fooled against queries, as a PNG 1,000 pixels wide, a colour an
    attack, a stroke a run. Raises ValueError for a run without outcomes, or runs of unlike eps.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    empty = [run for run, outcomes in results.items() if not outcomes]
    if empty or not results:
        raise ValueError(f"nothing to draw: no outcomes in {', '.join(empty) or 'no run'}")
    eps = {outcome.settings.eps for outcomes in results.values() for outcome in outcomes}
    if len(eps) != 1:
        raise ValueError(f"cannot draw runs with different eps {sorted(eps)} in one picture")
    figure = Figure(figsize=(10, 5.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for (run, outcomes), stroke in zip(results.items(), cycle(STROKES), strict=False):
        for name, group in by_attack(outcomes).items():
            _draw(axes, name, group, stroke=stroke, label=f"{name}, {run}")
    sizes = {len(g) for outcomes in results.values() for g in by_attack(outcomes).values()}
    span = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
    axes.set_title(f"Black-box attacks within Linf {eps.pop()}/255, n = {span} images")
    axes.set(xlabel="queries per image (1: the image itself, unattacked)", xscale="log")
    axes.set(ylabel="images accepted under a wrong label", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", handlelength=3.5)
    figure.savefig(path, format="png")
    return path


def _draw(axes: Any, name: str, outcomes: Sequence[Outcome], *, stroke: str, label: str) -> None:
    """One attack's curve; marks are staggered, so that curves which coincide still show."""
    colour, mark = LOOKS[name]
    every = ((list(LOOKS).index(name) + 1) / 40, 0.1)
    style = {"marker": mark, "markersize": 7, "markevery": every, "drawstyle": "steps-post"}
    axes.plot(*curve(outcomes), stroke, color=colour, label=label, **style)


def curve(outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
    """(queries, share of the images that some query up to there fooled), from 1 to the budget."""
    budget = outcomes[0].settings.budget
    queries = np.unique(np.geomspace(1, budget, 400).round())
    solved = np.sort([o.success for o in outcomes if o.success is not None])
    return queries, np.searchsorted(solved, queries, side="right") / len(outcomes)
