"""What is measured of a model: figures, ablation, false alarms, lower forms.

Each study takes a Model and images and returns what it found. It writes that beside the card, in
measured.json, or into the card where that is asked for.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rampart import inputs
from rampart.calibrated import WEIGHTS, Calibrated, Form
from rampart.export.parity import Agreement, agree
from rampart.export.precision import make as make_form
from rampart.export.scene_agreement import SceneAgreement
from rampart.export.shipped import parts as parts_of
from rampart.hardening.attack.ladder import QUICK, Budget, fool
from rampart.hardening.attack.objectives import look_at
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim, fingerprint, label_victim
from rampart.hardening.judge import ablation, outside, purification, strangers
from rampart.hardening.judge import alarms as false
from rampart.hardening.judge import evaluate as evaluation
from rampart.hardening.model.card import Subject
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.files import SAMPLE, Precision, load_variant
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import Variant, load_classifier
from rampart.hardening.model.promise import PromiseCheck
from rampart.hardening.report import card as report
from rampart.hardening.train.data import Folder, spread, survey
from rampart.looks import shown
from rampart.model import FOUND, Figures, Model, to_engine, twin_of
from rampart.provenance import PYTHON, versions
from rampart.sources import Sample, Source, calibration_images, held_images
from rampart.training import pick_device

AT_ONCE = 128  # images of a folder that are judged together
ABLATION_TABLES = (ablation.table, ablation.curve_table)


class ChecksFailed(ValueError):
    """A self-check of an evaluation failed; all figures are written nevertheless."""


class Study(NamedTuple):
    """How something is measured, whatever it is."""

    threat: Threat = Threat()
    rate: float | None = None  # false alarms on clean images; None: what the model can promise
    quick: bool = False  # short attacks
    device: str = "auto"
    cache: Path = FOUND  # for what attacks found
    twin: Path | None = None  # folder of the undefended network; else the one beside the model's
    command: str = PYTHON
    into_card: bool = False  # else beside it

    @property
    def budget(self) -> Budget:
        """What the attacker may spend on an image."""
        return QUICK if self.quick else Budget()


class Outcome(NamedTuple):
    """The card, or what stands beside it, with what a study found; and that as text for people."""

    card: dict[str, Any]
    lines: list[str]
    checks: Mapping[str, Any] = MappingProxyType({})  # this study's own, as a card has them


def evaluate(
    model: Model,
    sample: Sample,
    study: Study,
    *,
    rungs: Sequence[str] = (),
    variant: Variant | None = None,
    forms: Sequence[Precision] = (),
    gallery: Path | None = None,
    notice: Callable[[str], object] = str,
) -> Outcome:
    """Attack classifier and pipeline with full knowledge; write figures and a page.

    `rungs` names attacks, all where it is empty; `forms` the graphs in lower precision that are
    attacked as well; `gallery` a second page with attacked images in it. `notice` hears how long it
    will take. Raises ValueError where what is asked for does not go together.
    """
    inputs.alone(variant, rungs)
    model.chosen_variant(variant)
    images = sample.images.to(pick_device(study.device))
    notice("exporting the graphs that are attacked, and timing an attack on each")
    targets = targets_of(model, study, variant=variant, forms=forms)
    measure = partial(evaluation.estimate, targets, images, study.threat, study.budget)
    seconds = measure(only=list(rungs))
    notice(f"{len(images)} images; about {seconds / 60:.0f} minutes, Ctrl-C is safe")
    rate = model.chosen_rate(study.rate)
    attack = partial(model.evaluate, threat=study.threat, rate=rate, cache=study.cache)
    attack = partial(attack, only=rungs, targets=targets, data=sample.name, device=study.device)
    figures = attack(images, study.budget, command=study.command)
    kept, own = enter_figures(model, figures, study, whole=not rungs)
    model.log({"data": sample.name, "n": len(images), "command": study.command})
    lines = [figures.table(), *map(str, figures.evaluation.checks)]
    if not rungs:
        lines += write_pages(model, figures, study, kept, own=own, gallery=gallery)
    checks = {"checks": figures.evaluation.check_rows}
    return Outcome(kept.content, [*lines, *kept.lines], checks)


class Kept(NamedTuple):
    """Where the figures of a study went: what that file holds now, and words about it."""

    content: dict[str, Any]
    in_card: bool
    lines: list[str]

    def file(self, model: Model, name: str) -> Path | None:
        """What is drawn of the study, where the model lies on disk."""
        return model.folder and model.folder / (name if self.in_card else f"measured-{name}")


def home_of(model: Model, entries: dict[str, Any], study: Study) -> tuple[bool, list[str]]:
    """Whether what was measured goes into the card, with words where it does not."""
    if model.folder is None or not study.into_card:
        words = f"{model.folder and model.folder / report.MEASURED} has the figures"
        return False, [f"{words}; --into-card writes them into the card"] if model.folder else []
    if words := report.outnumbered(model.card, entries):
        file = model.folder / report.MEASURED
        return False, [f"the card keeps its {words}: {file} has the new figures"]
    return True, []


def keep(model: Model, entries: dict[str, Any], study: Study) -> Kept:
    """Put what was measured where it belongs."""
    in_card, lines = home_of(model, entries, study)
    return Kept(model.keep(entries, into_card=in_card), in_card, lines)


def forms(*, int8: bool, fp16: bool) -> list[Precision]:
    """The lower precisions that are asked for."""
    asked: dict[Precision, bool] = {"int8": int8, "fp16": fp16}
    return [precision for precision, wanted in asked.items() if wanted]


def targets_of(
    model: Model, study: Study, *, variant: Variant | None, forms: Sequence[Precision]
) -> list[Victim]:
    """What an evaluation attacks; with `variant` this alone, in the form that is asked for."""
    twin, device = twin_of(model, study.twin), pick_device(study.device)
    rate = model.chosen_rate(study.rate)
    targets = model.victims(rate=rate, device=device, twin=twin)
    attacked = partial(model.lower_victims, rate=rate, device=device)
    lower = [victim for form in forms for victim in attacked(form)]
    if variant:
        return [victim for victim in lower or targets if victim.subject.variant == variant]
    return targets + lower


def enter_figures(
    model: Model, figures: Figures, study: Study, *, whole: bool
) -> tuple[Kept, bool]:
    """Keep figures; returns where, and whether they are of the threat model that stands there."""
    in_card, lines = home_of(model, {"metrics": figures.rows}, study)
    book = model.card if in_card else model.measured()
    # The first whole evaluation says what the card's threat is; other figures stand beside.
    settled = book.get("threat_model") if not whole or "checks" in book else None
    threat = settled or str(study.threat)
    entries: dict[str, Any] = {"metrics": figures.rows, "threat_model": threat}
    entries["versions"] = versions()
    own = threat == str(study.threat)
    if own and figures.evaluation.checks:
        entries["checks"] = figures.evaluation.check_rows
    return Kept(model.keep(entries, into_card=in_card), in_card, lines), own


def write_pages(
    model: Model, figures: Figures, study: Study, kept: Kept, *, own: bool, gallery: Path | None
) -> list[str]:
    """The report, where it is of the card's threat model, and the gallery; returns their names."""
    from rampart.hardening.report import page

    found, lines = figures.evaluation, list[str]()
    pixels, pipeline = shown(model, None), model.pipeline()
    look = look_at(pipeline, model.calibration(model.best_variant), model.chosen_rate(study.rate))
    sampled = bool(model.folder and (model.folder / SAMPLE).is_file())
    source = f"{SAMPLE} of the model's folder" if sampled else "scikit-image's CC0 cat (chelsea)"
    source += f", decoded to {model.image_size}x{model.image_size}."
    attacked = fool(look, pixels, study.threat, QUICK)
    pictures = page.Pictures(pixels, attacked, ["sample" if sampled else "cat"], source)
    pipeline = pipeline.to(pick_device(study.device))
    variant, precision = model.form()
    served = Subject("pipeline", variant, precision)
    write = partial(page.write, card=model.card | kept.content, rows=figures.rows, evaluation=found)
    date = report.measured_on(model.folder, figures.rows[0]["data"]) if model.folder else ""
    write = partial(write, served=served, date=date)
    file = kept.file(model, "report.html")
    if own and file:
        lines.append(str(write(file, pipeline=pipeline, pictures=pictures)))
    elif not own:
        settled = kept.content["threat_model"]
        lines.append(f"the card is of {settled}: its self-checks and report.html stay as they are")
    if gallery:
        lines.append(str(write(gallery, pipeline=pipeline, pictures=page.gallery(found, pipeline))))
    return lines


