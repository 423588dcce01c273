"""Verbs that measure."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from typer import Argument, Option

import rampart as rp
from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.provenance import command_line

if TYPE_CHECKING:
    from rampart.hardening.attack.redteam import Wire

QUICK = "Short attacks, on 100 images unless you pass --limit"
ALONE = "With --rung: attack only this variant"
ON_TEST = "Report baselines and variants on these test images, without choosing a variant"
ROW = "Measure only this row, next to classifier and max-softmax rejection; not for the card, "
ROW += "because the row does not face the attacks on the others; repeatable"
UNLIKE = "Images that show none of the model's classes and should be flagged; repeatable"
TEAM = f"Attack: {', '.join(inputs.TEAM)}; repeatable; default all"
RUNG = "Run only this attack, such as pgd20; repeatable"
LABELLED = "Images: CIFAR-10 folder (its test set), one folder per class, tar shards, or .npz"
OBJECTS = "objects.safetensors of `rampart train`"
SCENES = "Pictures with boxes, in the layout of VOC or COCO"
SCENES_PART = "Which part to use; if the data name no parts, they are train and validation, by hash"
SEARCH = "Queries of a random search, which needs no gradient; 0: no search"
PATCHES = "Also attack with a patch of any colours, outside the threat model"
CRAFTED = "Make the attacks on this object detector instead, such as the undefended twin"
JSON = "Write the figures as JSON to this file"
SAME = "Folder of this run; an unfinished run in it resumes"
WHOSE = "Folder of the model, such as model_store/NAME"
REPORT = "Report to write: .html, or .pdf, which needs Chromium or Chrome"
FOLDERS = "Folders of models, the default model first"
ALL = "Document for the table of all models"
FIGURES = "Document for the figures of each model that it has a section for"
EVALUATED = "Folder of the model, such as model_store/NAME; or an ONNX file from elsewhere, or a"
EVALUATED += " folder of ONNX files, to rank them in a table"
ONNX_RANGE = "ONNX file: range of its pixels; by default, the range with the best accuracy, printed"
ONNX_LAYOUT = "ONNX file: order of its pixels, if the file does not say"
ONNX_SIZE = "ONNX file: pixels per side, if the file takes any size"
ALSO = "Folder of another classifier: put attacks on it to this model as well; repeatable"
PROTOCOL = "Protocol of the endpoint; by default, chosen by the URL: .../infer v2, ...:predict"
PROTOCOL += " tensorflow, else Rampart's"
SEND = (
    """JSON body with "$b64" or "$pixels" (lists: "$b64*", "$pixels*"); default: the PNG itself"""
)
LABEL = "Path to the label in the JSON answer, such as '$.label' or '$.predictions[*].label'"
SCORE = "Path to the scores: of all classes as a list, by class name, or of the label alone"
RANGE = "Range of pixels sent as numbers: unit [0, 1], bytes 0 to 255, signed [-1, 1], or imagenet"
RANGE += " (torchvision's mean and std)"
LAYOUT = "Order of pixels sent as numbers; by default, what the model says, else nhwc"
OUTPUT = "v2: name of the output tensor with the scores"
HEADER = "Header to send, such as 'Authorization: Bearer TOKEN'; repeatable"
ATTACKED = "Folder of the attacked model: write the figures into its card, for `rampart evidence`"
TARGET = "Class that attacks aim for; default: any wrong class"
RUNS, README, RESULTS = Path("runs/redteam"), Path("README.md"), Path("docs/results.md")
EVIDENCE = Path("evidence.html")

verb, app = o.theme("Evaluate")


class Measured(NamedTuple):
    """What is evaluated, and what its input is where it is an ONNX file."""

    model: Annotated[Path, Argument(help=EVALUATED), inputs.measured]
    arch: o.Own = None
    range: Annotated[inputs.Scaled | None, Option(help=ONNX_RANGE)] = None
    layout: Annotated[Literal["nchw", "nhwc"] | None, Option(help=ONNX_LAYOUT)] = None
    image_size: Annotated[int | None, Option(help=ONNX_SIZE)] = None


@verb(
    "evaluate model_store/mine --images cifar10/ --quick",
    "evaluate resnet50.onnx --images my_images/ --quick --eps 4 --range imagenet",
    "evaluate onnx_files/ --images my_images/ --quick",
    "evaluate model_store/mine --images cifar10/ --part validation --rung pgd20",
    together=inputs.evaluation,
)
def evaluate(
    subject: Measured,
    images: o.Sample,
    threat: o.Threat,
    limit: Annotated[int | None, Option(min=1, help=o.LIMIT)] = None,
    quick: Annotated[bool, Option("--quick", help=QUICK)] = False,
    rung: Annotated[list[str] | None, Option(help=RUNG), inputs.rung] = None,
    variant: Annotated[Literal["full", "guarded", "lean"] | None, Option(help=ALONE)] = None,
    twin: o.Twin = None,
    int8: Annotated[bool, Option("--int8", help="Attack the int8 graphs as well")] = False,
    fp16: Annotated[bool, Option("--fp16", help="Attack the fp16 graphs as well")] = False,
    rate: o.Rate = None,
    cache: o.Cache = o.FOUND,
    gallery: Annotated[Path | None, Option(help="Write a second page with attacked images")] = None,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Attack classifier and pipeline with full knowledge; write the figures and a report page.

    An ONNX file from elsewhere is attacked with gradients if it converts to PyTorch, else as a
    black box. The command writes NAME-measured.json and NAME-report.html beside it. For a folder of
    such files, it also writes a table, the most robust file first.
    """
    from rampart import studies

    if inputs.is_foreign(subject.model):
        from rampart import onnx_study, onnx_table

        own = studies.Study(threat.ball(), None, quick, cache=cache, command=command_line())
        one = partial(onnx_study.evaluate, gallery=gallery)
        measure = onnx_table.compare if subject.model.is_dir() else one
        few = limit or (100 if quick else None)
        how = partial(measure, described=onnx_study.Described(*subject[2:]), notice=say)
        found = how(subject.model, images.images, own, limit=few, rungs=rung)
        say(*found.lines)
        studies.insist(found.checks)
        return
    model = rp.Model.load(subject.model)
    sample = images.read(model, limit or (100 if quick else None))
    study = studies.Study(threat.ball(model), rate, quick, device, cache, twin, command_line())
    study = study._replace(into_card=into_card)
    attack = partial(studies.evaluate, rungs=rung or [], variant=variant, gallery=gallery)
    outcome = attack(model, sample, study, forms=studies.forms(int8=int8, fp16=fp16), notice=say)
    say(*outcome.lines)
    studies.insist(outcome.checks)


