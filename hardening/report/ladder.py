"""The sections on attacks: the verdict, every figure, and robustness over eps."""

from collections.abc import Iterator, Sequence

from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.evaluate import Evaluation, Record
from rampart.hardening.model.card import Figure
from rampart.hardening.report import elements, plots
from rampart.hardening.report.elements import STATIC, Drawing, Section, Table, both, pick
from rampart.hardening.report.findings import Findings
from rampart.hardening.report.plots import Shares

# Figures of the main drawing, beside those of the main rungs.
MAIN = ("clean", "transfer", "square", "robust", "robust_with_rejection")


def verdict(rows: Sequence[Figure], findings: Findings, who: str) -> Iterator[str]:
    """What the figures say of the victim `who`, which is served, in sentences."""
    yield from verdict_on(rows, who, findings.threat)
    control, clean = (pick(rows, name, "undefended") for name in ("robust", "clean"))
    if control:
        yield (
            f"Control: the same attacks leave {both(control)} of the undefended twin's labels"
            f" right; on clean images {both(clean)} are."
        )
    if blind := pick(rows, "square", who):
        yield (
            f"Square leaves {both(blind)} of {blind.n} labels right, up to {findings.threat}."
            f" The attacker {findings.knowledge}: one with gradients would find more, so this is"
            " no worst case."
        )
    elif not any(row.name == "robust" for row in rows):
        yield "Only a part of the ladder was climbed: there is no worst case and no verdict."


def verdict_on(rows: Sequence[Figure], who: str, threat: Threat) -> Iterator[str]:
    """What the figures say of one victim."""
    kept, safe = pick(rows, "robust", who), pick(rows, "robust_with_rejection", who)
    if not kept:
        return
    name = plots.title(who)
    words = f"{name}: in the worst case over these attacks up to {threat}, the label of"
    words += f" {both(kept)} of {kept.n} images stays right"
    if not safe:
        yield f"{words}."
        return
    yield f"{words}, and {both(safe)} are right or rejected."
    for figure, other in (
        ("gain_over_classifier", "the bare classifier"),
        ("gain_over_max_softmax", "rejecting low confidence at the same clean rate"),
    ):
        if gain := pick(rows, figure, who):
            yield f"Counting rejections as safe, {name} beside {other} {adds(gain)}."
    # Detectors that reject whatever is touched look perfect until this is asked.
    if strict := pick(rows, "stratified@0.25eps", who):
        yield f"Where rejecting an image moved by up to eps/4 is an error, {both(strict)} remain."


def adds(gain: Figure) -> str:
    """Whether a difference shows, given its interval."""
    low, high = gain.interval
    if low <= 0 <= high:
        return f"adds nothing that {gain.n} images can show: {both(gain)}"
    return f"is {'better' if low > 0 else 'worse'}: {both(gain)}"


def main_bars(rows: Sequence[Figure], findings: Findings) -> Drawing | None:
    """Clean accuracy of every victim beside its worst case, the control first."""
    found = {}
    for who in sorted(findings.names, key=lambda name: name != "undefended"):
        pair = pick(rows, "clean", who), worst_of(rows, who)
        if pair[0] and pair[1]:
            found[plots.title(who)] = (pair[0], pair[1])
    if not found:
        return None
    clean, worst = zip(*found.values(), strict=True)
    places = [float(place) for place in range(len(found))]
    every = [
        elements.listed("clean", places, clean),
        elements.listed(findings.worst, places, worst),
    ]
    said = "; ".join(
        f"{name}: clean {both(pair[0])}, {findings.worst} {both(pair[1])}"
        for name, pair in found.items()
    )
    where = "in the worst case" if findings.worst == "worst case" else findings.worst
    caption = f"Labels that are right, clean and {where} up to {findings.threat}, each"
    caption += f" with its 95% interval. The attacker {findings.knowledge}."
    return Drawing(plots.bars(list(found), every), f"Bar chart. {said}.", caption)


def worst_of(rows: Sequence[Figure], who: str) -> Figure | None:
    """Labels that a victim keeps in the worst case, or under its strongest attack."""
    if worst := pick(rows, "robust", who):
        return worst
    on_labels = ["square", *(attack.name for attack in rungs.RUNGS if attack.aim == "label")]
    mine = [row for row in rows if row.subject.name == who and row.name in on_labels]
    return min(mine, key=lambda row: row.value, default=None)


def headline(rows: Sequence[Figure], findings: Findings) -> Iterator[Section]:
    """Worst cases of every victim beside its clean figures, and what those say."""
    columns = ("robust", "robust_with_rejection", "clean", "clean_rejection")
    body = []
    for who in findings.names:
        figures = [pick(rows, name, who) for name in columns]
        if worst := next((row for row in figures[:2] if row), None):
            cells = (both(row, between="\n") for row in figures)
            body.append((plots.title(who), *cells, str(worst.n)))
    rate = next((r.name.partition("@")[2] for r in rows if "rejection@" in r.name), "")
    right, safe = "worst case, label right", f"worst case, right or rejected at {rate}"
    head = ("", right, safe, "clean accuracy", "clean images rejected", "images")
    caption = f"Share and 95% interval, {findings.threat}; the attacker {findings.knowledge}"
    words = [line for who in findings.pipelines for line in verdict_on(rows, who, findings.threat)]
    if len(body) > 1 or findings.pipelines:
        yield Section("All forms side by side", words, tables=[Table(caption, head, body)])


