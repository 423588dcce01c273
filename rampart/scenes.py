"""A defended object detector as one object: `rampart.Model`, for boxes in place of classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rampart.calibrated import WEIGHTS, Calibrated, Form, tables_in, write_small
from rampart.handlers.engine import SceneOutputs
from rampart.handlers.errors import ImageError
from rampart.handlers.image import View, examine, framed, view_of
from rampart.handlers.scenes import MIN_CONFIDENCE, SceneJudge, SceneVerdict
from rampart.handlers.tasks import terms
from rampart.handlers.verdict import Calibration, Policy
from rampart.hardening.model import calibrate as ranks
from rampart.hardening.model import folder as folders
from rampart.hardening.model import provenance
from rampart.hardening.model.files import SAMPLE, read_config
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import Variant, load_purifier
from rampart.hardening.objects import defended
from rampart.hardening.objects.defended import DefendedDetector, as_variant, variants_of
from rampart.hardening.objects.detector import TASK, ObjectDetector, load
from rampart.hardening.objects.guard import Guard
from rampart.hardening.objects.scenes import Divided, Scenes, divided
from rampart.hardening.report import card as report
from rampart.preflight import check_guardable, check_purifier
from rampart.provenance import PYTHON
from rampart.sources import Source

LARGEST_SAMPLE = 65536  # bytes: objects need some pixels to be found
TOGETHER = 16  # pictures that are looked at together
Pictures = Sequence[Path | str | bytes | NDArray[np.uint8]]


class SceneModel(Calibrated):
    """Object detector, detectors of attacks and their calibrations, with a card."""

    def __init__(
        self,
        detector: ObjectDetector,
        calibrations: Mapping[Form, Calibration],
        *,
        card: Mapping[str, Any],
        folder: Path | None = None,
        radius: float | None = None,
    ) -> None:
        super().__init__(calibrations, card=card, folder=folder)
        self.detector, self.classes = detector, detector.config.classes
        self.image_size = detector.config.size
        # By default half as far as the attacks go that it was trained against, as of classifiers.
        known = self.threat.eps / 2 if self.threat.norm == "Linf" else defended.RADIUS
        self.radius = known if radius is None else radius

    def write_weights(self, file: Path) -> None:
        """Write the object detector."""
        defended.save(file, self.detector, radius=self.radius)

    @classmethod
    def load(cls, folder: Path | str) -> "SceneModel":
        """The model of a folder. Raises FileNotFoundError or ValueError that name the remedy."""
        home = Path(folder)
        pipeline, _ = defended.load(home / WEIGHTS)
        card = report.read_card(home)
        tables, radius = tables_in(home), pipeline.radius
        return cls(pipeline.detector, tables, card=card, folder=home, radius=radius)

    @classmethod
    def calibrate(
        cls,
        detector: ObjectDetector,
        held: Tensor,
        *,
        name: str = "mine",
        data: str = "pictures in memory",
        min_confidence: float = MIN_CONFIDENCE,
        calibrated_on: str = "",
        guarded: bool = False,
        card: Mapping[str, Any] | None = None,
    ) -> "SceneModel":
        """Rank held-out pictures uint8 (N, S, S, 3), letterboxed: 40 or more, 200 for 1% alarms.

        Prints what is promised, and how it fares on those of them that rank nothing. Raises
        ValueError for too few, and with `guarded`, which adds that variant, for a network whose
        gradient has no ONNX form.
        """
        detector = detector.cpu().eval().requires_grad_(False)
        if guarded:
            check_guardable(detector)
        source = drawn(held, detector.config.classes)
        content: dict[str, Any] = {"model": name, "data": data, "task": TASK}
        content |= {"training": {"detector": "not recorded"}, "history": [], "commands": [PYTHON]}
        content |= {"objects": detector.config.as_json(), "min_confidence": min_confidence}
        content |= {"max_overlap": detector.net.iou}
        content |= {"calibration_images": len(split(source, "calibration"))}
        model = cls(detector, {}, card=content | dict(card or {}))
        model.calibrated_on = calibrated_on or f"{data}, calibration split"
        wanted = {"full": detector.purifier is not None, "lean": True, "guarded": guarded}
        for variant in (v for v in defended.VARIANTS if wanted[v]):
            model.rank(variant, source)
        return model

    def rank(self, variant: Variant, held: Images) -> None:
        """Calibrate one variant on held-out pictures in an order of chance, and check its promise
        on those of them that rank nothing.

        Raises ValueError for too few.
        """
        pipeline = self.as_variant(variant, variants_of(self.detector)[variant])
        table = ranks.calibrate(pipeline, held, variant)
        self.calibrations[Form(variant)] = table
        if self.folder is not None:
            ranks.write(self.folder, table, self.calibrated_on)
        found = ranks.kept(pipeline, table, split(held, "validation"), self.rate)
        self.hold_to_promise(Form(variant), found)

    def pipeline(self, variant: Variant | None = None) -> DefendedDetector:
        """The module of a variant, frozen: a copy, so that it may go to another device."""
        chosen = self.chosen_variant(variant)
        return self.as_variant(chosen, self.calibrations[Form(chosen)].detectors)

    def as_variant(self, variant: Variant, names: tuple[str, ...]) -> DefendedDetector:
        """The module of a variant with the scores of these names, frozen: a copy."""
        return as_variant(self.detector, variant, names, self.radius)

    def predict(
        self, images: Pictures, *, policy: Policy | None = None, variant: Variant | None = None
    ) -> list[SceneVerdict]:
        """The verdicts of the endpoint on pictures: files, bytes, or pixels (H, W, 3) of any size.

        Raises ImageError, as the endpoint answers, for a picture that is none.
        """
        return self.judged([self.view(image) for image in images], policy=policy, variant=variant)

    def judged(
        self, views: Sequence[View], *, policy: Policy | None = None, variant: Variant | None = None
    ) -> list[SceneVerdict]:
        """Verdicts on what the model sees; without a frame boxes are in pixels of that."""
        judge = self.judge(policy, variant)
        pixels = torch.from_numpy(np.stack([view.pixels for view in views]))
        pipeline = self.pipeline(variant)
        with torch.no_grad():
            pieces = [pipeline(part) for part in torch.split(pixels, TOGETHER)]
        every = (torch.cat(parts).numpy() for parts in zip(*pieces, strict=True))
        return judge.of(SceneOutputs(*every), views)

    def judge(self, policy: Policy | None = None, variant: Variant | None = None) -> SceneJudge:
        """What turns the outputs of a variant's pipeline into verdicts, as the endpoint does."""
        return SceneJudge(
            self.classes,
            self.calibration(self.chosen_variant(variant)),
            policy or Policy(self.rate),
            self.identity,
            **terms(self.card, {}),
        )

    def guard(self, variant: Variant | None = None) -> Guard:
        """What flags pictures beside the object detector, at the rate that all forms promise."""
        chosen = self.chosen_variant(variant)
        return Guard(self.pipeline(chosen), self.calibration(chosen), self.rate)

    def gate(self, images: Path) -> Tensor:
        """Pictures (64, S, S, 3) of a folder in the layout of VOC or COCO for the parity gate."""
        some = divided(images, classes=self.classes).validation
        return some.spread(64).boxed(self.image_size).image

    def to_triton(self, repository: Path, **more: Any) -> Path:
        """Raises ValueError: without Rampart's code Triton would show candidates that overlap."""
        raise ValueError(
            f"{self} finds objects: Triton's onnxruntime would return them without a verdict, so"
            " use --backend python"
        )

    def to_tensorrt(self, plan: Path, **more: Any) -> str:
        """Raises ValueError: plans are of classifiers."""
        raise ValueError(
            f"{self} finds objects, but only classifiers have a TensorRT plan: serve its graph with"
            " --device cuda"
        )

    def view(self, image: Path | str | bytes | NDArray[np.uint8]) -> View:
        """What the model sees of a picture, decoded as the endpoint decodes. Raises ImageError."""
        if isinstance(image, (Path, str)):
            image = Path(image).read_bytes()
        picture = examine(image, self.image_size) if isinstance(image, bytes) else image
        view = view_of(picture, self.image_size, framed)
        if isinstance(view, ImageError):
            raise view
        return view


