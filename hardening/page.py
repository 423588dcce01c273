"""The report page: one HTML file that shows what an evaluation found, and needs nothing else.

A section is left out where the evaluation did not see what it is about. No pixel of an evaluated
image enters a page unless the caller passes it as `pictures`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor

from hardening import ablation, outside, plots
from hardening.alarms import in_words
from hardening.alarms import table as alarm_table
from hardening.attacks import Threat
from hardening.checks import Check
from hardening.data import to_float
from hardening.evaluate import Evaluation, Record, Replay, Rung
from hardening.metrics import Bools, Floats, wilson
from hardening.pipeline import DefendedClassifier
from hardening.plots import Curve, Shares
from hardening.rungs import in_8_bits
from hardening.victims import GRAPH, batches_of, plain_subject

Row = dict[str, Any]  # a metric as `report.row` makes it

# What stands behind the first part of a metric's name.
MEANINGS = {
    "clean_rejection": "clean images rejected",
    "clean": "label right on clean images",
    "pgd20": "label right under PGD-20",
    "autoattack_short": "label right under a part of AutoAttack",
    "autoattack": "label right under AutoAttack",
    "transfer": "label right on images made against the undefended twin",
    "robust_with_rejection": "right or rejected in the worst case",
    "robust": "label right in the worst case",
    "joint_apgd": "right or rejected under the joint attack",
    "accepted_and_wrong": "accepted and wrong in the worst case",
    "gain_over_max_softmax": "gain over rejecting low confidence, at the same clean rejection",
    "gain_over_classifier": "gain over the bare classifier, which rejects nothing",
    "forced_rejection": "rejected under an attack on the detectors alone",
    "stratified": "right or rejected in the worst case, rejected only beyond this part of eps",
    "tpr": "wrong attacked images caught where this share of clean ones is flagged",
    "caught": "wrong images rejected under the joint attack",
    "auroc": "area under the ROC curve, wrong attacked images against clean ones",
}
MAIN = ("pgd20", "autoattack", "transfer", "robust", "joint_apgd")
STATIC, JOINT = "pgd20", "joint_apgd"
QUARTER = "stratified@0.25eps"
EMBEDDED, SHOWN = 200, 6  # images in the map of features, and in the gallery
MOST_CLASSES = 25
SHOWN_ELSEWHERE = (
    "metrics",
    "checks",
    "history",
    "ablation",
    "test_ablation",
    "false_alarms",
    "outside",
)


class Figure(NamedTuple):
    """A drawing as a data URI, with its text for those who do not see it."""

    source: str
    alt: str
    caption: str


class Table(NamedTuple):
    """The first cell of a row is its heading."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Section(NamedTuple):
    """One part of the page; each of `grid` is a row of pictures."""

    name: str
    words: Sequence[str]
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    grid: Sequence[Sequence[Figure]] = ()


class Pictures(NamedTuple):
    """What the grid shows; `source` says where the images come from and how they were chosen."""

    clean: Tensor  # uint8 (M, H, W, 3)
    attacked: Tensor  # uint8 (M, H, W, 3)
    truth: Sequence[str]  # (M,)
    source: str


def write(
    path: Path,
    card: dict[str, Any],
    rows: Sequence[Row],
    evaluation: Evaluation,
    pipeline: DefendedClassifier,
    *,
    pictures: Pictures | None,
) -> Path:
    """Write the page of `evaluation` to `path`; `rows` are its metrics as the card lists them.

    `pipeline`, on the device of the images, is the variant whose features and purified images are
    shown. Only `pictures` puts pixels into the page; without them the grid is left out.
    """
    sections = [
        *ladder(rows, evaluation),
        *over_eps(rows, evaluation),
        *rejection(evaluation),
        *detection(rows, evaluation),
        *suspicion(evaluation),
        *features(evaluation, pipeline),
        *grid(evaluation, pipeline, pictures),
        *classes(evaluation, pipeline),
        *parts(card),
        *alarms(card),
        *outside_threat(card),
        *self_checks(evaluation.checks),
        recipe(card, evaluation),
    ]
    html = template().render(
        model=card.get("model", path.stem),
        data=rows[0]["data"] if rows else "",
        evaluation=evaluation,
        verdict=verdict(rows, evaluation),
        failed=[check for check in evaluation.checks if not check.passed],
        headline=headline(rows, evaluation),
        sections=sections,
    )
    path.write_text(html, encoding="utf-8")
    return path


