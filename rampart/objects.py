"""Object detectors from pictures with boxes, and what they are worth: behind the verbs."""

import copy
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rampart import preflight
from rampart.assembly import ARCHIVE, archive_inputs, deliver
from rampart.calibrated import WEIGHTS as MODEL_WEIGHTS
from rampart.calibrated import Form
from rampart.export import shipped
from rampart.export.archive import check_request
from rampart.export.precision import make as make_form
from rampart.export.scene_agreement import agree, found_by
from rampart.handlers.engine import SceneEngine
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import checkpoint, files
from rampart.hardening.model.card import FILE as CARD
from rampart.hardening.model.classifier import RESNETS, VGGS, ClassifierConfig
from rampart.hardening.model.faults import Faults
from rampart.hardening.model.folder import contents, variants_in
from rampart.hardening.model.images import split
from rampart.hardening.model.pipeline import Variant, load_classifier
from rampart.hardening.model.provenance import trained_on
from rampart.hardening.model.purifier import BlockPurifierConfig, of_config
from rampart.hardening.model.registry import is_factory
from rampart.hardening.objects import judge as judging
from rampart.hardening.objects.attack import Budget, patches
from rampart.hardening.objects.detector import (
    TASK,
    ObjectConfig,
    ObjectDetector,
    load,
    of_factory,
    on_classifier,
)
from rampart.hardening.objects.places import splits_name
from rampart.hardening.objects.purifier import ScenePurifierTrainer, train_scene_purifier
from rampart.hardening.objects.scenes import Boxed, Divided, Lessons, Scenes
from rampart.hardening.objects.training import ObjectRecipe, ObjectTrainer, train_objects, validate
from rampart.hardening.report.card import add_to_card, log_evaluation, read_card
from rampart.hardening.train.loop import Precision, augmentations_of, say
from rampart.hardening.train.purifier import PurifierRecipe, PurifierTrainer
from rampart.hardening.train.stages import stages
from rampart.provenance import PYTHON
from rampart.scenes import SceneModel, assemble, check_twin, drawn, parts_of
from rampart.sources import Source
from rampart.studies import ChecksFailed, Outcome, Study, keep_form
from rampart.training import Run, pick_device

WEIGHTS = "objects.safetensors"
LEAST = 0.1  # mAP50 of a detector that is worth serving
QUICK = Budget(steps=10)  # of the attacks that `harden` makes
SIZE = 256  # pixels a side, where nobody says


class Network(NamedTuple):
    """What a new object detector is built of; of one that goes on nothing of it counts."""

    arch: str = "ssd"  # as ssdlite, ssd-resnet34, fasterrcnn
    size: int = SIZE
    width: float = 1.0  # factor on the channels of a new ResNet


class Place(NamedTuple):
    """Where the whole way computes, and what it leaves."""

    runs: Path  # a folder for what the stages make
    device: str = "auto"
    dtype: Precision | None = None
    command: str = PYTHON
    sample: bool = True  # whether a held-out picture goes into the archive
    evaluate_on: int = 0  # validation pictures that are attacked
    guarded: bool = False  # whether the variant guarded is made too


def read(source: Source, classes: Sequence[str] | None = None) -> Divided:
    """The pictures of a source by what they are for, of these classes; prints what there is."""
    data = parts_of(source, classes)
    for name, part in data.parts().items():
        say(f"{source.data.name}, {name}: {part.line()}")
    if data.left_out:
        say("\n  ".join(["left out:", *data.left_out]))
    return data


def chosen_on(validation: Scenes, source: Source, run: Run) -> Scenes:
    """The validation pictures by which a run chooses its epoch.

    Raises ValueError where none of them shows an object: no epoch would be better than another.
    """
    few = validation.spread(run.validate_on)
    if any(scene.labels for scene in few.scenes):
        return few
    shown = any(scene.labels for scene in validation.scenes)
    remedy = "raise --validate-on" if shown else "list pictures with objects as its part val"
    raise ValueError(
        f"{source.data}: none of {len(few)} validation pictures shows an object, so no epoch could"
        f" be chosen: {remedy}"
    )


