"""From the files of training to a model folder, and the whole way from images to an archive."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rampart import inputs
from rampart.export import archive as archives
from rampart.hardening.model import checkpoint
from rampart.hardening.model import folder as folders
from rampart.hardening.model.classifier import ClassifierConfig
from rampart.hardening.model.files import SAMPLE
from rampart.hardening.model.images import Held, Images, split
from rampart.hardening.model.pipeline import load_classifier, load_purifier
from rampart.hardening.report import card as report
from rampart.hardening.train.data import spread
from rampart.hardening.train.loop import Precision, Recipe
from rampart.hardening.train.provenance import collect
from rampart.hardening.train.purifier import PurifierRecipe
from rampart.hardening.train.stages import Stages, stages
from rampart.model import Model, images_to_fit
from rampart.provenance import PYTHON
from rampart.sources import Source, sample_of
from rampart.studies import Outcome, Study, evaluate
from rampart.training import Run, adopt, train_from, train_purifier_from

CLASSIFIER, PURIFIER = "classifier.safetensors", "purifier.safetensors"
FEW, SMALL = 32, 8192  # images of which one is the sample, and its bytes at most
MANY = 100  # validation images that `harden` attacks


def assemble(
    folder: Path,
    source: Source,
    classifier: Path,
    purifier: Path | None = None,
    *,
    data_name: str = "",
    command: str = PYTHON,
) -> Model:
    """Put what training wrote together as a calibrated model, saved in `folder`.

    Without a purifier its one variant is lean. Raises ValueError where classes differ.
    """
    net = load_classifier(classifier)
    generator = load_purifier(purifier) if purifier else None
    train, out = source.read(net.config.image_size)
    held = Held(out, train if len(train) else None)
    files = {"classifier": classifier} | ({"purifier": purifier} if purifier else {})
    model = Model.calibrate(
        net,
        held,
        purifier=generator,
        name=folder.name,
        data=data_name or source.data.name,
        calibrated_on=f"{source.name}, calibration split",
        card=past(files, command),
    )
    model.save(folder)
    write_sample(model, split(out, "validation"), folder / SAMPLE)
    images = collect(folder, list(files.values()), train, fitted=images_to_fit(held), held=out)
    model.add_to_card({"images": images})
    return model


def write_sample(model: Model, held: Images, file: Path) -> None:
    """Write one of the `held` images, which the endpoint labels right, to try it with: a few kB."""
    few = spread(held, FEW)
    right = [
        row
        for row, verdict in enumerate(model.predict(few))
        if verdict.index == int(few.label[row]) and verdict.decision == "accept"
    ]
    picture = Image.fromarray(few.image[right[0] if right else 0].numpy())
    while True:
        picture.save(file, optimize=True)
        if file.stat().st_size <= SMALL:
            return
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))


def past(files: Mapping[str, Path], command: str) -> dict[str, Any]:
    """What a card says of how the parts in `files` were trained; `command` joins them."""
    contents = {part: checkpoint.read(file)[0] for part, file in files.items()}
    training = {
        part: str(content.get("training", f"told by no file of {part}"))
        for part, content in contents.items()
    }
    lines = [line for content in contents.values() for line in content.get("commands", [])]
    return {
        "training": training,
        "history": contents["classifier"].get("history", []),
        "commands": list(dict.fromkeys([*lines, command])),  # one line of `harden`
    }


class Plan(NamedTuple):
    """What the whole way is to do."""

    net: ClassifierConfig
    recipe: Recipe
    weights: Path | None = None  # yours, to begin with
    purifier_epochs: int = 2  # 0: no purifier
    evaluate_on: int = MANY  # validation images to attack; 0: none
    dtype: Precision | None = None
    device: str = "auto"
    sample: bool = True  # whether a held-out picture goes into the archive

    def check(self, out: Path) -> None:
        """Raise ValueError where nothing would come of it."""
        inputs.hardening(self.weights, self.recipe.epochs, self.recipe.method)
        archives.check_name(out)

    def stages(self) -> int:
        """How many stages that makes."""
        asked = (self.weights, self.recipe.epochs, self.purifier_epochs, self.evaluate_on)
        return sum(map(bool, asked)) + 2  # calibrate, archive


def harden(
    source: Source, out: Path, plan: Plan, *, runs: Path = Path("runs"), command: str = PYTHON
) -> Outcome:
    """The whole way from images to an archive, the folder of its model beside it.

    Each stage is done once: the same call goes on where it was interrupted, and does again only
    what other inputs change.
    """
    plan.check(out)
    with stages(runs / out.stem, plan.stages()) as job:
        way = Way(source, plan, job, command)
        parts = way.parts()
        model = way.model(out.stem, parts)
        if plan.evaluate_on:
            model = way.model_with_figures(model)

        def pack(folder: Path) -> None:
            Model.load(model).archive(folder / out.name, sample=plan.sample)

        packed = job.once("archive", way.archive_inputs(model), pack)
    same = folders.deliver(model, out.with_suffix("")) and folders.is_of(out, model)
    if not same:  # whole or not at all
        partial_copy = shutil.copy(packed / out.name, out.with_suffix(".partial"))
        Path(partial_copy).replace(out)
    card = report.read_card(model)
    note = f"{out} is of these weights and stays as it is: `rampart archive` builds it anew"
    return Outcome(card, [*([note] if same else []), f"\n{report.markdown(card)}\n"])


class Way(NamedTuple):
    """The stages of one job, with all that they take."""

    source: Source
    plan: Plan
    job: Stages
    command: str

    def inputs(self, **others: object) -> dict[str, object]:
        """What every stage depends on, and `others`."""
        images, held = self.source.read(self.plan.net.image_size)
        return {"images": images, "held": held, **others}

    def attack_inputs(self, **others: object) -> dict[str, object]:
        """What a stage that attacks depends on, and `others`."""
        return self.inputs(threat=self.plan.recipe.threat, device=self.plan.device, **others)

    def archive_inputs(self, model: Path) -> dict[str, object]:
        """What an archive depends on: the files of its model, the sample where it goes along."""
        files = folders.contents(model)
        return {name: file for name, file in files.items() if self.plan.sample or name != SAMPLE}

    def run(self, folder: Path) -> Run:
        """A training in the folder of its stage."""
        return Run(folder, self.plan.device, self.plan.dtype, command=self.command)

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
        images, _ = self.source.read(self.plan.net.image_size)
        net = self.plan.net._replace(classes=len(images.classes))
        take, inputs = partial(adopt, weights, config=net), {"net": net, "weights": weights}
        return self.job.once("adopt", inputs, lambda to: take(to / CLASSIFIER)) / CLASSIFIER

    def classifier(self, init: Path | None) -> Path:
        """The classifier, trained from `init` or anew."""
        net, recipe, dtype = self.plan.net, self.plan.recipe, self.plan.dtype
        inputs = self.attack_inputs(net=net, dtype=dtype, recipe=recipe, init=init)
        train = partial(train_from, self.source, net, recipe, init=init)
        return self.job.once("train", inputs, lambda to: train(run=self.run(to))) / CLASSIFIER

    def purifier(self, classifier: Path) -> Path:
        """The purifier in front of a classifier."""
        recipe = PurifierRecipe(self.plan.recipe.threat, self.plan.purifier_epochs)
        inputs = self.attack_inputs(classifier=classifier, recipe=recipe, dtype=self.plan.dtype)
        train = partial(train_purifier_from, self.source, classifier, recipe)
        return self.job.once("purifier", inputs, lambda to: train(self.run(to))) / PURIFIER

    def model(self, name: str, parts: dict[str, Path]) -> Path:
        """The calibrated model folder."""
        files = parts["classifier"], parts.get("purifier")

        def make(folder: Path) -> None:
            assemble(folder / name, self.source, *files, command=self.command)

        return self.job.once("calibrate", self.inputs(name=name, **parts), make) / name

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
        evaluate(model, few, study)