def template() -> Template:
    """The page without its content; it escapes the names of models and classes."""
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    return pages.get_template("page.html")


def gallery(evaluation: Evaluation, pipeline: DefendedClassifier) -> Pictures | None:
    """Evaluated images for the grid, evenly spaced; for this machine only: they may not be shipped.

    None where nothing attacked this pipeline.
    """
    seen = evaluation.records.get(name_of(pipeline))
    made = attacked(evaluation, seen) if seen else None
    if made is None:
        return None
    count = len(evaluation.images)
    chosen = torch.arange(min(SHOWN, count)) * count // min(SHOWN, count)
    few = evaluation.images[chosen]
    source = f"{len(few)} of the {count} evaluated images, evenly spaced and not picked."
    truth = [few.classes[index] for index in few.label.tolist()]
    return Pictures(few.image, made[chosen], truth, source)


def name_of(pipeline: DefendedClassifier) -> str:
    """The name under which the evaluation records a pipeline."""
    return "pipeline lean" if pipeline.purifier is None else "pipeline full"


def own(seen: Record, name: str) -> tuple[Rung, Replay] | None:
    """The attack called `name` on this victim at full eps, where there was one."""
    return next(reversed(seen.attacks(name)), None)


def attacked(evaluation: Evaluation, seen: Record) -> Tensor | None:
    """The evaluated images uint8 (N, H, W, 3) under the joint attack on this victim, or else PGD-20
    on it; None where there was neither.
    """
    for name in (JOINT, STATIC):
        if mine := own(seen, name):
            made = next(item.x for item in evaluation.found if item.rung is mine[0])
            return in_8_bits(made, evaluation.images.image, mine[0].threat)
    return None


def victim(row: Row) -> str:
    """The victim's name, as evaluation records have it."""
    return row["subject"] if row["variant"] == "-" else f"{row['subject']} {row['variant']}"


def pick(rows: Sequence[Row], name: str, who: str) -> Row | None:
    """The row of a victim whose metric is called `name`, whatever follows an @."""
    found = (r for r in rows if victim(r) == who and r["name"].partition("@")[0] == name)
    return next(found, None)


def meaning(name: str) -> str:
    """A metric's name in words."""
    return next((words for start, words in MEANINGS.items() if name.startswith(start)), "")


def figure(row: Row) -> str:
    """A metric's value as people read it: a share, a difference, an area."""
    if row["name"].startswith("auroc"):
        return f"{row['value']:.3f}"
    if row["name"].startswith("gain"):
        return f"{100 * row['value']:+.1f} points"
    return f"{row['value']:.1%}"


def interval(row: Row) -> str:
    """A metric's 95% interval in its own unit."""
    low, high = row["interval"]
    if row["name"].startswith("auroc"):
        return f"{low:.3f} to {high:.3f}"
    if row["name"].startswith("gain"):
        return f"{100 * low:+.1f} to {100 * high:+.1f}"
    return f"{low:.1%} to {high:.1%}"


def both(row: Row | None, *, between: str = " ") -> str:
    """A metric's value with its interval; a dash where there is none."""
    return f"{figure(row)}{between}({interval(row)})" if row else "-"


def verdict(rows: Sequence[Row], evaluation: Evaluation) -> Iterator[str]:
    """What the figures say, in sentences."""
    for seen in pipelines(evaluation):
        yield from verdict_on(rows, seen.victim.name, evaluation.threat)
    control, clean = (pick(rows, name, "undefended") for name in ("robust", "clean"))
    if control:
        yield (
            f"Control: the same attacks leave {both(control)} of the undefended twin's labels"
            f" right; on clean images {both(clean)} are."
        )
    if not any(row["name"] == "robust" for row in rows):
        yield "Only a part of the ladder was climbed: there is no worst case and no verdict."


