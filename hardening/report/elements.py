"""What the sections of the page are made of, and how they say a figure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.ladder import in_8_bits
from rampart.hardening.judge.evaluate import Evaluation, Record, Replay, Rung
from rampart.hardening.judge.metrics import wilson
from rampart.hardening.model.arrays import Bools
from rampart.hardening.model.card import Figure
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.report.plots import Shares

# What figures are called, by the first part of their names, beside the rungs of the ladder.
TITLES = {
    "clean": "clean accuracy",
    "clean_rejection": "clean images rejected",
    "transfer": "images made against the twin",
    "square": "Square attack",
    "robust": "worst case, label right",
    "robust_with_rejection": "worst case, right or rejected",
    "accepted_and_wrong": "worst case, accepted and wrong",
    "gain_over_max_softmax": "gain over max-softmax",
    "gain_over_classifier": "gain over the classifier",
    "stratified": "worst case, rejections count",
    "tpr": "TPR",
    "caught": "wrong images caught",
    "auroc": "AUROC",
    "forced_rejection": "attack on the detectors",
}
# What stands behind the first part of a figure's name, beside the rungs of the ladder.
MEANINGS = {
    "clean_rejection": "clean images rejected",
    "clean": "label right on clean images",
    "transfer": "label right on images made against the undefended twin",
    "robust_with_rejection": "right or rejected in the worst case",
    "square": "label right after a random search that sees answers alone",
    "robust": "label right in the worst case",
    "accepted_and_wrong": "accepted and wrong in the worst case",
    "gain_over_max_softmax": "gain over rejecting low confidence, at the same clean rejection",
    "gain_over_classifier": "gain over the bare classifier, which rejects nothing",
    "stratified": "right or rejected in the worst case, rejected only beyond this part of eps",
    "tpr": "wrong attacked images caught where this share of clean ones is flagged",
    "caught": "wrong images rejected under the joint attack",
    "auroc": "area under the ROC curve, wrong attacked images against clean ones",
}
# What self-checks are called: what is so where they pass.
CHECKS = {
    "zero_gradients": "labels give gradients",
    "zero_detector_gradients": "detectors give gradients",
    "randomness": "the same answer twice",
    "logits": "outputs are logits",
    "more_steps": "more steps find no fewer",
    "larger_eps": "a larger eps finds no fewer",
    "black_box": "gradients beat a black box",
    "adaptive": "detectors stop more than static attacks",
    "weak_joint": "the joint attack is no weaker",
    "detector_slope": "gradients of detectors lead down",
    "consistency_slope": "gradients of consistency lead down",
    "consistency_step": "the step of consistency lowers the margin",
    "smoothed_gradients": "averaged gradients find no more",
}
STATIC, JOINT = "pgd20", "joint_apgd"


class Drawing(NamedTuple):
    """A drawing as a data URI, with its text for those who do not see it."""

    source: str
    alt: str
    caption: str


class Table(NamedTuple):
    """The first cell of a row is its heading; what is `folded` opens when it is asked for."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    folded: bool = False


class Section(NamedTuple):
    """One part of the page; each of `grid` is a row of pictures."""

    name: str
    words: Sequence[str]
    figures: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    grid: Sequence[Sequence[Drawing]] = ()


def pick(rows: Sequence[Figure], name: str, who: str) -> Figure | None:
    """The figure of a victim that is called `name`, with whatever may follow an @."""
    mine = (row for row in rows if row.subject.name == who)
    return next((row for row in mine if name in (row.name, row.name.partition("@")[0])), None)


def meaning(name: str) -> str:
    """A metric's name in words."""
    every = MEANINGS | {attack.name: attack.meaning for attack in rungs.RUNGS}
    starts = [start for start in every if name.startswith(start)]
    return every[max(starts, key=len)] if starts else ""


def title(name: str) -> str:
    """What a metric is called on the page: name[@where][:attack] is how the card spells it."""
    attacks = {attack.name: attack.title for attack in rungs.RUNGS if attack.title}
    whole, _, attack = name.partition(":")
    start, _, place = whole.partition("@")
    text = (attacks | TITLES).get(start, start)
    if start == "stratified":
        text += f" beyond {place.removesuffix('eps')} eps"
    elif place:
        text += f"@{place.upper()}" if start == "tpr" else f" at {place}"
    return f"{text}, {attacks.get(attack, attack).partition(',')[0]}" if attack else text


def in_words(row: Figure) -> tuple[str, str]:
    """A figure and its 95% interval, as people read a share, a difference or an area."""
    low, high = row.interval
    if row.name.startswith("auroc"):
        return f"{row.value:.3f}", f"{low:.3f} to {high:.3f}"
    if row.name.startswith("gain"):
        return f"{100 * row.value:+.1f} points", f"{100 * low:+.1f} to {100 * high:+.1f}"
    return f"{row.value:.1%}", f"{low:.1%} to {high:.1%}"


def both(row: Figure | None, *, between: str = " ") -> str:
    """A figure with its interval; a dash where there is none."""
    if row is None:
        return "-"
    value, interval = in_words(row)
    return f"{value}{between}({interval})"


def own(record: Record, name: str) -> tuple[Rung, Replay] | None:
    """The attack called `name` on this victim at full eps, where there was one."""
    return next(reversed(record.attacks(name)), None)


def attacked(evaluation: Evaluation | None, pipeline: DefendedClassifier | None) -> Tensor | None:
    """Evaluated images uint8 (N, H, W, 3) under the joint attack on a pipeline, else PGD-20."""
    found = (under(evaluation, pipeline, name) for name in (JOINT, STATIC))
    return next((pixels for pixels in found if pixels is not None), None)


def under(
    evaluation: Evaluation | None, pipeline: DefendedClassifier | None, attack: str
) -> Tensor | None:
    """Evaluated images uint8 (N, H, W, 3) under an attack on a pipeline, where there was one."""
    record = record_of(evaluation, pipeline)
    if not (record and evaluation and evaluation.attempts and (mine := own(record, attack))):
        return None
    x = next(item.x for item in evaluation.attempts if item.rung is mine[0])
    return in_8_bits(x, evaluation.images.image, mine[0].threat)


def record_of(evaluation: Evaluation | None, pipeline: DefendedClassifier | None) -> Record | None:
    """What happened to a pipeline, or to a classifier without one, where it was evaluated."""
    if evaluation is None:
        return None
    if pipeline is None:
        return evaluation.records.get("classifier")
    return evaluation.records.get(f"pipeline {pipeline.variant}")


def pipelines(evaluation: Evaluation | None) -> list[Record]:
    """What happened to each variant of the pipeline."""
    every = evaluation.records.values() if evaluation else []
    return [record for record in every if record.victim.subject.kind == "pipeline"]


def listed(name: str, places: Sequence[float], rows: Sequence[Figure]) -> Shares:
    """The figures of `rows`, each at its place."""
    low, high = np.array([row.interval for row in rows]).T
    return Shares(name, np.array(places), np.array([row.value for row in rows]), low, high)


def counted(name: str, places: Sequence[float], held: Sequence[Bools]) -> Shares:
    """The shares of images that each of `held` holds, each at its place."""
    value = np.array([images.mean() for images in held])
    low, high = np.array([wilson(images.mean(), len(images)) for images in held]).T
    return Shares(name, np.array(places), value, low, high)