def ladder(rows: Sequence[Figure], findings: Findings) -> Iterator[Section]:
    """Every figure of the evaluation, and the main ones drawn."""
    if not rows:
        return
    head = ("figure", "value", "95% interval", "threat", "images", "what it is, and the attack")
    tables = []
    for who in dict.fromkeys(row.subject.name for row in rows):
        body = []
        for row in (row for row in rows if row.subject.name == who):
            what = f"{elements.meaning(row.name)}\n{row.attack or ''}"
            name, threat = elements.title(row.name), row.threat or "-"
            body.append((name, *elements.in_words(row), threat, str(row.n), what))
        tables.append(Table(f"All figures of {plots.title(who)}", head, body, folded=True))
    words = [
        "Each attack looks for images that beat its victim, and every image that any of them finds"
        " is then put to every victim: the worst case counts an image only if nothing beat it, in"
        " float and in 8 bits."
    ]
    if not findings.by_gradients:
        words = ["Square is a random search, here on 8-bit images. It follows no gradient."]
    yield Section("The ladder", words, [main_figures(rows, findings)], tables)


def main_figures(rows: Sequence[Figure], findings: Findings) -> Drawing:
    """Main rungs of every victim with their intervals."""
    main = {*MAIN, *(attack.name for attack in rungs.RUNGS if attack.aim != "flood")}
    shown = [row for row in rows if row.name.partition("@")[0] in main]
    labels = list(dict.fromkeys(row.name for row in shown))
    every = []
    for who in findings.names:
        if mine := [row for row in shown if row.subject.name == who]:
            every.append(elements.listed(who, [labels.index(row.name) for row in mine], mine))
    alt = (
        "Dot plot of the main figures of every victim with their intervals; the tables of this"
        " section hold the same numbers."
    )
    titles = [elements.title(name) for name in labels]
    source = plots.dots(titles, every, x_label="share of images")
    return Drawing(source, alt, "Main figures with 95% intervals.")


def over_eps(
    rows: Sequence[Figure], findings: Findings, evaluation: Evaluation | None
) -> Iterator[Section]:
    """How figures fall with the size of the perturbation."""
    labels = [pgd_over_eps(record, findings.threat) for record in elements.pipelines(evaluation)]
    strict = [stratified(rows, who) for who in findings.pipelines]
    figures = []
    if several := [s for s in labels if len(s.place) > 1]:
        caption = "Label right under PGD-20 of this size, rejected or not."
        figures.append(curves(several, "label right", "size of the attack, parts of eps", caption))
    if strata := [s for s in strict if s]:
        caption = (
            "Right or rejected in the worst case up to eps, where rejecting an image that was moved"
            " by at most this part of eps counts as an error."
        )
        x_label = "rejecting is an error up to, parts of eps"
        figures.append(curves(strata, "right or rejected", x_label, caption))
    if figures:
        words = [f"eps is that of {findings.threat}. Bars are 95% intervals."]
        yield Section("Robust accuracy over eps", words, figures)


def curves(every: Sequence[Shares], y_label: str, x_label: str, caption: str) -> Drawing:
    """A few lines, with all their points in the text."""
    points = []
    for s in every:
        values = (f"{y:.1%} at {x:g}" for x, y in zip(s.place, s.value, strict=True))
        points.append(f"{plots.title(s.name)}: {', '.join(values)}")
    source = plots.lines(every, x_label=x_label, y_label=y_label)
    return Drawing(source, f"Line plot of {y_label} by {x_label}. {'; '.join(points)}.", caption)


def pgd_over_eps(record: Record, threat: Threat) -> Shares:
    """Label accuracy under the victim's own PGD-20 at every size that was tried."""
    places, held = [0.0], [record.clean.right]
    for eps in sorted({rung.threat.eps for rung, _ in record.under}):
        same = record._replace(under=[pair for pair in record.under if pair[0].threat.eps == eps])
        if mine := elements.own(same, STATIC):
            places.append(eps / threat.eps)
            held.append(record.clean.right & mine[1].right)
    return elements.counted(record.victim.name, places, held)


def stratified(rows: Sequence[Figure], who: str) -> Shares | None:
    """The stratified figures of one victim."""
    mine = [r for r in rows if r.subject.name == who and r.name.startswith("stratified@")]
    places = [float(r.name.removeprefix("stratified@").removesuffix("eps")) for r in mine]
    return elements.listed(who, places, mine) if mine else None