def verdict_on(rows: Sequence[Row], who: str, threat: Threat) -> Iterator[str]:
    """What the figures say of one pipeline."""
    kept, safe = pick(rows, "robust", who), pick(rows, "robust_with_rejection", who)
    if not (kept and safe):
        return
    yield (
        f"{who}: in the worst case over these attacks up to {threat}, the label of {both(kept)} of"
        f" {kept['n']} images stays right, and {both(safe)} are right or rejected."
    )
    for name, other in (
        ("gain_over_classifier", "the bare classifier"),
        ("gain_over_max_softmax", "rejecting low confidence at the same clean rate"),
    ):
        if gain := pick(rows, name, who):
            yield f"Counting rejections as safe, {who} beside {other} {adds(gain)}."
    # Detectors that reject whatever is touched look perfect until this is asked.
    if strict := next((r for r in rows if (victim(r), r["name"]) == (who, QUARTER)), None):
        yield f"Where rejecting an image moved by up to eps/4 is an error, {both(strict)} remain."


def adds(gain: Row) -> str:
    """Whether a difference shows, given its interval."""
    low, high = gain["interval"]
    if low <= 0 <= high:
        return f"adds nothing that {gain['n']} images can show: {both(gain)}"
    return f"is {'better' if low > 0 else 'worse'}: {both(gain)}"


def headline(rows: Sequence[Row], evaluation: Evaluation) -> Table | None:
    """Worst cases of every victim beside its clean figures."""
    columns = ("robust", "robust_with_rejection", "clean", "clean_rejection")
    body = []
    for who in evaluation.records:
        found = [pick(rows, name, who) for name in columns]
        if seen := next((row for row in found[:2] if row), None):
            known = " (control)" if who == "undefended" else ""
            body.append(
                (f"{who}{known}", *(both(row, between="\n") for row in found), str(seen["n"]))
            )
    rate = next((r["name"].partition("@")[2] for r in rows if "rejection@" in r["name"]), "")
    head = (
        "victim",
        "robust: label right in the worst case",
        f"robust_with_rejection@{rate}: right or rejected in the worst case",
        "clean accuracy",
        "clean rejection",
        "images",
    )
    caption = f"Share and 95% interval, {evaluation.threat}; the attacker knows every part"
    return Table(caption, head, body) if body else None


def ladder(rows: Sequence[Row], evaluation: Evaluation) -> Iterator[Section]:
    """Every figure of the evaluation, and the main ones drawn."""
    if not rows:
        return
    head = ("figure", "value", "95% interval", "threat", "images", "what it is, and the attack")
    tables = []
    for who in dict.fromkeys(map(victim, rows)):
        body = [
            (
                row["name"],
                figure(row),
                interval(row),
                f"{row['norm']} {row['eps']}" if "eps" in row else "-",
                str(row["n"]),
                f"{meaning(row['name'])}\n{row.get('attack', '')}",
            )
            for row in rows
            if victim(row) == who
        ]
        tables.append(Table(f"All figures of {who}", head, body))
    words = [
        "Each attack looks for images that beat its victim, and every image that any of them finds"
        " is then put to every victim: the worst case counts an image only if nothing beat it, in"
        " float and in 8 bits."
    ]
    yield Section("The ladder", words, [main_figures(rows, evaluation)], tables)


def main_figures(rows: Sequence[Row], evaluation: Evaluation) -> Figure:
    """Main rungs of every victim with their intervals."""
    shown = [row for row in rows if row["name"].startswith(MAIN) or row["name"] == "clean"]
    labels = list(dict.fromkeys(row["name"] for row in shown))
    every = []
    for who in evaluation.records:
        if mine := [row for row in shown if victim(row) == who]:
            every.append(listed(who, [labels.index(row["name"]) for row in mine], mine))
    return Figure(
        plots.dots(labels, every, x_label="share of images"),
        "Dot plot of the main figures of every victim with their intervals; the tables of this"
        " section hold the same numbers.",
        "Main figures with 95% intervals.",
    )


def listed(name: str, places: Sequence[float], rows: Sequence[Row]) -> Shares:
    """The figures of `rows`, each at its place."""
    low, high = np.array([row["interval"] for row in rows]).T
    return Shares(name, np.array(places), np.array([row["value"] for row in rows]), low, high)


def counted(name: str, places: Sequence[float], held: Sequence[Bools]) -> Shares:
    """The shares of images that each of `held` holds, each at its place."""
    value = np.array([images.mean() for images in held])
    low, high = np.array([wilson(images.mean(), len(images)) for images in held]).T
    return Shares(name, np.array(places), value, low, high)


def pipelines(evaluation: Evaluation) -> list[Record]:
    """What happened to each variant of the pipeline."""
    subjects = ("pipeline", GRAPH)
    return [r for r in evaluation.records.values() if r.victim.subject.startswith(subjects)]