@verb("objects runs/cells/objects.safetensors bccd/ --eps 4 --skip-bad", together=inputs.attacking)
def objects(
    *,
    weights: Annotated[Path, Argument(help=OBJECTS), inputs.checkpoint],
    pictures: Annotated[Path, Argument(help=SCENES), inputs.scenes],
    threat: o.Threat,
    arch: o.Own = None,
    part: Annotated[Literal["train", "validation", "test"], Option(help=SCENES_PART)] = "test",
    limit: Annotated[int | None, Option(min=1, help=o.LIMIT)] = None,
    steps: Annotated[int, Option(min=1, help="Steps of each attack")] = 20,
    queries: Annotated[int, Option(min=0, help=SEARCH)] = 0,
    patches: Annotated[bool, Option("--patches", help=PATCHES)] = False,
    variant: o.Variant = None,
    crafted_on: Annotated[Path | None, Option(help=CRAFTED), inputs.checkpoint] = None,
    out: Annotated[Path | None, Option(help=JSON), inputs.file_to_write] = None,
    skip_bad: o.SkipBad = False,
    cache: o.Cache = o.FOUND,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Attack an object detector with full knowledge; print mAP50 and AP by attack, and the worst.

    After Ctrl-C, run the same command to resume.
    """
    import json

    from rampart import objects as library
    from rampart.hardening.objects.attack import Budget
    from rampart.sources import Source

    home = library.home_of(weights, into_card=into_card, variant=variant)
    ball = threat.ball(rp.SceneModel.load(home) if home else None)
    source, budget = Source(pictures, None, skip_bad), Budget(steps, queries, patches)
    attack = partial(library.evaluate, part=part, limit=limit, cache=cache, device=device)
    attack = partial(attack, home=home, variant=variant)
    found = attack((weights, crafted_on), source, ball, budget)
    if out:
        out.write_text(json.dumps(library.as_json(weights, found), indent=1) + "\n")
    if home:
        data = f"{pictures.name}, {part}"
        setting = {"data": data, "threat_model": str(ball), "budget": str(budget)}
        setting |= {"command": command_line()} | ({"variant": variant} if variant else {})
        library.keep(home, found, setting, into_card=into_card)


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
    """Measure what the threat model excludes: L2 attacks, a patch, corruptions, image scaling."""
    from rampart import studies

    model = rp.Model.load(subject.model)
    study = studies.Study(rate=rate, device=device, cache=cache, command=command_line())
    study = study._replace(into_card=into_card)
    say(*studies.beyond(model, images.read(model, limit), study).lines)


@verb(
    "uses model_store/mine --images cifar10/",
    "uses model_store/mine --images cifar10/ --also-from model_store/cifar10-vgg11",
    together=inputs.purified,
)
def uses(
    subject: o.Subject,
    images: o.Sample,
    threat: o.Threat,
    limit: o.Limit = 200,
    twin: o.Twin = None,
    also_from: Annotated[list[Path] | None, Option(help=ALSO), inputs.twin] = None,
    cache: o.Cache = o.FOUND,
    into_card: o.IntoCard = False,
    device: o.Device = "auto",
) -> None:
    """Measure what the purifier is for: images without and with it, and when to switch it on."""
    from rampart import studies

    model = rp.Model.load(subject.model)
    study = studies.Study(threat.ball(model), device=device, cache=cache, twin=twin)
    study = study._replace(command=command_line(), into_card=into_card)
    say(*studies.uses(model, images.read(model, limit), study, also_from or []).lines)


class Server(NamedTuple):
    """What is known of a server that is not Rampart's."""

    protocol: Annotated[inputs.Protocol | None, Option(help=PROTOCOL)] = None
    send: Annotated[str | None, Option(help=SEND)] = None
    label: Annotated[str | None, Option(help=LABEL)] = None
    score: Annotated[str | None, Option(help=SCORE)] = None
    range: Annotated[inputs.Scaled, Option(help=RANGE)] = "unit"
    layout: Annotated[Literal["nchw", "nhwc"] | None, Option(help=LAYOUT)] = None
    output: Annotated[str | None, Option(help=OUTPUT)] = None
    header: Annotated[list[str] | None, Option(help=HEADER), inputs.header] = None

    def wire(self) -> "Wire":
        """The same in the library."""
        from rampart.hardening.attack.redteam import Wire
        from rampart.hardening.model.scaling import SCALINGS

        scaling = SCALINGS[self.range]
        known = (self.protocol, self.send, self.label, self.score)
        return Wire(*known, scaling, self.layout, self.output)

    def headers(self) -> dict[str, str]:
        """Header lines by name."""
        pairs = [line.partition(":") for line in self.header or []]
        return {name.strip(): value.strip() for name, _, value in pairs}


@verb(
    "redteam http://127.0.0.1:8080/predictions/cifar10 cifar10/",
    "redteam http://127.0.0.1:8000/v2/models/resnet/infer cifar10/ --range imagenet --target cat",
    """redteam http://127.0.0.1:80/classify cifar10/ --send '{"images": "$b64*"}' --label '$[*]'""",
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
    target: Annotated[str | None, Option(help=TARGET)] = None,
    *,
    server: Server,
    into_card: Annotated[Path | None, Option(help=ATTACKED), inputs.folder] = None,
    i_own_this_endpoint: Annotated[
        bool, Option("--i-own-this-endpoint", help="Required beyond loopback")
    ] = False,
) -> None:
    """Attack a running endpoint as a black box over HTTP. After Ctrl-C, run it again to resume."""
    from rampart.hardening.report import redteam as team
    from rampart.hardening.train.data import load

    data = load(images, train=False, size=image_size)
    where = partial(team.Endpoint, size=image_size, wire=server.wire(), headers=server.headers())
    endpoint = where(url, data.classes, owned=i_own_this_endpoint)
    run = partial(team.redteam, limit=limit, eps=eps, budget=queries, seed=seed, target=target)
    outcomes = run(endpoint, data, out, attacks=attack or ())
    say(*team.told(endpoint), team.summary(outcomes))
    if into_card:
        own = {"data": images.name, "command": command_line()}
        team.into_card(into_card, outcomes, data.classes, **own)
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


@verb("report model_store/mine")
def report(model: Annotated[Path, Argument(help=WHOSE), inputs.folder]) -> None:
    """Rewrite a model's report.html from its card, without an attack.

    It keeps the figures, and leaves out pictures and curves that need the attacked images.
    """
    from rampart.hardening.model import folder
    from rampart.hardening.model.card import Subject
    from rampart.hardening.report import page

    served = Subject("pipeline", *folder.form(model, None, None))
    say(page.write_from_card(model, served))


@verb("evidence model_store/mine --out evidence.pdf")
def evidence(
    model: Annotated[Path, Argument(help=WHOSE), inputs.folder],
    out: Annotated[Path, Option(help=REPORT), inputs.file_to_write] = EVIDENCE,
) -> None:
    """Write a test report for auditors from the model's card: what was tested, how, its limits."""
    from rampart.hardening.report import evidence

    say(f"{evidence.write(model, out)}: the figures of {model}, and what was not measured")