def begin(net: Network, classes: tuple[str, ...], init: Path | None) -> ObjectDetector:
    """An object detector as training begins with it: new, on a classifier, or going on.

    Raises ValueError where `init` does not fit the classes or the architecture.
    """
    name, backbone = splits_name(net.arch)
    if init and files.read_config(init).get("task") == TASK:
        detector = load(init)
        if detector.config.classes != classes:
            raise ValueError(
                f"--init {init} finds {', '.join(detector.config.classes)}, but the pictures show"
                f" {', '.join(classes)}: train from new weights, without --init"
            )
        return detector
    if init:
        if name == "ssdlite" or is_factory(net.arch):
            raise ValueError(
                f"--init {init}: {net.arch} has its own backbone: use --arch ssd or fasterrcnn, or"
                " leave out --init"
            )
        return on_classifier(name, load_classifier(init), classes, net.size)
    if is_factory(net.arch):
        return of_factory(net.arch, classes, net.size)
    if name != "ssdlite" and backbone not in (*RESNETS, *VGGS):
        known = ", ".join((*RESNETS, *VGGS))
        raise ValueError(f"--arch {net.arch}: {name} needs one of {known}, as {name}-resnet18")
    own = None if name == "ssdlite" else ClassifierConfig(backbone, 2, net.width, net.size)
    return ObjectDetector(ObjectConfig(name, classes, net.size, own))


def train_from(
    source: Source, net: Network, recipe: ObjectRecipe, run: Run, *, init: Path | None = None
) -> Path:
    """Train an object detector on a source's pictures; returns its file.

    `init` is the file of a classifier, whose ResNet it stands on, or of an object detector that
    goes on. Raises ValueError that lists what is wrong, before anything is trained.
    """
    where = run.join()
    torch.manual_seed(recipe.seed)
    faults = Faults()
    data = faults.of(partial(read, source))
    few = faults.of(lambda: chosen_on(data.validation, source, run)) if data else None
    classes = data.train.classes if data else ("object",)
    detector = faults.of(partial(begin, net, classes, init))
    need = preflight.WRITTEN * preflight.size_of(detector) if detector else 0
    faults.of(partial(preflight.check_place, run.out, need, "--out"))
    if detector:
        faults.of(partial(ObjectTrainer, detector, recipe, run.out))
    faults.tell()
    assert data and few and detector
    detector = detector.to(where)
    recipe = recipe._replace(
        precision=arithmetic(run, where, detector),
        after=checkpoint.digest(detector) if init else "",
    )
    validation = few.boxed(detector.config.size)
    with torch.random.fork_rng():
        trainer = ObjectTrainer(copy.deepcopy(detector), recipe, Path())
        trial = timed(trainer, trainer.ema, data.train, validation.to(where))
    shown = recipe.passes * len(data.train)
    say(trial.in_words("object detector", shown, len(validation), recipe))
    past = files.read_config(init).get("commands", []) if init else []
    return train_objects(
        detector,
        recipe,
        run.out,
        (data.train, validation),
        commands=[*past, run.command],
    )


def train_purifier_from(
    source: Source,
    weights: Path,
    recipe: PurifierRecipe,
    run: Run,
    *,
    augment: tuple[str, ...] | None = None,
) -> Path:
    """Train a purifier in front of the frozen object detector of a file; returns the purifier's.

    Without `augment` pictures are augmented as those of the detector were, where its file tells.
    Raises ValueError that lists what is wrong, before anything is trained.
    """
    where, faults, config = run.join(), Faults(), BlockPurifierConfig()
    detector = load(weights).to(where)
    data = faults.of(partial(read, source, detector.config.classes))
    few = faults.of(lambda: chosen_on(data.validation, source, run)) if data else None
    need = preflight.WRITTEN * preflight.size_of(of_config(config))
    faults.of(partial(preflight.check_place, run.out, need, "--out"))
    faults.tell()
    assert data and few
    if augment is None:
        past = augmentations_of(str(files.read_config(weights).get("training", "")))
        augment = ObjectRecipe().augment if past is None else past
    recipe = recipe._replace(precision=arithmetic(run, where, detector), augment=augment)
    validation = few.boxed(detector.config.size)
    with torch.random.fork_rng():
        trainer = ScenePurifierTrainer(copy.deepcopy(detector), config, recipe, Path())
        both = detector.behind(trainer.ema)
        trial = timed(trainer, both, data.train, validation.to(where))
    say(f"augmentation: {', '.join(augment) or 'none'}")
    say(trial.in_words("purifier", len(data.train), len(validation), recipe))
    learn = partial(train_scene_purifier, commands=[run.command])
    return learn(detector, config, recipe, run.out, (data.train, validation))