def twin_of(model: SceneModel, folder: Path | None) -> SceneModel | None:
    """The undefended object detector of `folder`, or of the folder beside the model's.

    Raises ValueError for one that finds other classes, or sees pictures at another size.
    """
    home = folder or (model.folder and folders.sibling(model.folder))
    if home is None:
        return None
    twin = SceneModel.load(home)
    check_twin(twin.detector, model.detector, names=(home, model), option="--twin")
    return twin


def check_twin(
    twin: ObjectDetector, detector: ObjectDetector, *, names: tuple[Path, object], option: str
) -> None:
    """Raise ValueError where an object detector cannot stand for another, both by their `names`: it
    finds other classes, or sees pictures at another size.
    """
    own, config = detector.config, twin.config
    if (config.classes, config.size) != (own.classes, own.size):
        raise ValueError(
            f"{names[0]} is not a twin of {names[1]}: it finds {', '.join(config.classes)} at"
            f" {config.size} pixels. Pass {option} with one of the same classes and size"
        )


def parts_of(source: Source, classes: Sequence[str] | None = None) -> Divided:
    """The pictures with boxes of a source by what they are for, of these classes.

    Raises FileNotFoundError or ValueError for what cannot be read, and for pictures held elsewhere.
    """
    if source.held:
        raise ValueError(
            f"--held {source.held}: leave it out. Pictures with boxes are split by {source.data}"
            " itself, into its parts train, val and test, or by a hash of their names"
        )
    return divided(source.data, classes=classes, skip_bad=source.skip_bad)


