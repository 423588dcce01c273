"""From the files of training to a model folder, and the whole way from images to an archive."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rampart import inputs, preflight
from rampart.calibrated import write_small
from rampart.export.archive import check_name, check_request
from rampart.handlers.engine import sha256
from rampart.hardening.model import folder as folders
from rampart.hardening.model import foreign
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.faults import Faults
from rampart.hardening.model.files import SAMPLE, SAMPLES, read_config
from rampart.hardening.model.images import Held, Images, split
from rampart.hardening.model.pipeline import load_classifier, load_purifier
from rampart.hardening.model.provenance import check_unseen
from rampart.hardening.model.purifier import Purifier
from rampart.hardening.model.wrapping import behaviour_of_code
from rampart.hardening.report import card as report
from rampart.hardening.train.data import spread
from rampart.hardening.train.loop import say
from rampart.hardening.train.provenance import collect
from rampart.hardening.train.stages import Stages, stages
from rampart.model import Model, images_to_fit
from rampart.preflight import check_place
from rampart.proposal import Plan, Proposal, Wishes, image_size, propose
from rampart.provenance import PYTHON
from rampart.sources import Source, calibration_images, sample_of
from rampart.studies import ChecksFailed, Outcome, Study, evaluate
from rampart.training import (
    Run,
    Training,
    adopt,
    pick_device,
    prove_training,
    train_from,
    train_purifier_from,
    untrained,
    usually_normalized,
)

CLASSIFIER, PURIFIER = "classifier.safetensors", "purifier.safetensors"
ARCHIVE = "archive"  # the stage that packs
COPIES = 3  # of its weights that a model folder takes while it is written
FEW, SMALL = 32, 8192  # images of which one is the sample, and its bytes at most


def assemble(
    folder: Path,
    source: Source,
    classifier: Path,
    purifier: Path | None = None,
    *,
    data_name: str = "",
    command: str = PYTHON,
    guarded: bool = False,
    tried: bool = False,
) -> Model:
    """Put what training wrote together as a calibrated model, saved in `folder`.

    Without a purifier it has the variant lean alone; with `guarded`, that one too. First all is
    tried that would fail later, unless it was `tried` before. Raises ValueError that lists what is
    wrong, as classes that differ, or held-out images that a part was trained on.
    """
    net = load_classifier(classifier)
    generator = load_purifier(purifier) if purifier else None
    if not tried:
        prove_parts(folder, source, net, generator)
    train, out = source.read(net.config.image_size)
    held = Held(out, train if len(train) else None)
    files = {"classifier": classifier} | ({"purifier": purifier} if purifier else {})
    for file in files.values():
        check_unseen(file.parent, out)
    model = Model.calibrate(
        net,
        held,
        purifier=generator,
        name=folder.name,
        data=data_name or source.data.name,
        calibrated_on=f"{source.name}, calibration split",
        guarded=guarded,
        card=past(files, command),
    )
    model.save(folder)
    write_sample(model, split(out, "validation"), folder / SAMPLE)
    images = collect(folder, list(files.values()), train, fitted=images_to_fit(held), held=out)
    model.add_to_card({"images": model.card["images"] | images})
    return model


def add_guarded(folder: Path, source: Source, *, command: str) -> None:
    """Calibrate a finished classifier as the variant guarded too; its other files stay.

    Raises ValueError where its other variants are calibrated on other images.
    """
    model = Model.load(folder)
    held = calibration_images(model, source)
    model.calibrated_on = f"{source.name}, calibration split"
    model.rank("guarded", Held(held))
    model.add_to_card({"commands": [*model.card.get("commands", []), command]})


def prove_parts(folder: Path, source: Source, net: Classifier, purifier: Purifier | None) -> None:
    """Try all that a model folder and its archive ask of their parts.

    Raises ValueError that lists what is wrong.
    """
    faults, size = Faults(), net.config.image_size
    faults.of(partial(check_name, folder.absolute().with_name(f"{folder.absolute().name}.mar")))
    need = COPIES * sum(preflight.size_of(part) for part in (net, purifier) if part)
    faults.of(partial(check_place, folder, need, "the model folder"))
    data = faults.of(partial(source.read, size))
    if data:
        faults.of(partial(preflight.check_classes, net, data[0].classes))
    faults.of(partial(preflight.try_network, net))
    if purifier:
        faults.of(partial(preflight.check_purifier, purifier, size))
    faults.tell()


def write_sample(model: Model, held: Images, file: Path) -> None:
    """Write one of the `held` images, which the endpoint labels right, to try it with: a few kB."""
    few = spread(held, FEW)
    right = [
        row
        for row, verdict in enumerate(model.predict(few))
        if verdict.index == int(few.label[row]) and verdict.decision == "accept"
    ]
    picture = Image.fromarray(few.image[right[0] if right else 0].numpy())
    write_small(picture, file, most=SMALL)


def past(files: Mapping[str, Path], command: str) -> dict[str, Any]:
    """What a card says of how the parts in `files` were trained; `command` joins them."""
    contents = {part: read_config(file) for part, file in files.items()}
    training = {
        part: str(content.get("training", f"not recorded for the {part}"))
        for part, content in contents.items()
    }
    lines = [line for content in contents.values() for line in content.get("commands", [])]
    return {
        "training": training,
        "history": contents["classifier"].get("history", []),
        "commands": list(dict.fromkeys([*lines, command])),  # one line of `harden`
    }


def harden(
    source: Source,
    out: Path,
    wishes: Wishes,
    *,
    runs: Path = Path("runs"),
    command: str = PYTHON,
    agree: Callable[[], object] = bool,
    anyway: bool = False,
) -> Outcome:
    """The whole way from images to an archive, the folder of its model beside it.

    What `wishes` leave open is proposed, and `agree` called before anything is trained. Each stage
    is done once: the same call goes on where it was interrupted, and does again only what other
    inputs change. Raises ChecksFailed, and packs nothing, for a model that is not fit to be served,
    unless it is wanted `anyway`.
    """
    plan, faults = proposed(source, wishes)
    readable = not faults.found
    faults.of(plan.check)
    faults.of(partial(check_request, out, "1.0", None, "fp32"))
    faults.of(partial(check_place, out.parent, 0, "--out"))
    with stages(runs / out.stem, plan.stages()) as job:
        way = Way(source, plan, job, command)
        way.prove(faults, agree, readable=readable)
        parts = way.parts()
        model = way.model(out.stem, parts)
        if plan.evaluate_on:
            model = way.model_with_figures(model)
        insist_fit(report.read_card(model), model, anyway=anyway)

        def pack(folder: Path) -> None:
            Model.load(model).archive(folder / out.name, sample=plan.sample, anyway=True)

        packed = job.once(ARCHIVE, archive_inputs(model, sample=plan.sample), pack)
    card, notes = report.read_card(model), deliver(model, packed / out.name, out)
    return Outcome(card, [*notes, f"\n{report.markdown(card)}\n"])


def archive_inputs(model: Path, *, sample: bool) -> dict[str, object]:
    """What an archive depends on: the files of its model, the samples where they go along."""
    files = folders.contents(model)
    return {name: file for name, file in files.items() if sample or name not in SAMPLES}


def deliver(model: Path, packed: Path, out: Path) -> list[str]:
    """Bring a model folder and its archive to where they are wanted, with words where one stays:
    of the same model, and none that this job has packed, so somebody rebuilt it since. One that
    holds a picture which the new one leaves out does not stay.
    """
    same = folders.deliver(model, out.with_suffix("")) and folders.is_of(out, model)
    if same and folders.samples_in(out) <= folders.samples_in(packed):
        earlier = packed.parent.parent.glob(f"{ARCHIVE}-*/{out.name}")
        if sha256(out) not in map(sha256, earlier):
            return [f"{out} is of these weights and stays as it is: `rampart archive` rebuilds it"]
    # Whole or not at all.
    Path(shutil.copy(packed, out.with_suffix(".partial"))).replace(out)
    return []


def insist_fit(card: Mapping[str, Any], folder: Path, *, anyway: bool) -> None:
    """Say what makes a model unfit to be served; without `anyway` raise ChecksFailed for it."""
    if not (faults := report.unfit(card)):
        return
    say(f"\n{report.markdown(dict(card))}\n")
    if not anyway:
        raise ChecksFailed(
            f"not packed: {'; '.join(faults)}. {folder} holds the model; --anyway packs it"
        )
    say(f"warning: {'; '.join(faults)}")


def proposed(source: Source, wishes: Wishes) -> tuple[Plan, Faults]:
    """A plan for a source's images, what it proposes printed, and what is wrong with them."""
    faults, row = Faults(), None
    gpu = pick_device(wishes.device).type == "cuda"
    if wishes.image_size is None:
        row = image_size(source.data, gpu=gpu)
        wishes = wishes._replace(image_size=row.value)
    assert wishes.image_size is not None
    inputs.size(wishes.image_size)
    inputs.hardening(wishes.weights, wishes.epochs, wishes.method)
    data = faults.of(partial(source.read, wishes.image_size))
    proposal = propose(wishes, data[0] if data else None, gpu=gpu)
    if data:
        for line in Proposal(proposal.plan, [*([row] if row else []), *proposal.rows]).lines():
            say(line)
    return proposal.plan, faults