def harden(
    source: Source,
    out: Path,
    net: Network,
    recipe: ObjectRecipe,
    place: Place,
    *,
    init: Path | None = None,
    anyway: bool = False,
) -> list[str]:
    """The whole way from pictures with boxes to an archive, the folder of its model beside it.

    Each stage is done once; attacks are short, and on validation pictures. Returns what is to be
    said. Raises ChecksFailed, and packs nothing, for a detector that finds next to nothing, unless
    it is wanted `anyway`.
    """
    faults = Faults()
    data = faults.of(partial(parts_of, source))
    faults.of(partial(check_request, out, "1.0", None, "fp32"))
    faults.of(partial(preflight.check_place, out.parent, 0, "--out"))
    if data and place.guarded:
        classes = data.train.classes
        faults.of(lambda: preflight.check_guardable(begin(net, classes, init)))
    faults.tell()
    assert data
    what: dict[str, object] = {"train": data.train.digest(), "held": data.validation.digest()}

    def train(folder: Path) -> None:
        run = Run(folder, place.device, place.dtype, command=place.command)
        train_from(source, net, recipe, run, init=init)

    def calibrate(folder: Path) -> None:
        make = partial(assemble, command=place.command, guarded=place.guarded)
        make(folder / out.stem, source, weights)

    def attack(folder: Path) -> None:
        home = Path(shutil.copytree(model, folder / model.name, dirs_exist_ok=True))
        judge(home, source, recipe.threat, place)

    def pack(folder: Path) -> None:
        SceneModel.load(model).archive(folder / out.name, sample=place.sample, anyway=True)

    with stages(place.runs / out.stem, 3 + bool(place.evaluate_on)) as job:
        made = what | {"net": net, "recipe": recipe, "init": init, "dtype": place.dtype}
        weights = job.once("train", made, train) / WEIGHTS
        insist_found(weights, anyway=anyway)
        ranked = what | {"weights": weights} | ({"guarded": True} if place.guarded else {})
        model = job.once("calibrate", ranked, calibrate) / out.stem
        if place.evaluate_on:
            asked = {"n": place.evaluate_on, "threat": recipe.threat, "budget": QUICK}
            model = job.once("evaluate", asked | contents(model), attack) / out.stem
        packed = job.once(ARCHIVE, archive_inputs(model, sample=place.sample), pack)
    return deliver(model, packed / out.name, out)


def quantize(
    folder: Path,
    source: Source,
    study: Study,
    precision: files.Precision = "int8",
    *,
    limit: int = 512,
) -> Outcome:
    """Make the int8 form of every variant of a model folder and hold it to its gate.

    Raises ValueError for fp16, which object detectors do not have.
    """
    if precision != "int8":
        raise ValueError(f"{folder} finds objects: there is only int8, so leave out fp16")
    model, lines = SceneModel.load(folder), []
    boxed = pictures(source, "validation", model.detector, None)
    held = drawn(boxed.image, model.classes)
    gate = partial(
        agree,
        boxed=boxed,
        unranked=split(held, "validation"),
        threat=model.threat,
        rate=model.chosen_rate(study.rate),
    )
    data = f"{source.name}, validation"
    for variant in model.variants:
        own = partial(gate, detector=model.pipeline(variant).detector)
        found = make_form(folder, variant, precision, held, own, source=data, limit=limit)
        lines.append(f"{variant}: {found}")
        keep_form(model, Form(variant, precision), found, data, study)
    return Outcome(model.card, lines)


