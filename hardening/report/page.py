"""The report page: one HTML file that shows what an evaluation found, and needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rampart.hardening.judge.evaluate import Evaluation
from rampart.hardening.model.card import Figure, Row, Subject, read_card
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.report.appendix import (
    alarms,
    in_short,
    outside_threat,
    over_http,
    parts,
    purifier,
    recipe,
    self_checks,
)
from rampart.hardening.report.card import measured_on
from rampart.hardening.report.elements import Section
from rampart.hardening.report.findings import Findings, of_card
from rampart.hardening.report.images import Pictures, classes, features, gallery, grid, small_step
from rampart.hardening.report.ladder import headline, ladder, main_bars, over_eps, verdict
from rampart.hardening.report.rejection import detection, rejection, suspicion
from rampart.hardening.report.summary import measured, tiles

__all__ = ["Pictures", "gallery", "template", "write", "write_from_card"]
FROM_CARD = "Written from the card: pictures and curves that need the attacked images are left out."


def write(
    path: Path,
    card: Row,
    rows: Sequence[Row],
    evaluation: Evaluation,
    pipeline: DefendedClassifier | None,
    *,
    pictures: Pictures | None,
    served: Subject | None = None,
    date: str = "",
) -> Path:
    """Write the page to `path`; `rows` are its metrics, and only `pictures` puts images into it.
    `served` is what is served by default; without it the variant of `pipeline` in fp32. Without a
    `pipeline` it is about a bare classifier. `date` is the day of the evaluation.
    """
    figures = [Figure.of(row) for row in rows]
    found = Content(card, figures, Findings.of(evaluation), served or served_of(pipeline), date)
    return render(path, found, sections_of(found, evaluation, pipeline, pictures))


def write_from_card(folder: Path, served: Subject) -> Path:
    """Write report.html of a model folder by what its card has, without curves by image.

    Raises ValueError where the card has no figures of a classifier.
    """
    card = read_card(folder)
    findings, figures = of_card(card)
    date = measured_on(folder, figures[0].data)
    found = Content(card, figures, findings, served, date, note=FROM_CARD)
    return render(folder / "report.html", found, sections_of(found, None, None, None))


class Content(NamedTuple):
    """What a page tells, beside images."""

    card: Row
    figures: list[Figure]
    findings: Findings
    served: Subject
    date: str
    note: str = ""


def render(path: Path, found: Content, sections: list[Section]) -> Path:
    """Write a page: the summary above its `sections`."""
    card, figures, findings, served, date, note = found
    who = measured(findings, served)
    texts = {"model": card.get("model", path.stem), "data": figures[0].data if figures else ""}
    html = template().render(
        texts,
        findings=findings,
        tiles=tiles(figures, findings, served, who),
        date=date,
        bars=main_bars(figures, findings),
        verdict=[*verdict(figures, findings, who), *how(card), *filter(None, [note])],
        failed=[f"{'; '.join(in_short(c))}: {c.seen}" for c in findings.checks if not c.passed],
        sections=sections,
    )
    path.write_text(html, encoding="utf-8")
    return path


def how(card: Row) -> list[str]:
    """What an ONNX file takes, and how it could be attacked; of a model there is nothing to say."""
    if "attacked" not in card:
        return []
    entry = card["input"]
    takes = f"It takes {entry['layout']}, {entry['size']} pixels a side; range {entry['range']}."
    return [takes, f"It was attacked {card['attacked']}."]


def served_of(pipeline: DefendedClassifier | None) -> Subject:
    """The subject that a pipeline is, or a bare classifier."""
    if pipeline is None:
        return Subject("classifier")
    return Subject("pipeline", pipeline.variant)


def sections_of(
    found: Content,
    evaluation: Evaluation | None,
    pipeline: DefendedClassifier | None,
    pictures: Pictures | None,
) -> list[Section]:
    """All below the summary: what people look at first, and the tables last. What needs images is
    left out without an `evaluation`.
    """
    card, figures, findings, *_ = found
    return [
        *grid(evaluation, pipeline, pictures),
        *over_eps(figures, findings, evaluation),
        *classes(evaluation, pipeline),
        *headline(figures, findings),
        *parts(card),
        *rejection(evaluation),
        *detection(figures, evaluation),
        *suspicion(evaluation),
        *small_step(evaluation, pipeline),
        *features(evaluation, pipeline),
        *alarms(card),
        *outside_threat(card),
        *over_http(card),
        *purifier(card),
        *self_checks(findings.checks),
        *ladder(figures, findings),
        recipe(card, findings),
    ]


def template(name: str = "page.html") -> Template:
    """A page without its content; it escapes the names of models and classes."""
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    return pages.get_template(name)
