"""The report page: one HTML file that shows what an evaluation found, and needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rampart.hardening.judge.evaluate import Evaluation
from rampart.hardening.model.card import Figure, Row, Subject
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.report.appendix import alarms, outside_threat, parts, recipe, self_checks
from rampart.hardening.report.elements import Section
from rampart.hardening.report.images import Pictures, classes, features, gallery, grid
from rampart.hardening.report.ladder import headline, ladder, main_bars, over_eps, verdict
from rampart.hardening.report.rejection import detection, rejection, suspicion
from rampart.hardening.report.summary import measured, tiles

__all__ = ["Pictures", "gallery", "template", "write"]


def write(
    path: Path,
    card: Row,
    rows: Sequence[Row],
    evaluation: Evaluation,
    pipeline: DefendedClassifier | None,
    *,
    pictures: Pictures | None,
    served: Subject | None = None,
) -> Path:
    """Write the page to `path`; `rows` are its metrics, and only `pictures` puts images into it.
    `served` is what is served by default; without it the variant of `pipeline` in fp32. Without a
    `pipeline` it is about a bare classifier.
    """
    figures = [Figure.of(row) for row in rows]
    served = served or served_of(pipeline)
    who = measured(evaluation, served)
    texts = {"model": card.get("model", path.stem), "data": figures[0].data if figures else ""}
    html = template().render(
        texts,
        evaluation=evaluation,
        tiles=tiles(figures, evaluation, served, who),
        bars=main_bars(figures, evaluation),
        verdict=[*verdict(figures, evaluation, who), *how(card)],
        failed=[check for check in evaluation.checks if not check.passed],
        sections=sections_of(card, figures, evaluation, pipeline, pictures=pictures),
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
    return Subject("pipeline", "full" if pipeline.purifier else "lean")


def sections_of(
    card: Row,
    figures: Sequence[Figure],
    evaluation: Evaluation,
    pipeline: DefendedClassifier | None,
    *,
    pictures: Pictures | None,
) -> list[Section]:
    """All below the summary: what people look at first, and the tables last."""
    return [
        *grid(evaluation, pipeline, pictures),
        *over_eps(figures, evaluation),
        *classes(evaluation, pipeline),
        *headline(figures, evaluation),
        *parts(card),
        *rejection(evaluation),
        *detection(figures, evaluation),
        *suspicion(evaluation),
        *features(evaluation, pipeline),
        *alarms(card),
        *outside_threat(card),
        *self_checks(evaluation.checks),
        *ladder(figures, evaluation),
        recipe(card, evaluation),
    ]


def template(name: str = "page.html") -> Template:
    """A page without its content; it escapes the names of models and classes."""
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    return pages.get_template(name)
