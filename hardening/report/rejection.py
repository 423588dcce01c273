"""The sections on rejecting: what a threshold trades, and how well detectors tell."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rampart.hardening.judge.evaluate import Evaluation, Record
from rampart.hardening.judge.metrics import roc
from rampart.hardening.model.arrays import Floats
from rampart.hardening.model.card import Figure
from rampart.hardening.report import elements, plots
from rampart.hardening.report.elements import JOINT, STATIC, Drawing, Section, Table, both, pick
from rampart.hardening.report.plots import Curve

# Columns of the table of detection: figure and attack.
DETECTED = (("caught", JOINT), ("tpr@1%fpr", STATIC), ("tpr@5%fpr", STATIC), ("auroc", STATIC))


def sweep(clean: Floats, wrong: Floats) -> tuple[Floats, Floats]:
    """Shares of `clean` (N,) that each threshold flags, and how many of `wrong` (M,) it flags."""
    if not len(wrong):
        return np.array([0.0, 1.0]), np.zeros(2)
    flagged, caught = roc(clean, wrong)
    return flagged, caught * len(wrong)


def rejection(evaluation: Evaluation | None) -> Iterator[Section]:
    """What a moving threshold trades."""
    figures = []
    for record in elements.pipelines(evaluation):
        plain = replace(record.victim.subject, kind="max_softmax").name
        kinds = [record, evaluation.records.get(plain) if evaluation else None]
        if every := [kind for kind in kinds if kind and elements.own(kind, JOINT)]:
            figures.append(rejection_figure(every))
    if figures:
        words = [
            "An image is lost when its label is wrong and it is accepted. A lower threshold rejects"
            " more of these, and more clean images. Max-softmax, the plain alternative, rejects low"
            " confidence.",
            "Each joint attack was made against the operating threshold (the marker). Elsewhere on"
            " its curve the attacker did not know the threshold, so the curve flatters the defence"
            " there.",
        ]
        yield Section("Rejection", words, figures)


def rejection_figure(every: Sequence[Record]) -> Drawing:
    """Accepted and wrong over clean rejection, with each victim's operating point."""
    curves, marks = [], []
    for record in every:
        after = record.own(JOINT)[1]
        wrong = ~after.right
        score = after.deployed.suspicion[wrong]
        rate, flagged = sweep(record.clean.deployed.suspicion, score)
        curves.append(Curve(record.victim.name, rate, (len(score) - flagged) / len(wrong)))
        rejected = (~record.clean.deployed.accepted).mean()
        lost = (wrong & after.deployed.accepted).mean()
        marks.append(Curve(record.victim.name, np.array([rejected]), np.array([lost])))
    points = " ".join(
        f"{plots.title(s.name)} rejects {s.x[0]:.1%} of clean images and accepts {s.y[0]:.1%} of"
        " the attacked ones with a wrong label."
        for s in marks
    )
    source = plots.over_rate(curves, marks, y_label="accepted and wrong")
    alt = f"Curves of accepted and wrong images over clean rejection. At the markers: {points}"
    return Drawing(source, alt, f"{every[0].victim.subject.title} under its joint attack. {points}")


def detection(rows: Sequence[Figure], evaluation: Evaluation | None) -> Iterator[Section]:
    """How well suspicion alone tells wrong images from clean ones."""
    figures, body = [], []
    for record in elements.pipelines(evaluation):
        who, mine = record.victim.name, elements.own(record, STATIC)
        if not mine or not (wrong := record.clean.right & mine[1].fooled).any():
            continue
        clean, score = record.clean.deployed.suspicion, mine[1].deployed.suspicion[wrong]
        curve = Curve(STATIC, *roc(clean, score))
        source = plots.over_rate([curve], [], y_label="wrong images flagged")
        name = plots.title(who)
        alt = f"ROC curve of {name}; the table below holds its main points."
        figures.append(Drawing(source, alt, f"{name}: receiver operating curve."))
        cells = [pick(rows, f"{figure}:{attack}", who) for figure, attack in DETECTED]
        body.append((name, str(len(score)), *map(both, cells)))
    if figures:
        head = ("victim", "wrong images", "caught jointly", "TPR at 1%", "TPR at 5%", "AUROC")
        words = [
            "Positives are images whose label PGD-20 made wrong, negatives clean images. PGD-20 is"
            " static: it ignores the detectors. What counts is the share of wrong images caught"
            " under the joint attack, which deceives them too; since it stops at the threshold, it"
            " has no curve. The vertical lines stand at false-positive rates of 1% and 5%."
        ]
        table = Table("Detection of wrong images with 95% interval", head, body)
        yield Section("Detectors", words, figures, [table])


def suspicion(evaluation: Evaluation | None) -> Iterator[Section]:
    """Where the scores of clean and attacked images lie."""
    figures = []
    for record in elements.pipelines(evaluation):
        scores = {"clean": record.clean.deployed.suspicion}
        for name in (STATIC, JOINT):
            if mine := elements.own(record, name):
                scores[name] = mine[1].deployed.suspicion
        medians = ", ".join(f"{plots.title(n)} {np.median(s):.2f}" for n, s in scores.items())
        source = plots.histogram(scores, threshold(record))
        caption = f"{record.victim.subject.title}: suspicion of all images. Medians: {medians}."
        figures.append(Drawing(source, f"Histogram. {caption}", caption))
    if figures:
        words = ["Suspicion adds up all detectors; what lies right of the line is rejected."]
        yield Section("Suspicion", words, figures)


def threshold(record: Record) -> float | None:
    """The least suspicion that was rejected; None where nothing was."""
    every = [record.clean.deployed, *(after.deployed for _, after in record.under)]
    rejected = np.concatenate([answer.suspicion[~answer.accepted] for answer in every])
    return float(rejected.min()) if np.isfinite(rejected).any() else None
