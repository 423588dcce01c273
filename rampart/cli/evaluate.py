"""Verbs that measure."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.provenance import command_line

QUICK = "Short attacks, on 100 images unless you pass --limit"
ALONE = "With --rung: attack only this variant"
ON_TEST = (
    "Report on these test images, without choosing a variant: classifier, max-softmax, lean, full"
)
ROW = "Measure only this row, beside classifier and max-softmax rejection; not for the card, "
ROW += "because the row does not face the attacks on the others; repeatable"
UNLIKE = "Images that show none of the model's classes and should be flagged; repeatable"
TEAM = f"{', '.join(inputs.TEAM)}; repeatable; default all"
RUNG = "Run only this attack, such as pgd20; repeatable"
LABELLED = "Labelled: CIFAR-10 folder, ImageFolder or .npz"
OBJECTS = "objects.safetensors of `rampart train`"
SCENES = "Pictures with boxes, in the layout of VOC or COCO"
SCENES_PART = (
    "Which part to use; data without lists of parts are split by digest into train and validation"
)
SEARCH = "Steps of a random search, which needs no gradient; 0 leaves it out"
CRAFTED = "Make the attacks on this object detector instead, such as one without a defence"
JSON = "Write the figures as JSON to this file"
SAME = "Folder of this run; an unfinished run in it resumes"
WHOSE = "Folder of the model, such as model_store/NAME"
REPORT = "Report to write: .html, or .pdf, which needs Chromium or Chrome"
FOLDERS = "Folders of models, the default model first"
ALL, FIGURES = (
    "Document for the table of all models",
    "Document for the figures of each model that it has a section for",
)
RUNS, README, RESULTS = Path("runs/redteam"), Path("README.md"), Path("docs/results.md")
EVIDENCE = Path("evidence.html")

verb, app = o.theme("Evaluate")


@verb(
    "evaluate model_store/mine --images cifar10/ --quick",
    "evaluate model_store/mine --images cifar10/ --part validation --rung pgd20",
    together=inputs.evaluation,
)
def evaluate(
    subject: o.Subject,
    images: o.Sample,
    threat: o.Threat,
    limit: Annotated[int | None, Option(min=1, help=o.LIMIT)] = None,
    quick: Annotated[bool, Option("--quick", help=QUICK)] = False,
    rung: Annotated[list[str] | None, Option(help=RUNG), inputs.rung] = None,
    variant: Annotated[Literal["full", "lean"] | None, Option(help=ALONE)] = None,
    twin: o.Twin = None,
    int8: Annotated[bool, Option("--int8", help="Attack the int8 graphs as well")] = False,
    fp16: Annotated[bool, Option("--fp16", help="Attack the fp16 graphs as well")] = False,
    rate: o.Rate = None,
    cache: o.Cache = o.FOUND,
    gallery: Annotated[Path | None, Option(help="Write a second page with attacked images")] = None,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Attack classifier and pipeline with full knowledge; write the figures and a report page."""
    from rampart import studies

    model = rp.Model.load(subject.model)
    sample = images.read(model, limit or (100 if quick else None))
    study = studies.Study(threat.ball(model), rate, quick, device, cache, twin, command_line())
    study = study._replace(into_card=into_card)
    attack = partial(studies.evaluate, rungs=rung or [], variant=variant, gallery=gallery)
    outcome = attack(model, sample, study, forms=studies.forms(int8=int8, fp16=fp16), notice=say)
    say(*outcome.lines)
    studies.insist(outcome.checks)


@verb("objects runs/cells/objects.safetensors bccd/ --eps 4 --skip-bad")
def objects(
    *,
    weights: Annotated[Path, Argument(help=OBJECTS), inputs.checkpoint],
    pictures: Annotated[Path, Argument(help=SCENES), inputs.scenes],
    threat: o.Threat,
    part: Annotated[Literal["train", "validation", "test"], Option(help=SCENES_PART)] = "test",
    limit: Annotated[int | None, Option(min=1, help=o.LIMIT)] = None,
    steps: Annotated[int, Option(min=1, help="Of each attack")] = 20,
    queries: Annotated[int, Option(min=0, help=SEARCH)] = 0,
    crafted_on: Annotated[Path | None, Option(help=CRAFTED), inputs.checkpoint] = None,
    out: Annotated[Path | None, Option(help=JSON), inputs.file_to_write] = None,
    skip_bad: o.SkipBad = False,
    cache: o.Cache = o.FOUND,
) -> None:
    """Attack an object detector with full knowledge; print mAP50 and AP by attack, and the worst.

    Ctrl-C is safe: the same command goes on with what attacks have found.
    """
    import json

    from rampart import objects as library
    from rampart.hardening.objects.attack import Budget
    from rampart.sources import Source

    found = library.evaluate(
        (weights, crafted_on),
        Source(pictures, None, skip_bad),
        threat.ball(),
        Budget(steps, queries),
        part=part,
        limit=limit,
        cache=cache,
    )
    if out:
        out.write_text(json.dumps(library.as_json(weights, found), indent=1) + "\n")


