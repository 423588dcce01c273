"""ONNX files of whatever origin side by side, by what they withstand."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from rampart.handlers.engine import sha256
from rampart.hardening.model.card import Figure, Row
from rampart.hardening.model.scaling import NAMES
from rampart.hardening.report import card as report
from rampart.onnx_study import BLIND, Described, beside, evaluate
from rampart.studies import Outcome, Study

TABLE = "table.md"  # in the folder of the files
COLUMNS = ("rank", "file", "pixels", "clean accuracy", "robust accuracy", "attacked", "SHA-256")


def compare(
    folder: Path,
    images: Path,
    study: Study,
    *,
    described: Described = Described(),  # noqa: B008
    limit: int | None = None,
    rungs: list[str] | None = None,
    notice: Callable[[str], object] = str,
) -> Outcome:
    """`evaluate` each ONNX file of a folder; write their table, the most robust first, into it.

    A range that is not `described` is that of a file's earlier figures, else found. A file that is
    refused stands there with the reason. Raises ValueError where all are.
    """
    cards, refused = dict[str, Row](), dict[str, str]()
    measure = partial(evaluate, limit=limit, rungs=rungs, notice=notice)
    for path in sorted(folder.glob("*.onnx")):
        notice(path.name)
        try:
            outcome = measure(path, images, study, described=described_of(path, described))
        except ValueError as error:
            refused[path.name] = str(error)
            notice(f"refused: {error}")
        else:
            cards[path.name] = outcome.card
            notice("\n".join(outcome.lines))
    if not cards:
        raise ValueError(f"{folder}: no file was evaluated: {'; '.join(refused.values())}")
    text = table_of(cards, refused)
    (folder / TABLE).write_text(f"{text}\n")
    checks = [
        check | {"name": f"{name}, {check['name']}"}
        for name, card in cards.items()
        for check in card["checks"]
    ]
    return Outcome({}, [text, str(folder / TABLE)], {"checks": checks})


def described_of(path: Path, described: Described) -> Described:
    """`described`, with the range that the same file was evaluated with before."""
    with suppress(OSError, ValueError, KeyError):  # no figures, or of others
        content = json.loads(beside(path).read_text())
        if described.range is None and content["sha256"] == {path.name: sha256(path)}:
            (name,) = [n for n in NAMES if content["input"]["range"].startswith(n)]
            return described._replace(range=name)
    return described


def table_of(cards: dict[str, Row], refused: dict[str, str]) -> str:
    """Files side by side as Markdown, as RobustBench ranks models (Croce et al. 2021): by accuracy
    under attack. A black box has no rank, since its figure is only a bound.
    """
    every = {name: [Figure.of(row) for row in card["metrics"]] for name, card in cards.items()}
    least = {name: robust_of(figures) for name, figures in every.items()}
    ranked = sorted(every, key=lambda name: (is_bound(least[name]), -least[name].value))
    body = [
        line_of(cards[name], every[name][0], least[name], place, name)
        for place, name in enumerate(ranked, 1)
    ]
    data, threat = every[ranked[0]][0].data, cards[ranked[0]]["threat_model"]
    first = f"{data} (n = {every[ranked[0]][0].n}), {threat}. Files whose intervals overlap may"
    first += " stand in either order."
    if any(map(is_bound, least.values())):
        first += f" A black box has an upper bound and no rank: the attacker {BLIND}."
    lines = [f"- {name} was refused: {why}" for name, why in refused.items()]
    return "\n\n".join(filter(None, [first, report.piped(COLUMNS, body), "\n".join(lines)]))


def robust_of(figures: Sequence[Figure]) -> Figure:
    """The worst case, or the least that an attack left where there is none."""
    attacked = [figure for figure in figures if figure.eps]
    return min(attacked, key=lambda figure: (figure.name != "robust", figure.value))


def is_bound(figure: Figure) -> bool:
    """Whether attacks with gradients were not tried."""
    return figure.name == "square"


def line_of(card: Row, clean: Figure, least: Figure, place: int, name: str) -> list[str]:
    """A file's line in the table."""
    bound = is_bound(least)
    failed = "; a self-check FAILED" if report.failed_checks(card) else ""
    how = f"{'black box' if bound else 'by gradients'}, {least.attack}{failed}"
    robust = f"at most {least.cell}" if bound else least.cell
    cells = [name, str(card["input"]["size"]), clean.cell, robust, how]
    return ["-" if bound else str(place), *cells, f"`{next(iter(card['sha256'].values()))[:12]}`"]