def over_eps(rows: Sequence[Row], evaluation: Evaluation) -> Iterator[Section]:
    """How figures fall with the size of the perturbation."""
    labels = [pgd_over_eps(seen, evaluation.threat) for seen in pipelines(evaluation)]
    strict = [stratified(rows, seen.victim.name) for seen in pipelines(evaluation)]
    figures = []
    if known := [s for s in labels if len(s.place) > 1]:
        caption = "Label right under PGD-20 of this size, rejected or not."
        figures.append(curves(known, "label right", "size of the attack, parts of eps", caption))
    if given := [s for s in strict if s]:
        caption = (
            "Right or rejected in the worst case up to eps, where rejecting an image that was moved"
            " by at most this part of eps counts as an error."
        )
        x_label = "rejecting is an error up to, parts of eps"
        figures.append(curves(given, "right or rejected", x_label, caption))
    if figures:
        words = [f"eps is that of {evaluation.threat}. Bars are 95% intervals."]
        yield Section("Robust accuracy over eps", words, figures)


def curves(every: Sequence[Shares], y_label: str, x_label: str, caption: str) -> Figure:
    """A few lines, with all their points in the text."""
    points = (
        f"{s.name}: "
        + ", ".join(f"{y:.1%} at {x:g}" for x, y in zip(s.place, s.value, strict=True))
        for s in every
    )
    source = plots.lines(every, x_label=x_label, y_label=y_label)
    return Figure(source, f"Line plot of {y_label} by {x_label}. {'; '.join(points)}.", caption)


def pgd_over_eps(seen: Record, threat: Threat) -> Shares:
    """Label accuracy under the victim's own PGD-20 at every size that was tried."""
    places, held = [0.0], [seen.clean.right]
    for eps in sorted({rung.threat.eps for rung, _ in seen.under}):
        same = seen._replace(under=[pair for pair in seen.under if pair[0].threat.eps == eps])
        if mine := own(same, STATIC):
            places.append(eps / threat.eps)
            held.append(seen.clean.right & mine[1].right)
    return counted(seen.victim.name, places, held)


def stratified(rows: Sequence[Row], who: str) -> Shares | None:
    """The stratified figures of one victim."""
    mine = [r for r in rows if victim(r) == who and r["name"].startswith("stratified@")]
    places = [float(r["name"].removeprefix("stratified@").removesuffix("eps")) for r in mine]
    return listed(who, places, mine) if mine else None


def sweep(clean: Floats, wrong: Floats) -> tuple[Floats, Floats]:
    """Every share of `clean` (N,) that a threshold may flag, and how many of `wrong` (M,) it then
    flags, as `metrics.tpr_at_fpr` counts.
    """
    thresholds = np.append(np.sort(clean)[::-1], -np.inf)
    below = np.searchsorted(np.sort(wrong), thresholds, "right")
    return np.arange(len(thresholds)) / len(clean), len(wrong) - below.astype(float)


def rejection(evaluation: Evaluation) -> Iterator[Section]:
    """What a moving threshold trades."""
    figures = []
    for seen in pipelines(evaluation):
        plain = evaluation.records.get(f"{plain_subject(seen.victim)} {seen.victim.variant}")
        both_kinds = [r for r in (seen, plain) if r and own(r, JOINT)]
        if both_kinds:
            figures.append(rejection_figure(both_kinds))
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


def rejection_figure(every: Sequence[Record]) -> Figure:
    """Accepted and wrong over clean rejection, with each victim's operating point."""
    curves, marks = [], []
    for seen in every:
        after = seen.own(JOINT)[1]
        wrong = ~after.right
        score = after.deployed.suspicion[wrong]
        rate, flagged = sweep(seen.clean.deployed.suspicion, score)
        curves.append(Curve(seen.victim.name, rate, (len(score) - flagged) / len(wrong)))
        rejected = (~seen.clean.deployed.accepted).mean()
        lost = (wrong & after.deployed.accepted).mean()
        marks.append(Curve(seen.victim.name, np.array([rejected]), np.array([lost])))
    points = " ".join(
        f"{s.name} rejects {s.x[0]:.1%} of clean images and accepts {s.y[0]:.1%} of the attacked"
        " ones with a wrong label."
        for s in marks
    )
    source = plots.over_rate(curves, marks, y_label="accepted and wrong")
    alt = f"Curves of accepted and wrong images over clean rejection. At the markers: {points}"
    return Figure(source, alt, f"{every[0].victim.name} under its joint attack. {points}")