@verb("ablate model_store/mine --data cifar10/", together=inputs.ablation)
def ablate(
    subject: o.Subject,
    source: o.Source,
    threat: o.Threat,
    limit: o.Limit = 200,
    steps: Annotated[int, Option(min=1, help="Steps of each attack")] = 20,
    cache: o.Cache = o.FOUND,
    twin: o.Twin = None,
    test: Annotated[Path | None, Option(help=ON_TEST), inputs.images] = None,
    row: Annotated[list[str] | None, Option(help=ROW), inputs.row] = None,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Measure what each part gains under attack and what it costs.

    With --into-card, it also chooses the variant to serve.
    """
    from rampart import studies

    model = rp.Model.load(subject.model)
    study = studies.Study(threat.ball(model), device=device, cache=cache, twin=twin)
    ablate = partial(studies.ablate, limit=limit, steps=steps, test=test, rows=row or [])
    study = study._replace(command=command_line(), into_card=into_card)
    say(*ablate(model, source.open(), study).lines)


@verb(
    "alarms model_store/mine --data cifar10/",
    "alarms model_store/mine --data signs/ --unlike cifar10/",
)
def alarms(
    subject: o.Subject,
    source: o.Source,
    limit: Annotated[int, Option(min=1, help="Calibration images, evenly spaced")] = 1000,
    unlike: Annotated[list[Path] | None, Option(help=UNLIKE)] = None,
    rate: o.Rate = None,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Measure how often clean images are flagged, by how clients send them and by class."""
    from rampart import studies

    study = studies.Study(rate=rate, device=device, command=command_line(), into_card=into_card)
    model = rp.Model.load(subject.model)
    say(*studies.alarms(model, source.open(), study, limit=limit, unlike=unlike or []).lines)


@verb("outside model_store/mine --images cifar10/", together=inputs.sample)
def outside(
    subject: o.Subject,
    images: o.Sample,
    limit: o.Limit = 200,
    rate: o.Rate = None,
    cache: o.Cache = o.FOUND,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Measure what the threat model excludes: L2, a patch, corruptions, attacks on the resize."""
    from rampart import studies

    model = rp.Model.load(subject.model)
    study = studies.Study(rate=rate, device=device, cache=cache, command=command_line())
    study = study._replace(into_card=into_card)
    say(*studies.beyond(model, images.read(model, limit), study).lines)


@verb(
    "redteam http://127.0.0.1:8080/predictions/cifar10 cifar10/",
    together=inputs.redteaming,
)
def redteam(
    url: Annotated[str, Argument(help="http://HOST:PORT/predictions/NAME")],
    images: Annotated[Path, Argument(help=LABELLED), inputs.images],
    out: Annotated[Path, Option(help=SAME), inputs.folder_to_write] = RUNS,
    attack: Annotated[list[str] | None, Option(help=TEAM), inputs.attack] = None,
    queries: Annotated[int, Option(help="Queries per image and attack")] = 1000,
    limit: o.Limit = 50,
    eps: Annotated[int, Option(help="Radius of the Linf ball, n/255")] = 8,
    image_size: Annotated[int, Option(help="Pixels per side of the model's input")] = 32,
    beside: Annotated[Path | None, Option(help="--out of another run, drawn dashed")] = None,
    seed: o.Seed = 0,
    i_own_this_endpoint: Annotated[
        bool, Option("--i-own-this-endpoint", help="Required beyond loopback")
    ] = False,
) -> None:
    """Attack a running endpoint as a black box over HTTP. After Ctrl-C, run it again to resume."""
    from rampart.hardening.report import redteam as team
    from rampart.hardening.train.data import load

    data = load(images, train=False, size=image_size)
    endpoint = team.Endpoint(url, data.classes, owned=i_own_this_endpoint)
    run = partial(team.redteam, limit=limit, eps=eps, budget=queries, seed=seed)
    outcomes = run(endpoint, data, out, attacks=attack or tuple(team.ATTACKS))
    say(team.summary(outcomes))
    runs = {out.name: outcomes}
    if beside:
        runs[beside.name if beside.name != out.name else str(beside)] = team.read(beside)
    say(team.picture(runs, out / "queries.png"))


@verb("table model_store/cifar10 model_store/mine")
def table(
    models: Annotated[list[Path], Argument(help=FOLDERS), inputs.folder],
    readme: Annotated[Path, Option(help=ALL), inputs.text] = README,
    results: Annotated[Path, Option(help=FIGURES), inputs.text] = RESULTS,
) -> None:
    """Update the tables in README.md and docs/results.md from the models' cards."""
    from rampart.hardening.report import card as report

    overview = report.model_table(models)
    readme.write_text(report.fenced(readme.read_text(), "models", overview))
    results.write_text(report.with_figures(results.read_text(), models))
    say(overview)


@verb("evidence model_store/mine --out evidence.pdf")
def evidence(
    model: Annotated[Path, Argument(help=WHOSE), inputs.folder],
    out: Annotated[Path, Option(help=REPORT), inputs.file_to_write] = EVIDENCE,
) -> None:
    """A test report for auditors out of the model's card: what was tested, how, and its limits."""
    from rampart.hardening.report import evidence

    say(f"{evidence.write(model, out)}: the figures of {model}, and what was not measured")