def judge(home: Path, source: Source, threat: Threat, place: Place) -> None:
    """Attack some validation pictures, shortly; figures go into the card of the model."""
    few, weights = place.evaluate_on, home / MODEL_WEIGHTS
    attack = partial(evaluate, part="validation", limit=few, cache=place.runs / "found")
    found = attack((weights, None), source, threat, QUICK, device=place.device)
    setting = {"data": f"{source.data.name}, validation", "threat_model": str(threat)}
    setting |= {"budget": str(QUICK), "command": place.command}
    keep(home, found, setting, into_card=True)


def insist_found(weights: Path, *, anyway: bool) -> None:
    """Raise ChecksFailed where a detector finds next to nothing; say so where it is wanted."""
    rows = files.read_config(weights)["history"][-1]
    best = max(row["clean"] for row in rows)
    if best >= LEAST:
        return
    fault = f"the detector finds next to nothing: mAP50 {best:.3f} on its validation pictures"
    if not anyway:
        raise ChecksFailed(f"not packed: {fault}. Train for longer, or pass --anyway")
    say(f"warning: {fault}")


def timed(
    trainer: ObjectTrainer | PurifierTrainer, net: ObjectDetector, scenes: Scenes, validation: Boxed
) -> preflight.Trial:
    """What a step takes, and a validation of `net`. The trainer is then to be thrown away."""
    recipe = trainer.recipe
    lessons = Lessons(scenes, net.config.size, 1, trainer.device)
    order = {"seed": recipe.seed, "epoch": 0, "skip": 0}
    batch = next(lessons.shuffled(recipe.batch_size, augmentations=recipe.augment, **order))
    for _ in range(2):  # the first one prepares much
        start = time.monotonic()
        float(trainer.step(batch, 0.5))
        step = time.monotonic() - start
    start = time.monotonic()
    validate(net, validation.spread(1), recipe.threat)
    look = time.monotonic() - start
    return preflight.Trial(step, look, preflight.peak(trainer.device))


def pictures(source: Source, part: str, detector: ObjectDetector, limit: int | None) -> Boxed:
    """The pictures of one part of a source as a detector sees them, at most `limit`."""
    data = parts_of(source, detector.config.classes)
    if part not in data.parts():
        raise ValueError(f"{source.data} has no part {part}: pass --part validation")
    scenes = data.parts()[part]
    return (scenes.spread(limit) if limit else scenes).boxed(detector.config.size)


def evaluate(
    files: tuple[Path, Path | None],
    source: Source,
    threat: Threat,
    budget: Budget,
    *,
    part: str = "test",
    limit: int | None = None,
    cache: Path | None = None,
    home: Path | None = None,
    variant: Variant | None = None,
    device: str = "auto",
    notice: Callable[[str], None] = say,
) -> judging.Judgement:
    """Attack the object detector of `files[0]`, with what is crafted on `files[1]` if it is given.

    A `variant` of its model folder `home`, by default the best, is what is attacked: behind a
    purifier where that has one, and flagging. The graph that is shipped of that gets rows of its
    own. Each row is told to `notice` as it is known.
    """
    where = pick_device(device)
    model = SceneModel.load(home) if home else None
    detector = (model.pipeline(variant).detector if model else load(files[0])).to(where)
    other = load(files[1]).to(where) if files[1] else None
    if other and files[1]:
        check_twin(other, detector, names=(files[1], files[0]), option="--crafted-on")
    boxed = pictures(source, part, detector, limit)
    if part != "train":
        boxed = unseen(files[0].parent, boxed)
    names = boxed.classes
    behind = "" if detector.purifier is None else ", behind its purifier,"
    notice(f"{files[0].name}{behind} on {len(boxed)} pictures ({part}), {threat}, {budget}")
    notice(judging.table({}, names)[0])
    judgement = judging.judge(
        detector,
        boxed,
        threat,
        budget,
        source=other,
        guard=model.guard(variant) if model else None,
        served=served_from(model, variant) if model else None,
        cache=cache,
        notice=lambda name, row: notice(judging.line(name, row)),
    )
    if judgement.blind:
        notice(
            f"warning: {judgement.blind} of {len(boxed)} pictures have no gradient, so gradient"
            " attacks prove nothing: pass --queries, or --crafted-on with a similar network"
        )
    return judgement