def detection(rows: Sequence[Row], evaluation: Evaluation) -> Iterator[Section]:
    """How well suspicion alone tells wrong images from clean ones."""
    figures, body = [], []
    for seen in pipelines(evaluation):
        curves, who = [], seen.victim.name
        mine = own(seen, STATIC)
        wrong = seen.clean.right & mine[1].fooled if mine else np.zeros(1, bool)
        if mine and wrong.any():
            score = mine[1].deployed.suspicion[wrong]
            rate, flagged = sweep(seen.clean.deployed.suspicion, score)
            curves.append(Curve(STATIC, rate, flagged / len(score)))
            body.append((who, str(len(score)), *detected(rows, who)))
        if curves:
            source = plots.over_rate(curves, [], y_label="wrong images flagged")
            alt = f"ROC curves of {who}; the table below holds their main points."
            figures.append(Figure(source, alt, f"{who}: receiver operating curve."))
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


def detected(rows: Sequence[Row], who: str) -> list[str]:
    """What the table of detection says of a victim."""
    found = {row["name"]: row for row in rows if victim(row) == who}
    static = [f"{part}:{STATIC}" for part in ("tpr@1%fpr", "tpr@5%fpr", "auroc")]
    return [both(found.get(name)) for name in (f"caught:{JOINT}", *static)]


def suspicion(evaluation: Evaluation) -> Iterator[Section]:
    """Where the scores of clean and attacked images lie."""
    figures = []
    for seen in pipelines(evaluation):
        scores = {"clean": seen.clean.deployed.suspicion}
        for name in (STATIC, JOINT):
            if mine := own(seen, name):
                scores[name] = mine[1].deployed.suspicion
        medians = ", ".join(f"{name} {np.median(score):.2f}" for name, score in scores.items())
        source = plots.histogram(scores, threshold(seen))
        caption = f"{seen.victim.name}: suspicion of all images. Medians: {medians}."
        figures.append(Figure(source, f"Histogram. {caption}", caption))
    if figures:
        words = [
            "Suspicion is what the detectors add up to; what lies right of the line is rejected."
        ]
        yield Section("Suspicion", words, figures)


def threshold(seen: Record) -> float | None:
    """The least suspicion that was rejected; None where nothing was."""
    every = [seen.clean.deployed, *(after.deployed for _, after in seen.under)]
    rejected = np.concatenate([answer.suspicion[~answer.accepted] for answer in every])
    return float(rejected.min()) if np.isfinite(rejected).any() else None


def features(evaluation: Evaluation, pipeline: DefendedClassifier) -> Iterator[Section]:
    """A t-SNE map (van der Maaten and Hinton 2008) of what the classifier makes of each image."""
    seen = evaluation.records.get(name_of(pipeline))
    made = attacked(evaluation, seen) if seen else None
    if made is None or len(evaluation.images) < 4:
        return
    count = min(EMBEDDED, len(made))
    few = torch.arange(count) * len(made) // count
    parts = embedded(pipeline, evaluation.images.image[few], made[few])
    points = np.concatenate(list(parts.values()))
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(perplexity=perplexity, random_state=0).fit_transform(points).astype(float)
    split = zip(parts, np.split(flat, len(parts)), strict=True)
    source = plots.scatter([Curve(name, *part.T) for name, part in split])
    words = [
        f"{count} images as the classifier's last features, brought to a plane by t-SNE (perplexity"
        f" {perplexity:.3g}, fixed seed). Near points are alike; distances between groups and the"
        " axes mean nothing."
    ]
    sets = ", ".join(parts)
    alt = f"Scatter plot of {len(points)} points in {len(parts)} sets: {sets}."
    yield Section("Features", words, [Figure(source, alt, f"t-SNE of {sets} images.")])


def embedded(
    pipeline: DefendedClassifier, clean: Tensor, made: Tensor
) -> dict[str, NDArray[np.float32]]:
    """Features (N, F) of clean and attacked images uint8 (N, H, W, 3), and of these purified."""
    views = {"clean": to_float(clean), "attacked": to_float(made)}
    with torch.no_grad():
        if pipeline.purifier is not None:
            parts = batches_of(views["attacked"])
            views["purified"] = torch.cat([pipeline.defend(part).purified for part in parts])
        return {
            name: torch.cat([pipeline.classifier.embed(x) for x in batches_of(view)]).cpu().numpy()
            for name, view in views.items()
        }