class Way(NamedTuple):
    """The stages of one job, with all that they take."""

    source: Source
    plan: Plan
    job: Stages
    command: str

    def inputs(self, **others: object) -> dict[str, object]:
        """What every stage depends on, and `others`."""
        images, held = self.source.read(self.plan.net.image_size)
        return {"images": images, "held": held, **self.code(), **others}

    def code(self) -> dict[str, str]:
        """What the code of a network of your own does, since its name does not tell."""
        net = self.plan.net
        if not net.head:
            return {}
        own = untrained(net, self.source.read(net.image_size))
        return {"code": behaviour_of_code(own, net.image_size)}

    def attack_inputs(self, **others: object) -> dict[str, object]:
        """What a stage that attacks depends on, and `others`."""
        return self.inputs(threat=self.plan.recipe.threat, device=self.plan.device, **others)

    def run(self, folder: Path) -> Run:
        """A training in the folder of its stage."""
        return Run(folder, self.plan.device, self.plan.dtype, command=self.command)

    def prove(self, faults: Faults, agree: Callable[[], object], *, readable: bool) -> None:
        """Try all that the stages ask for, unless they are trained already, and have it agreed to.

        Raises ValueError that lists what is wrong, with the `faults` of other checks.
        """
        if faults.found or not faults.of(self.trained):
            plan = self.plan
            if plan.evaluate_on:
                import pyautoattack  # noqa: F401  # missing, it would be missed only after training
            run = self.run(self.job.home)
            recipe = plan.recipe._replace(precision=run.arithmetic(run.join()))
            purifier = plan.purifier if plan.purifier_epochs else None
            data = faults.of(partial(self.source.read, plan.net.image_size)) if readable else None
            if plan.weights and data:
                net = usually_normalized(plan.net._replace(classes=len(data[0].classes)))
                faults.of(partial(foreign.take, plan.weights, net))
            if plan.guarded:
                faults.of(lambda: preflight.check_guardable(Classifier(plan.net)))
            trial = Training(plan.net, recipe, run, data, purifier=purifier, option="--runs")
            prove_training(trial, faults)
            agree()

    def trained(self) -> bool:
        """Whether the classifier is trained already."""
        plan, init = self.plan, None
        if plan.weights:
            init = self.job.place("adopt", self.foreign_inputs(plan.weights)) / CLASSIFIER
            if not init.is_file():
                return False
        return not plan.recipe.epochs or self.job.done("train", self.training_inputs(init))

    def parts(self) -> dict[str, Path]:
        """The files of classifier and purifier."""
        plan, parts = self.plan, dict[str, Path]()
        if plan.weights:
            parts["classifier"] = self.foreign_classifier(plan.weights)
        if plan.recipe.epochs:
            parts["classifier"] = self.classifier(parts.get("classifier"))
        if plan.purifier_epochs:
            parts["purifier"] = self.purifier(parts["classifier"])
        return parts

    def foreign_classifier(self, weights: Path) -> Path:
        """Your weights as a classifier of ours."""
        inputs = self.foreign_inputs(weights)
        take = partial(adopt, weights, config=inputs["net"])
        return self.job.once("adopt", inputs, lambda to: take(to / CLASSIFIER)) / CLASSIFIER

    def foreign_inputs(self, weights: Path) -> dict[str, Any]:
        """What the stage that adopts your weights depends on."""
        images, _ = self.source.read(self.plan.net.image_size)
        net = self.plan.net._replace(classes=len(images.classes))
        return {"net": net, "weights": weights, **self.code()}

    def classifier(self, init: Path | None) -> Path:
        """The classifier, trained from `init` or anew."""
        train = partial(train_from, self.source, self.plan.net, self.plan.recipe, init=init)
        make = partial(train, tried=True)
        inputs = self.training_inputs(init)
        return self.job.once("train", inputs, lambda to: make(run=self.run(to))) / CLASSIFIER

    def training_inputs(self, init: Path | None) -> dict[str, object]:
        """What the stage that trains the classifier depends on."""
        net, recipe, dtype = self.plan.net, self.plan.recipe, self.plan.dtype
        return self.attack_inputs(net=net, dtype=dtype, recipe=recipe, init=init)

    def purifier(self, classifier: Path) -> Path:
        """The purifier in front of a classifier."""
        recipe = self.plan.purifier
        inputs = self.attack_inputs(classifier=classifier, recipe=recipe, dtype=self.plan.dtype)
        train = partial(train_purifier_from, self.source, classifier, recipe, tried=True)
        train = partial(train, augment=recipe.augment)
        return self.job.once("purifier", inputs, lambda to: train(self.run(to))) / PURIFIER

    def model(self, name: str, parts: dict[str, Path]) -> Path:
        """The calibrated model folder."""
        files = parts["classifier"], parts.get("purifier")

        def make(folder: Path) -> None:
            make_model = partial(assemble, guarded=self.plan.guarded, tried=True)
            make_model(folder / name, self.source, *files, command=self.command)

        inputs = self.inputs(name=name, **parts) | ({"guarded": True} if self.plan.guarded else {})
        return self.job.once("calibrate", inputs, make) / name

    def model_with_figures(self, folder: Path) -> Path:
        """A copy of the model folder with figures."""
        inputs = self.attack_inputs(n=self.plan.evaluate_on) | folders.contents(folder)
        return self.job.once("evaluate", inputs, partial(self.judge, folder)) / folder.name

    def judge(self, folder: Path, work: Path) -> None:
        """Attack validation images, shortly."""
        home = Path(shutil.copytree(folder, work / folder.name, dirs_exist_ok=True))
        model, plan = Model.load(home), self.plan
        few = sample_of(model, self.source, part="validation", limit=plan.evaluate_on)
        study = Study(plan.recipe.threat, quick=True, device=plan.device, command=self.command)
        study = study._replace(into_card=True)
        evaluate(model, few, study, notice=say)
