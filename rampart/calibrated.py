"""A calibrated model as one object, whatever its task: its forms, its card, its files.

Here the rooms meet: weights and figures come from `hardening`, files from `export`, verdicts from
`handlers`.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from torch import Tensor

from rampart.export import archive as archives
from rampart.export.shipped import AnyParity
from rampart.handlers.verdict import Calibration, Policy
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import calibrate as ranks
from rampart.hardening.model import folder as folders
from rampart.hardening.model import promise
from rampart.hardening.model.card import joined
from rampart.hardening.model.files import Precision, load_variant
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.promise import PromiseCheck
from rampart.hardening.report import card as report
from rampart.hardening.train.data import Folder, spread
from rampart.hardening.train.loop import draw, say

WEIGHTS = "weights.safetensors"

Gate = Images | Folder | Tensor | None  # 64 of them for the parity gate, else crops of a photograph
T = TypeVar("T")


class Form(NamedTuple):
    """What is exported of a model."""

    variant: Variant
    precision: Precision = "fp32"

    def __str__(self) -> str:
        return f"{self.variant}, {self.precision}"


class Calibrated:
    """Calibrations of a model by form, with its card.

    `folder` is where it was saved or loaded, and None before. A subclass holds the weights, and
    says what becomes of a picture.
    """

    classes: tuple[str, ...]

    def __init__(
        self,
        calibrations: Mapping[Form, Calibration],
        *,
        card: Mapping[str, Any],
        folder: Path | None = None,
    ) -> None:
        self.calibrations = dict(calibrations)
        self.card, self.folder = dict(card), folder
        self.calibrated_on = ""  # what calibration files say; those of a loaded model stay

    def write_weights(self, file: Path) -> None:
        """Write the weights, with all it takes to rebuild every variant."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.folder or self.card.get("model", "the model"))

    @property
    def identity(self) -> dict[str, str]:
        """Name and version, as its verdicts give them."""
        return {"name": str(self.card["model"]), "version": "1.0"}

    @property
    def threat(self) -> Threat:
        """What it was first evaluated against; before that, what it was trained against."""
        training = self.card.get("training", {})
        trained = training.get("classifier") or training.get("detector")
        told = self.card.get("threat_model") or trained
        return Threat.parse(str(told)) or Threat()

    @property
    def rate(self) -> float:
        """The share of false alarms that all its calibrations can promise."""
        return max(promise.finest_rate(table.images) for table in self.calibrations.values())

    def chosen_rate(self, rate: float | None) -> float:
        """`rate`, or what the model can promise."""
        return self.rate if rate is None else rate

    def hold_to_promise(self, form: Form, found: PromiseCheck) -> None:
        """Say how the promise of a form fared, and put it into the card."""
        if form.precision == "fp32":
            say(f"{form.variant} promises {promise.in_words(found.rate, found.ranked)}")
        say(f"{form}: {found.in_words()}")
        rows = self.card.get("promise", {}) | {str(form): found.row()}
        self.add_to_card({"promise": rows})

    @property
    def variants(self) -> list[Variant]:
        """Those it is calibrated for, `full` first."""
        return [v for v in folders.VARIANTS if Form(v) in self.calibrations]

    @property
    def best_variant(self) -> Variant:
        """What is taken where none is asked for: what the ablation chose, else `full`."""
        return folders.best_variant(self.card, self.variants)

    def chosen_variant(self, variant: Variant | None) -> Variant:
        """`variant`, or the best. Raises ValueError where the model is not calibrated for it."""
        if variant and variant not in self.variants:
            raise ValueError(f"{self} is not calibrated as {variant}: leave out --variant")
        return variant or self.best_variant

    def form(self, variant: Variant | None = None, precision: Precision | None = None) -> Form:
        """What is exported where less is said: the best variant, in int8 if that is as robust."""
        chosen = self.chosen_variant(variant)
        if precision or self.folder is None:
            return Form(chosen, precision or "fp32")
        return Form(chosen, folders.best_precision(self.folder, chosen))

    def calibration(self, variant: Variant, precision: Precision = "fp32") -> Calibration:
        """The ranks of a variant in a precision. Raises ValueError where there are none."""
        if Form(variant, precision) not in self.calibrations:
            raise ValueError(
                f"{self} is not calibrated as {variant} in {precision}: `rampart quantize` does it"
            )
        return self.calibrations[Form(variant, precision)]

    def save(self, folder: Path | str) -> Path:
        """Write the model as a folder: weights, a calibration for each variant, a card.

        What stood there of another model goes once all of it is written; what was measured of the
        same one stays.
        """
        target = Path(folder)
        with self.on_disk() as home:
            if home.resolve() != target.resolve():
                folders.deliver(home, target)
        self.folder = target
        return target

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """A folder that holds the model: its own, or one that goes again."""
        if self.folder is not None:
            yield self.folder
            return
        with tempfile.TemporaryDirectory() as scratch:
            home = Path(scratch) / str(self.card["model"])
            home.mkdir(parents=True)
            self.write_weights(home / WEIGHTS)
            for table in self.calibrations.values():
                ranks.write(home, table, self.calibrated_on)
            if self.card["history"]:
                draw(self.card["history"], home / "curve.png")
            report.write_card(home, self.card)
            yield home

    def add_to_card(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Put `entries` into the card, on disk as well where the model lies there; returns it."""
        here, new = self.folder, dict(entries)
        self.card = report.add_to_card(here, new) if here is not None else joined(self.card, new)
        return self.card

    def measured(self) -> dict[str, Any]:
        """What was measured of it and not put into its card."""
        return {} if self.folder is None else report.read_card(self.folder, report.MEASURED)

    def keep(self, entries: Mapping[str, Any], *, into_card: bool) -> dict[str, Any]:
        """Put what was measured into the card, or beside it; returns what that holds now."""
        if into_card:
            return self.add_to_card(entries)
        if self.folder is None:
            return dict(entries)
        return report.add_to_card(self.folder, dict(entries), report.MEASURED)

    def log(self, entry: dict[str, Any]) -> None:
        """Note beside the model that it was evaluated."""
        if self.folder is not None:
            report.log_evaluation(self.folder, entry)

    def export(
        self, path: Path | str, *, form: Form | None = None, images: Gate = None
    ) -> AnyParity:
        """Write one ONNX graph and prove that it decides as the torch pipeline does.

        It compares on 64 of `images`, or on crops of a photograph. Raises RuntimeError if it fails.
        """
        return self.write(partial(archives.export_variant, out=Path(path)), form, images)

    def archive(
        self,
        path: Path | str,
        *,
        policy: Policy | None = None,
        form: Form | None = None,
        images: Gate = None,
        plan: Path | None = None,
        version: str = "1.0",
        settings: Mapping[str, object] | None = None,
        sample: bool = True,
        anyway: bool = False,
    ) -> AnyParity:
        """Export, check and pack the model as one TorchServe archive; returns the gate's figures.

        `settings` go beside the policy: `query_store`, `max_pixels` and others of the endpoint. The
        `sample` pictures in the model's folder go along, if it has any.

        Raises ValueError for a policy that the endpoint would refuse; and, unless it is wanted
        `anyway`, for a model that fails its own checks or is no better than chance.
        """
        terms = {"rampart": asdict(policy or Policy(self.rate)) | dict(settings or {})}
        write = partial(archives.archive, out=Path(path), plan=plan)
        write = partial(write, version=version, settings=terms, sample=sample)
        return self.write(partial(write, anyway=anyway), form, images)

    def write(self, write: Callable[..., T], form: Form | None, images: Gate) -> T:
        """What `write` makes of the model's folder, held to the gate on 64 of the images."""
        variant, precision = form or self.form()
        if images is not None and not isinstance(images, Tensor):
            images = spread(images, 64).image  # (64, H, W, 3)
        with self.on_disk() as folder:
            return write(folder, variant=variant, precision=precision, images=images)


def tables_in(folder: Path) -> dict[Form, Calibration]:
    """The calibrations of a model folder."""
    return {Form(*form): load_variant(folder, *form) for form in folders.forms(folder)}


def write_small(picture: Image.Image, file: Path, *, most: int) -> None:
    """Write a picture to try an endpoint with, scaled down until its file has `most` bytes."""
    while True:
        picture.save(file, optimize=True)
        if file.stat().st_size <= most:
            return
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))