def assemble(
    folder: Path,
    source: Source,
    weights: Path,
    purifier: Path | None = None,
    *,
    data_name: str = "",
    command: str = PYTHON,
    guarded: bool = False,
) -> SceneModel:
    """Calibrate a trained object detector on a source's validation pictures; saved in `folder`.

    It has the variant lean; a `purifier` adds full, which serves the boxes of the purified view,
    and `guarded` that variant. Raises ValueError for a file without a purifier, for too few
    pictures, and for a network that cannot be `guarded`: its gradient has no ONNX form.
    """
    parts = {"detector": weights} | ({"purifier": purifier} if purifier else {})
    detector = load(weights)
    if purifier:
        generator = load_purifier(purifier)
        check_purifier(generator, detector.config.size)
        detector = detector.behind(generator)
    held = parts_of(source, detector.config.classes).validation
    contents = {part: read_config(file) for part, file in parts.items()}
    lines = [line for content in contents.values() for line in content.get("commands", [])]
    past = {
        "training": {p: str(c.get("training", "not recorded")) for p, c in contents.items()},
        "history": contents["detector"].get("history", []),
        "commands": list(dict.fromkeys([*lines, command])),  # one of `harden`
    }
    model = SceneModel.calibrate(
        detector,
        held.boxed(detector.config.size).image,
        name=folder.name,
        data=data_name or source.data.name,
        calibrated_on=ranked_on(source, held),
        guarded=guarded,
        card=past,
    )
    model.save(folder)
    provenance.carry([file.parent for file in parts.values()], folder)
    write_sample(held.picture(0)[0], folder / SAMPLE)
    return model


def add_guarded(folder: Path, source: Source, *, command: str) -> None:
    """Calibrate a finished object detector as the variant guarded too; its other files stay.

    Raises ValueError for a network whose gradient has no ONNX form, and for too few pictures.
    """
    model = SceneModel.load(folder)
    check_guardable(model.detector)
    held = parts_of(source, model.classes).validation
    model.calibrated_on = ranked_on(source, held)
    model.rank("guarded", drawn(held.boxed(model.image_size).image, model.classes))
    model.add_to_card({"commands": [*model.card.get("commands", []), command]})


def ranked_on(source: Source, held: Scenes) -> str:
    """What calibrations say of the pictures that ranked."""
    return f"{source.data.name}, {len(held)} validation pictures, calibration split"


def write_sample(pixels: NDArray[np.uint8], file: Path) -> None:
    """Write a picture to try the endpoint with: a few kB."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((256, 256))
    write_small(picture, file, most=LARGEST_SAMPLE)


def drawn(held: Tensor, classes: tuple[str, ...]) -> Images:
    """Held-out pictures in an order of chance: files lie in that in which they were taken."""
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    return Images(held[order], torch.zeros(len(held), dtype=torch.int64), classes)
