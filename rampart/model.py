"""A defended classifier as one object: what training made, what attacks measure, what is served.

Here the rooms meet: weights and figures come from `hardening`, files from `export`, verdicts from
`handlers`.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rampart.calibrated import WEIGHTS, Calibrated, Form, Gate, tables_in
from rampart.export.precision import lower
from rampart.export.shipped import check_made
from rampart.handlers.engine import Engine
from rampart.handlers.image import as_png, decode
from rampart.handlers.tasks import CLASSIFY
from rampart.handlers.verdict import Calibration, Judge, Policy, Verdict
from rampart.hardening.attack import victims
from rampart.hardening.attack.ladder import Budget
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim
from rampart.hardening.judge import evaluate as judge
from rampart.hardening.judge.evaluate import Evaluation
from rampart.hardening.model import calibrate as ranks
from rampart.hardening.model import folder as folders
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.detectors import FITTED, FULL, PROBED
from rampart.hardening.model.files import Precision, ranges_file, read_contents
from rampart.hardening.model.images import Held, Images
from rampart.hardening.model.pipeline import DefendedClassifier, Variant
from rampart.hardening.model.purifier import Purifier
from rampart.hardening.report import card as report
from rampart.hardening.train.data import Folder, spread, survey
from rampart.hardening.train.loop import say
from rampart.preflight import check_classes, check_guardable
from rampart.provenance import PYTHON
from rampart.training import beside_chance, pick_device

CPU = torch.device("cpu")
FOUND = Path("runs/found")  # where what attacks found is kept

Pixels = NDArray[np.uint8] | Tensor  # (N, H, W, 3)
Pictures = Images | Pixels | Sequence[Path | str | bytes]


class Figures(NamedTuple):
    """What an evaluation found; `rows` are its figures as a card lists them."""

    evaluation: Evaluation
    rows: list[dict[str, Any]]

    def table(self) -> str:
        """The figures with their 95% intervals, aligned."""
        return report.table(self.rows)


class Model(Calibrated):
    """Classifier, purifier, detectors and their calibrations, with a card.

    `whole` holds all parts there are; `pipeline` picks those of a variant. `folder` is where the
    model was saved or loaded, and None before.
    """

    def __init__(
        self,
        pipeline: DefendedClassifier,
        classes: tuple[str, ...],
        calibrations: Mapping[Form, Calibration],
        *,
        card: Mapping[str, Any],
        folder: Path | None = None,
    ) -> None:
        super().__init__(calibrations, card=card, folder=folder)
        self.whole, self.classes = pipeline, classes
        self.classifier, self.purifier = pipeline.classifier, pipeline.purifier
        self.image_size = pipeline.classifier.config.image_size  # pixels a side

    def write_weights(self, file: Path) -> None:
        """Write all parts there are."""
        pipelines.save(file, self.whole, self.classes)

    @classmethod
    def load(cls, folder: Path | str) -> "Model":
        """The model of a folder. Raises FileNotFoundError or ValueError that name the remedy."""
        home = Path(folder)
        if read_contents(home / WEIGHTS).task != CLASSIFY:
            raise ValueError(
                f"{home} finds objects: `rampart objects` measures it, and in Python"
                " rampart.SceneModel loads it"
            )
        whole, classes = pipelines.load_whole(home / WEIGHTS)
        return cls(whole, classes, tables_in(home), card=report.read_card(home), folder=home)

    @classmethod
    def calibrate(
        cls,
        classifier: Classifier,
        held: Held | Images,
        *,
        purifier: Purifier | None = None,
        name: str = "mine",
        data: str = "images in memory",
        calibrated_on: str = "",
        guarded: bool = False,
        threat: Threat | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> "Model":
        """Put the parts together and rank the held-out images: 40 or more, 200 for 1% alarms.

        `threat` is what the model is evaluated against; by default what the classifier was trained
        against, else Linf 8/255. `guarded` steps half as far. Prints what is promised, and how it
        fares on validation images, which rank nothing. The feature distance is fitted on training
        images where `held` has them, since every split of the others is measured, combined or
        ranked on. Raises ValueError for too few images, and with `guarded`, which adds that
        variant, for a network whose gradient has no ONNX form.
        """
        source = held if isinstance(held, Held) else Held(held)
        check_classes(classifier, source.images.classes)
        whole = one_module(classifier, purifier, source)
        content: dict[str, Any] = {
            "model": name,
            "data": data,
            "training": {"classifier": classifier.trained or "not recorded"},
        }
        content |= {"threat_model": str(threat)} if threat else {}
        content |= {"history": [], "classifier": classifier.config._asdict(), "commands": [PYTHON]}
        content |= {"calibration_images": len(source.calibration), "images": source.sets}
        model = cls(whole, source.images.classes, {}, card=content | dict(card or {}))
        model.calibrated_on = calibrated_on or f"{data}, calibration split"
        model.set_radius()
        wanted = {"full": purifier is not None, "lean": True, "guarded": guarded}
        for variant in (v for v in folders.VARIANTS if wanted[v]):
            model.rank(variant, source)
        model.card["accuracy"] = beside_chance(classifier, source.images)
        say(report.accuracy_in_words(model.card["accuracy"]))
        return model

    def set_radius(self) -> None:
        """Let consistency step half as far as the attacks go that the network was trained against:
        what is left of the radius after that is what rejection can protect.
        """
        if self.threat.norm == "Linf":
            self.whole.detectors.get_buffer("consistency.radius").fill_(self.threat.eps / 2)

    def rank(self, variant: Variant, held: Held) -> None:
        """Calibrate one variant on held-out images, and check its promise on validation images.

        Raises ValueError for too few images, and for a network whose gradient has no ONNX form.
        """
        pipeline = pipelines.as_variant(self.whole, variant)
        if PROBED in pipeline.detectors.needs:
            check_guardable(self.classifier)
        table = ranks.calibrate(pipeline, held.images, variant)
        self.calibrations[Form(variant)] = table
        if self.folder is not None:
            ranks.write(self.folder, table, self.calibrated_on)
        found = ranks.kept(pipeline, table, held.validation, self.rate)
        self.hold_to_promise(Form(variant), found)

    def pipeline(self, variant: Variant | None = None) -> DefendedClassifier:
        """The module of a variant, frozen: a copy, so that it may go to another device."""
        return copy.deepcopy(pipelines.as_variant(self.whole, self.chosen_variant(variant)))

    def predict(
        self, images: Pictures, *, policy: Policy | None = None, variant: Variant | None = None
    ) -> list[Verdict]:
        """The verdicts of the endpoint on images: pictures (files or bytes) or pixels (N, H, W, 3).

        Raises ImageError, as the endpoint answers, for a picture that is none.
        """
        chosen = self.chosen_variant(variant)
        pixels, pipeline = self.pixels(images), self.pipeline(chosen)
        with torch.no_grad():
            pieces = [pipeline(part) for part in torch.split(pixels, 128)]
        outputs = [torch.cat([piece[i] for piece in pieces]).numpy() for i in range(3)]
        table, terms = self.calibration(chosen), policy or Policy(self.rate)
        return Judge(self.classes, table, terms, self.identity).verdicts(*outputs)

    def gate(self, images: Path) -> Tensor:
        """Images (64, H, W, 3) of a file or folder for the parity gate."""
        found, _ = survey(images, train=False, size=self.image_size, stream=True)
        return spread(found, 64).image

    def pixels(self, images: Pictures) -> Tensor:
        """Images as uint8 (N, H, W, 3) at the model's size, decoded as the endpoint decodes."""
        if isinstance(images, Images):
            return images.image.cpu()
        if isinstance(images, Tensor):
            images = images.cpu().numpy()
        if isinstance(images, np.ndarray):
            fitting = images.shape[1:] == (self.image_size, self.image_size, 3)
            if images.dtype == np.uint8 and fitting:
                return torch.from_numpy(images)
            images = [as_png(image) for image in images]
        each = [p if isinstance(p, bytes) else Path(p).read_bytes() for p in images]
        return torch.from_numpy(np.stack([decode(data, self.image_size) for data in each]))

    def engine(
        self, variant: Variant, precision: Precision = "fp32", *, threads: int = 0
    ) -> Engine:
        """The exported graph of a variant in ONNX Runtime, on the CPU; 0 threads are all."""
        if precision == "fp32":
            return to_engine(self.pipeline(variant), threads=threads)
        with self.on_disk() as folder:
            check_made(folder, variant, precision)
            ranges = ranges_file(folder, variant)
            return to_engine(self.pipeline(variant), precision, ranges, threads=threads)

    def victims(
        self, *, rate: float, device: torch.device = CPU, twin: Classifier | None = None
    ) -> list[Victim]:
        """What is attacked: classifier, variants that reject at `rate`, an undefended twin."""
        net = copy.deepcopy(self.classifier).to(device)
        out = [victims.label_victim("classifier", net, victims.fingerprint(net))]
        for variant in self.variants:
            pipeline, engine = self.pipeline(variant), self.engine(variant)
            digest = victims.fingerprint(pipeline)
            arm = partial(victims.pipeline_victim, pipeline.to(device), self.calibration(variant))
            out.append(arm(digest, rate=rate, engine=engine))
        if twin:
            other = twin.to(device)
            out.append(victims.label_victim("undefended", other, victims.fingerprint(other)))
        return out

    def lower_victims(
        self, precision: Precision, *, rate: float, device: torch.device = CPU
    ) -> list[Victim]:
        """The graphs of the variants in fp16 or int8."""
        out = []
        for variant in self.variants:
            engine = self.engine(variant, precision)
            table, pipeline = self.calibration(variant, precision), self.pipeline(variant)
            digest = victims.fingerprint(pipeline, engine.digest)
            graph = victims.StraightThrough(pipeline.to(device), engine)
            arm = partial(victims.pipeline_victim, graph, table, digest)
            out.append(arm(precision=precision, rate=rate, engine=engine))
        return out

    def evaluate(
        self,
        images: Images | Folder,
        budget: Budget | None = None,
        *,
        threat: Threat | None = None,
        rate: float = Policy.false_alarm_rate,
        only: Sequence[str] = (),
        targets: Sequence[Victim] | None = None,
        data: str = "images in memory",
        cache: Path = FOUND,
        device: str = "auto",
        command: str = PYTHON,
    ) -> Figures:
        """Attack classifier and variants with full knowledge, within `budget` for an image.

        By default `threat` is the model's own. `only` names attacks, all where it is empty;
        `targets` stand in place of `victims`; `cache` keeps what attacks found. Raises ValueError
        for other classes or an unknown attack.
        """
        import pyautoattack  # noqa: F401  # missing, it would be missed only after many minutes

        where = pick_device(device)
        chosen = images.whole().to(where)
        self.check_classes(chosen)
        everyone = list(targets or self.victims(rate=rate, device=where))
        within = threat or self.threat, budget or Budget()
        attack = partial(judge.evaluate, everyone, chosen, *within)
        result = attack(rate=rate, folder=cache, only=list(only)).on(data)
        row = partial(report.row, data=data, command=command, rate=rate)
        return Figures(result, list(map(row, result.metrics)))

    def check_classes(self, *images: Images | Folder) -> None:
        """Raise ValueError where images have other classes than the model."""
        for some in images:
            if (classes := some.classes) != self.classes:
                raise ValueError(
                    f"the images have the classes {classes}, the model {self.classes}: pass images"
                    " of the model's classes, in its order"
                )

    def to_triton(
        self, repository: Path, *, form: Form | None = None, version: int = 1, images: Gate = None
    ) -> Path:
        """Write the model into a Triton model repository; returns its folder there."""
        from rampart.export.to_triton import to_triton

        write = partial(to_triton, repository=repository, version=version)
        return self.write(write, form, images)

    def to_tensorrt(self, plan: Path, *, form: Form | None = None, images: Gate = None) -> str:
        """Build a TensorRT plan on its GPU; returns what the parity gate saw."""
        from rampart.export.to_tensorrt import to_tensorrt

        chosen = form or self.form()
        if chosen.precision == "int8":
            raise ValueError("int8 is for CPUs: build the plan with --precision fp32 or fp16")
        return self.write(partial(to_tensorrt, plan=plan), chosen, images)