def insist(card: Mapping[str, Any]) -> None:
    """Raise ChecksFailed where a self-check of the card failed."""
    if failed := report.failed_checks(card):
        raise ChecksFailed(f"{failed[0]}. Do not use the figures before you know why")


def ablate(
    model: Model,
    source: Source,
    study: Study,
    *,
    limit: int = 200,
    steps: int = 20,
    test: Path | None = None,
    rows: Sequence[str] = (),
) -> Outcome:
    """What each part adds under attack, and costs; the outcome names the default variant.

    With `test` those images are reported on and nothing is chosen; `rows` are attacked alone, and
    kept nowhere. Raises ValueError where classes differ or a row has no such name.
    """
    import pyautoattack  # noqa: F401  # missing, it would be missed only after many minutes

    inputs.ablation(rows, test, study.twin)
    where = pick_device(study.device)
    held = held_images(model, source)
    attacked: Images | Folder = split(held, "validation")
    if test:
        attacked, _ = survey(test, train=False, size=model.image_size, stream=True)
    model.check_classes(held, attacked)
    few = spread(attacked, limit).to(where)
    pipeline = model.pipeline(model.variants[0])
    arm = partial(ablation.arm, to_engine=partial(to_engine, threads=1), device=where)
    choose = partial(ablation.chosen, test=bool(test), guarded="guarded" in model.variants)
    every = [arm(pipeline, setup, held) for setup in choose(pipeline, rows)]
    if (control := twin_of(model, study.twin)) and not (test or rows):
        victim = label_victim("undefended", control.to(where), fingerprint(control))
        every.append(ablation.Attacked(ablation.Setup("undefended"), None, [victim], None))
    budget = QUICK._replace(steps=steps)
    outcomes = ablation.ablate(every, few, study.threat, budget, folder=study.cache)
    title = test.name if test else f"validation images of {source.name}"
    how = {"data": f"{len(few)} {title}", "command": study.command}
    entry = ablation.entry(outcomes, study.threat, budget, len(few.classes), **how)
    checked = [str(check) for outcome in outcomes for check in outcome.checks]
    words = [f"{entry['data']}, {entry['threat_model']}: {entry['attack']}", *checked]
    if not (rows or test):
        return enter_ablation(model, entry, outcomes, study, words)
    lines = [report.piped(*table(entry["rows"])) for table in ABLATION_TABLES] + words
    return enter_test(model, entry, study, lines) if test else Outcome(model.card, lines)


