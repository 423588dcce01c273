"""The box at the top of the page: what is served, and the few figures that matter most."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rampart.hardening.model.card import Figure, Subject
from rampart.hardening.report import plots
from rampart.hardening.report.elements import in_words, pick
from rampart.hardening.report.findings import Findings
from rampart.hardening.report.ladder import worst_of


class Tile(NamedTuple):
    """One fact: what it is, its value in large letters, and what belongs beside it."""

    label: str
    value: str
    note: str = ""
    bad: bool = False


def measured(findings: Findings, served: Subject) -> str:
    """The victim that stands for what is served: itself, else its fp32 form, else any pipeline."""
    names = (served.name, Subject("pipeline", served.variant).name)
    every = (*names, *findings.pipelines, "classifier")
    return next((name for name in every if name in findings.names), served.name)


def tiles(rows: Sequence[Figure], findings: Findings, served: Subject, who: str) -> Iterator[Tile]:
    """What is `served`, by the figures of `who`, with the undefended twin as a control."""
    if served.kind == "pipeline":
        note = "" if who == served.name else f"figures of {plots.title(who)}"
        yield Tile("served by default", served.title, note)
    threat = str(findings.threat)
    for label, figure, beside in (
        ("right on clean images", pick(rows, "clean", who), ""),
        ("right under attack", worst_of(rows, who), f"{findings.worst}, {threat}"),
        ("undefended twin under attack", worst_of(rows, "undefended"), f"worst case, {threat}"),
        ("clean images rejected", pick(rows, "clean_rejection", who), ""),
    ):
        if figure:
            value, interval = in_words(figure)
            where = f"{interval}, n = {figure.n}"
            yield Tile(label, value, f"{where}; {beside}" if beside else where)
    if checks := findings.checks:
        passed = sum(check.passed for check in checks)
        text = f"{passed} of {len(checks)}"
        yield Tile("self-checks passed", text, "", passed < len(checks))