def one_module(classifier: Classifier, purifier: Purifier | None, held: Held) -> DefendedClassifier:
    """The parts as one module, frozen, its feature distance fitted on training images if any."""
    whole = DefendedClassifier(classifier.cpu(), purifier and purifier.cpu(), FULL)
    whole = whole.eval().requires_grad_(False)
    whole.detectors.fit(classifier, images_to_fit(held))
    return whole


def images_to_fit(source: Held) -> Images:
    """The images that detectors are fitted on: of training, else of validation."""
    if source.train is not None and len(source.train):
        return spread(source.train, FITTED)
    return source.validation


def to_engine(
    pipeline: DefendedClassifier,
    precision: Precision = "fp32",
    ranges: Path = Path(),
    *,
    threads: int = 0,
) -> Engine:
    """The exported graph of a pipeline in ONNX Runtime, on the CPU; 0 threads are all.

    int8 takes its activation ranges from the file `ranges`.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = lower(pipeline, precision, Path(folder) / "graph.onnx", ranges)
        return Engine(graph, threads=threads)


def twin_of(model: Model, folder: Path | None) -> Classifier | None:
    """The undefended network of `folder`, or of the folder beside the model's."""
    home = folder or (model.folder and folders.sibling(model.folder))
    return pipelines.load_classifier(home / WEIGHTS) if home else None