def enter_test(model: Model, entry: dict[str, Any], study: Study, lines: list[str]) -> Outcome:
    """Keep an ablation on test images."""
    model.log({name: entry[name] for name in ("data", "n", "command")})
    gains = ablation.gains(entry)
    new = {"test_ablation": entry, "metrics": gains}
    in_card, words = home_of(model, new, study)
    return Outcome(model.keep(new, into_card=in_card), [*lines, *words])


def enter_ablation(
    model: Model,
    entry: dict[str, Any],
    results: list[ablation.Outcome],
    study: Study,
    words: list[str],
) -> Outcome:
    """Keep an ablation with the variant that it chooses, and draw it; `words` say how it went."""
    from rampart.hardening.report import plots

    entry["default"] = ablation.default(results)
    kept = keep(model, {"ablation": entry}, study)
    lines = [report.piped(*ablation.table(entry["rows"])), *words]
    lines.append(f"default variant: {entry['default']['variant']}, {entry['default']['why']}")
    if file := kept.file(model, "ablation.png"):
        title = f"What each part adds: {entry['data']}, {entry['threat_model']}"
        lines.append(str(plots.ablation(entry["rows"], file, title)))
    return Outcome(kept.content, [*lines, *kept.lines])


def alarms(
    model: Model,
    source: Source,
    study: Study,
    *,
    limit: int = 1000,
    unlike: Sequence[Path] = (),
) -> Outcome:
    """How often clean images are flagged, by the way they come and by the class they get; and how
    often pictures that belong to no class, drawn and `unlike`, where images lie.
    """
    where = pick_device(study.device)
    held, tables = held_images(model, source), {v: model.calibration(v) for v in model.variants}
    every = [false.Judged(model.pipeline(v).to(where), table) for v, table in tables.items()]
    sample = spread(split(held, "calibration"), limit).to(where)
    unranked = split(held, "validation").to(where)
    rate = model.chosen_rate(study.rate)
    rows = list(false.false_alarms(every, sample, rate=rate))
    rows += false.by_class(every, unranked, rate=rate)
    others: dict[str, Iterable[Tensor]] = {
        name: [image] for name, image in strangers.drawn(model.image_size).items()
    }
    for path in unlike:
        found, _ = survey(path, train=False, size=model.image_size, stream=True)
        pieces = found.read(torch.split(torch.arange(len(found)), AT_ONCE))
        others[path.name] = (image for image, _ in pieces)
    foreign = list(strangers.flagged(every, others, rate=rate))
    coverage = {v: list(false.coverage(table.combined)) for v, table in tables.items()}
    remedies = false.remedies(rows)
    name = f"calibration images of {source.name}; by class its validation images"
    entry = {"data": name, "rate": rate, "rows": rows, "strangers": foreign}
    entry |= {"coverage": coverage, "remedies": remedies, "command": study.command}
    points = [
        f"{variant}, promised {point['alpha']:.0%}: {false.in_words(point)}"
        for variant, curve in coverage.items()
        for point in curve
    ]
    kept = keep(model, {"false_alarms": entry}, study)
    both = [report.piped(*false.table(rows)), report.piped(*strangers.table(foreign))]
    return Outcome(kept.content, [*both, *points, *remedies, *kept.lines])