def grid(
    evaluation: Evaluation, pipeline: DefendedClassifier, pictures: Pictures | None
) -> Iterator[Section]:
    """Pictures as sent, attacked and purified, each with the verdict on it."""
    seen, names = evaluation.records.get(name_of(pipeline)), evaluation.images.classes
    if pictures is None or seen is None:
        return
    clean, made = (
        image.to(evaluation.images.image.device) for image in (pictures.clean, pictures.attacked)
    )
    change = made.int() - clean.int()
    columns = [
        ("clean", clean, verdicts(seen, pipeline, clean, names)),
        ("attacked", made, verdicts(seen, pipeline, made, names)),
        ("difference x10", (128 + 10 * change).clamp(0, 255).byte(), largest(change)),
    ]
    if pipeline.purifier is not None:
        with torch.no_grad():
            purified = pipeline(made).purified
        columns.append(("purified", purified, ["what the classifier sees"] * len(made)))
    rows = []
    for i, truth in enumerate(pictures.truth):
        words = [f"{title}: {said[i]}" for title, _, said in columns]
        sources = [plots.png(image[i].cpu().numpy()) for _, image, _ in columns]
        alts = [f"{truth}, {text}" for text in words]
        words[0] = f"{truth}, {words[0]}"
        rows.append([Figure(*parts) for parts in zip(sources, alts, words, strict=True)])
    yield Section("Pictures", [pictures.source], grid=rows)


def largest(change: Tensor) -> list[str]:
    """The largest change of a pixel in each image of (M, H, W, 3)."""
    return [f"at most {levels}/255" for levels in change.abs().flatten(1).amax(1).tolist()]


def verdicts(
    seen: Record, pipeline: DefendedClassifier, image: Tensor, names: tuple[str, ...]
) -> list[str]:
    """What the endpoint says of each image uint8 (N, H, W, 3)."""
    with torch.no_grad():
        confidence, index = pipeline(image).logits.softmax(1).max(1)
    accepted = seen.victim.deployed(image).accepted
    return [
        f"{names[i]} {share:.0%}, {'accepted' if fine else 'rejected'}"
        for share, i, fine in zip(confidence.tolist(), index.tolist(), accepted, strict=True)
    ]


def classes(evaluation: Evaluation, pipeline: DefendedClassifier) -> Iterator[Section]:
    """Which classes fall."""
    seen = evaluation.records.get(name_of(pipeline))
    if seen is None or not seen.under:
        return
    label = evaluation.images.label.cpu().numpy()
    worst = seen.worst("right")
    there = sorted(np.unique(label).tolist(), key=lambda index: worst[label == index].mean())
    shown = there[:MOST_CLASSES]
    names = [evaluation.images.classes[index] for index in shown]
    every = [
        counted(name, range(len(shown)), [held[label == index] for index in shown])
        for name, held in (("clean", seen.clean.right), ("worst case", worst))
    ]
    alt = " ".join(
        f"{name}: {before:.0%} clean, {after:.0%} worst case."
        for name, before, after in zip(names, every[0].value, every[1].value, strict=True)
    )
    caption = f"{seen.victim.name}: label right by class, with 95% intervals."
    drawing = Figure(plots.dots(names, every, x_label="label right"), f"Dot plot. {alt}", caption)
    attack = seen.everything().attack
    fewest = min(int((label == index).sum()) for index in shown)
    words = [
        f"{len(shown)} of {len(there)} classes, the weakest first; the smallest has {fewest}"
        f" images. {attack[0].upper()}{attack[1:]}."
    ]
    yield Section("Classes", words, [drawing])


def self_checks(checks: Sequence[Check]) -> Iterator[Section]:
    """What the evaluation found when it looked at itself."""
    if not checks:
        return
    words = ["These look for signs that an attack failed rather than that a defence held."]
    body = [
        ("passed" if check.passed else "FAILED", check.name, check.subject, check.seen)
        for check in checks
    ]
    head = ("result", "check", "victim", "what it saw")
    yield Section("Self-checks", words, tables=[Table("Self-checks", head, body)])