def unseen(folder: Path, boxed: Boxed) -> Boxed:
    """Those pictures that the weights in `folder` were not trained on, as far as these tell.

    Raises ValueError where none is left.
    """
    known = trained_on(folder, boxed)
    if known is None or not known.any():
        return boxed
    if known.all():
        raise ValueError(
            f"{folder} was trained on all of these {len(boxed)} pictures, by their pixels: pass"
            " others, or --part train to measure on these"
        )
    say(f"left out, because {folder} was trained on them, by their pixels: {known.sum()} pictures")
    return boxed[(~known).nonzero()[0].tolist()]


def served_from(model: SceneModel, variant: Variant | None) -> judging.Finding | None:
    """What the graph finds that a model folder ships to be served; None where it ships none."""
    assert model.folder
    graph = shipped.find(model.folder, *model.form(variant))
    if graph is None:
        return None
    return partial(found_by, SceneEngine(graph.file), overlap=model.detector.net.iou)


def arithmetic(run: Run, where: torch.device, detector: ObjectDetector) -> Precision:
    """What a run computes in; by default fp32 for SSDLite, whose layers overflowed in bf16."""
    narrow = detector.config.arch == "ssdlite" and run.dtype is None
    return "fp32" if narrow else run.arithmetic(where)


def home_of(
    weights: Path, *, into_card: bool = False, variant: Variant | None = None
) -> Path | None:
    """The folder of the model that a file of weights is of, if it is of one.

    Raises ValueError where its card or a variant of it is wanted and there is none.
    """
    home = weights.parent
    if weights.name == MODEL_WEIGHTS and (home / CARD).is_file():
        if variant and variant not in variants_in(home):
            raise ValueError(f"{home} is not calibrated as {variant}: leave out --variant")
        return home
    if into_card or variant:
        option = "--into-card" if into_card else f"--variant {variant}"
        raise ValueError(
            f"{option}: {weights} is not in a model folder: pass the {MODEL_WEIGHTS} of a folder"
            " that `rampart calibrate` made"
        )
    return None


def keep(
    home: Path, judgement: judging.Judgement, setting: Mapping[str, Any], *, into_card: bool
) -> None:
    """Note in a model's log that it was attacked in such a `setting`, and put figures into its card
    where they are wanted there. The card keeps figures of more pictures, and of stronger attacks,
    in the same setting.
    """
    count = judgement.rows[judging.CLEAN].n
    log_evaluation(home, {"data": setting["data"], "n": count, "command": setting["command"]})
    if not into_card:
        return
    # Of a variant that was asked for by name: those of what is served stand beside them.
    entry = f"attacks, {setting['variant']}" if "variant" in setting else "attacks"
    old = read_card(home).get(entry, {})
    figures = as_json(home / MODEL_WEIGHTS, judgement) | {"n": count} | dict(setting)
    del figures["task"]  # the card says it
    if all(old.get(name) == setting[name] for name in ("data", "threat_model")):
        if old["n"] > count:
            say(f"the card keeps its figures on {old['n']} pictures: these are on only {count}")
            return
        if fewer(spent(figures), spent(old)):
            say(f"the card keeps its figures of {spent(old)}: these are of only {spent(figures)}")
            return
    add_to_card(home, {entry: figures})


def spent(entry: Mapping[str, Any]) -> Budget:
    """What the attacks of a card's entry cost."""
    steps, queries = map(int, re.findall(r"\d+", entry["budget"]))
    return Budget(steps, queries, patches=any(name in entry["rows"] for name in patches()))


def fewer(budget: Budget, other: Budget) -> bool:
    """Whether a budget has less of anything than another."""
    return any(mine < theirs for mine, theirs in zip(budget, other, strict=True))


def as_json(file: Path, judgement: judging.Judgement) -> dict[str, object]:
    """The figures of a judgement, as cards have them."""
    names = load(file).config.classes
    rows = {name: row.as_json(names) for name, row in judgement.rows.items()}
    return {"task": TASK, "rows": rows, "without_gradient": judgement.blind}