def beyond(model: Model, sample: Sample, study: Study) -> Outcome:
    """What lies outside the threat model: L2, a patch, corruptions, attacks on the resize step."""
    where = pick_device(study.device)
    images = sample.images.to(where)
    model.check_classes(images)
    rate = model.chosen_rate(study.rate)
    targets = model.victims(rate=rate, device=where)
    rows = list(outside.rows(targets, images, QUICK, folder=study.cache))
    scaled = outside.scaling(images.image.shape[1])
    entry = {"data": sample.name, "rate": rate, "rows": rows, "scaling": scaled}
    entry |= {"attack": f"{outside.ATTACKS}, {QUICK}", "command": study.command}
    kept = keep(model, {"outside": entry}, study)
    model.log({"data": sample.name, "n": len(images), "command": study.command})
    words = report.piped(*outside.table(rows)), outside.in_words(scaled)
    return Outcome(kept.content, [*words, *kept.lines])


def uses(model: Model, sample: Sample, study: Study, others: Sequence[Path] = ()) -> Outcome:
    """What the purifier is for: images without and with it, in front of classifier and twin.

    Attacks are made on both, and on the classifiers in the folders `others`. Raises ValueError for
    classifiers that take other images, and for a model without a purifier.
    """
    if model.purifier is None or model.folder is None:
        raise ValueError("there is no purifier to measure: pass a model folder that has one")
    where = pick_device(study.device)
    images = sample.images.to(where)
    model.check_classes(images)
    nets = {purification.OWN: model.classifier}
    if twin := twin_of(model, study.twin):
        nets[purification.TWIN] = twin
    sources = {path.name: load_classifier(path / WEIGHTS) for path in others}
    for name, net in (nets | sources).items():
        if alike(net) != alike(model.classifier):
            raise ValueError(f"{name} has other classes or another image size than the model")
    purifier, *each = (copy.deepcopy(net).to(where) for net in (model.purifier, *nets.values()))
    found = purification.rows(
        purifier,
        dict(zip(nets, each, strict=True)),
        {name: net.to(where) for name, net in sources.items()},
        images,
        study.threat,
        folder=study.cache,
    )
    rows = list(found)
    advice = purification.advice(rows)
    entry: dict[str, Any] = {"data": sample.name, "threat_model": str(study.threat)}
    entry |= {
        "attack": purification.ATTACKS,
        "n": len(images),
        "rows": rows,
        "advice": advice,
        "command": study.command,
    }
    kept = keep(model, {"purifier": entry}, study)
    model.log({"data": sample.name, "n": len(images), "command": study.command})
    return Outcome(kept.content, [report.piped(*purification.table(rows)), *advice, *kept.lines])


def alike(net: Classifier) -> tuple[int, int]:
    """What classifiers have in common that take the same images: classes and pixels a side."""
    return net.config.classes, net.config.image_size


def quantize(
    folder: Path, source: Source, study: Study, precision: Precision = "int8", *, limit: int = 512
) -> Outcome:
    """Make the int8 or fp16 form of every variant of a model folder and hold it to its gate."""
    model, lines = Model.load(folder), []
    rate = model.chosen_rate(study.rate)
    held = calibration_images(model, source)
    few, data = split(held, "validation"), f"validation split of {source.name}"
    gate = partial(agree, images=few, precision=precision, rate=rate)
    for variant in model.variants:
        found = make_form(folder, variant, precision, held, gate, source=source.name, limit=limit)
        lines.append(f"{variant}: {found}")
        model.card = report.forget_form(folder, precision)
        report.forget_form(folder, precision, report.MEASURED)
        keep_form(model, Form(variant, precision), found, data, study)
    return Outcome(model.card, lines)


def keep_form(
    model: Calibrated, form: Form, found: Agreement | SceneAgreement, data: str, study: Study
) -> None:
    """Put into the card how a form in lower precision came through its gate, on which `data`."""
    assert model.folder is not None
    ranked, flagged = load_variant(model.folder, *form).images, found.flagged[1]
    kept = PromiseCheck.on(
        round(flagged * found.unranked), found.unranked, rate=found.rate, ranked=ranked
    )
    model.hold_to_promise(form, kept)
    origin = {"data": data, "sha256": parts_of(model.folder, *form)}
    entry = {form.variant: found._asdict() | origin, "command": study.command}
    model.add_to_card({form.precision: model.card.get(form.precision, {}) | entry})