def parts(card: dict[str, Any]) -> Iterator[Section]:
    """What each part in front of the classifier costs and adds, where that was measured."""
    if "ablation" in card:
        default = card["ablation"]["default"]
        chosen = f"Served by default: {default['variant']} ({default['why']})."
        yield ablated("What each part adds", card["ablation"], chosen)
    if "test_ablation" in card:
        seen = card["test_ablation"]
        section = ablated(
            "What rejection adds on test images", seen, "Nothing was chosen by these."
        )
        curve = Table("Over the rate of rejection", *ablation.curve_table(seen["rows"]))
        yield section._replace(tables=[*section.tables, curve])


def ablated(name: str, seen: dict[str, Any], more: str) -> Section:
    """An ablation as the card has it, with `more` to say of it."""
    rows = seen["rows"]
    words = [
        f"{seen['data']}, {seen['threat_model']}. Each setup was calibrated like a model of its own"
        f" and attacked with full knowledge ({seen['attack']}); what was found against any was put"
        " to all.",
        more,
    ]
    figures = [
        Figure(
            plots.svg(partial(plots.setup_labels, rows=rows), height=1.2 + 0.25 * len(rows)),
            "Dot plot of clean and robust label accuracy of every setup, as in the table.",
            "Label accuracy of every setup.",
        ),
        Figure(
            plots.svg(partial(plots.setup_rejection, rows=rows)),
            "Line plot of images right or rejected under attack over clean images rejected.",
            "What rejecting adds, over what it costs.",
        ),
    ]
    return Section(name, words, figures, [Table(name, *ablation.table(rows))])


def alarms(card: dict[str, Any]) -> Iterator[Section]:
    """False alarms by the way clean images come, and whether the promise holds."""
    if "false_alarms" not in card:
        return
    seen = card["false_alarms"]
    words = [
        f"{seen['data']}; promised are {seen['rate']:.1%}. The promise holds for images like those"
        " of the calibration; others may be flagged more often, though nothing is wrong with them."
        " Drift is the Kolmogorov-Smirnov distance of p-values from uniform.",
        *seen["remedies"],
    ]
    spread = "; ".join(
        f"{variant}, promised {point['alpha']:.0%}: {in_words(point)}"
        for variant, points in seen["coverage"].items()
        for point in points
    )
    picture = Figure(
        plots.coverage(seen["coverage"]),
        f"Share of clean images flagged over random splits. {spread}.",
        f"A random half of the calibration images ranks the other half, again and again. {spread}.",
    )
    tables = [Table("False alarms", *alarm_table(seen["rows"]))]
    yield Section("False alarms", words, [picture], tables)


def outside_threat(card: dict[str, Any]) -> Iterator[Section]:
    """What attackers outside the threat model, and the weather, do to every victim."""
    if "outside" not in card:
        return
    seen = card["outside"]
    words = [
        f"{seen['data']}; rejected where p < {seen['rate']:g}. Nothing was trained or calibrated"
        f" for these: {seen['attack']}. Corruptions are at one strength, and not CIFAR-10-C.",
        f"{outside.in_words(seen['scaling'])}.",
    ]
    tables = [Table("Outside the threat model", *outside.table(seen["rows"]))]
    yield Section("Outside the threat model", words, tables=tables)


def recipe(card: dict[str, Any], evaluation: Evaluation) -> Section:
    """What was defended, against whom, and how all of it was made."""
    reach = {"Linf": "moves every pixel of", "L2": "moves, in the L2 norm with pixels from 0 to 1,"}
    words = [
        f"Threat model: the attacker knows weights, purifier, detectors and thresholds, and"
        f" {reach[evaluation.threat.norm]} an image by at most {str(evaluation.threat).split()[1]}."
        " Not covered: other norms, patches, poisoned training data, theft of the model, and"
        " attacks stronger than those listed here."
    ]
    known = {key: value for key, value in card.items() if key not in SHOWN_ELSEWHERE}
    body = list(flat(known))
    body += [(f"fingerprint: {n}", r.victim.fingerprint) for n, r in evaluation.records.items()]
    commands = dict.fromkeys(row["command"] for row in card.get("metrics", []))
    body += [("measured by", command) for command in commands]
    return Section(
        "Threat model and recipe", words, tables=[Table("Card", ("what", "value"), body)]
    )


def flat(entry: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dictionaries, each with its path."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}: ")
        else:
            lines = value if isinstance(value, list) else [value]
            yield f"{above}{key}", "\n".join(map(str, lines))
