"""What a new detector, rung or purifier takes: one definition, and all rooms know it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rampart.handlers.engine import Engine, Outputs
from rampart.hardening.attack import ladder, victims
from rampart.hardening.attack.ladder import QUICK, Attack, Budget
from rampart.hardening.attack.objectives import Look
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge import ablation
from rampart.hardening.judge import evaluate as evaluation
from rampart.hardening.model import checkpoint
from rampart.hardening.model import detectors as known
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model import purifier as purifiers
from rampart.hardening.model.calibrate import load_variant
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.detectors import LEAN, Detector, Views
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.purifier import Purifier
from rampart.hardening.report import card as report
from rampart.hardening.report import page

THREAT, CPU = Threat("Linf", 8 / 255), torch.device("cpu")
BUDGET = QUICK._replace(steps=1, targets=1, queries=1)


class Darkness(Detector):
    """How dark the image is."""

    name = "darkness"

    def forward(self, views: Views) -> Tensor:
        return 1 - views.x.mean((1, 2, 3))


def whiten(look: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget) -> Tensor:
    """As bright as the ball allows."""
    return (x + threat.eps).clamp(0, 1)


def left_alone(look: Look, x: Tensor, label: Tensor, threat: Threat, budget: Budget) -> Tensor:
    return x


WHITENING = Attack(
    "whitening",
    "label",
    whiten,
    lambda budget, classes: "all pixels up by eps",
    lambda budget: 0,
    meaning="label right on brighter images",
    title="whitening",
)


class Untouched(Engine):
    """No graph: torch answers."""

    def __init__(self, pipeline: DefendedClassifier) -> None:
        self.pipeline, self.image_shape = pipeline, (32, 32, 3)

    def run(self, images: np.ndarray) -> Outputs:
        with torch.no_grad():
            return Outputs(*(part.numpy() for part in self.pipeline(torch.from_numpy(images))))


@pytest.fixture
def quick_ladder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ladder with a new rung, and all others made to do nothing."""
    rungs = (
        *(replace(attack, craft=left_alone, labels=False) for attack in ladder.RUNGS),
        WHITENING,
    )
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    monkeypatch.setattr(ablation, "ROUNDS", 1)
    monkeypatch.setattr(evaluation, "self_checks", lambda *_: [])
    yield


def test_a_new_detector_is_a_row_of_the_ablation_and_of_its_table(
    monkeypatch: pytest.MonkeyPatch,
    quick_ladder: None,
    tiny_pipeline: DefendedClassifier,
    tiny_images: Images,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(known.DETECTORS, Darkness.name, Darkness)
    setups = ablation.chosen(tiny_pipeline, ["+ darkness"], test=False)
    every = [ablation.arm(tiny_pipeline, setup, tiny_images, Untouched, CPU) for setup in setups]
    few = tiny_images[slice(4)]
    outcomes = ablation.ablate(every, few, THREAT, BUDGET, folder=tmp_path / "found")
    entry = ablation.entry(outcomes, THREAT, BUDGET, 10, data="blobs", command="c")
    assert "+ darkness" in [row["name"] for row in entry["rows"]]
    assert "all pixels up by eps" in entry["attack"]  # the new rung is climbed here too
    assert "| + darkness |" in report.piped(*ablation.table(entry["rows"]))


def test_a_new_rung_is_in_figures_card_tables_and_page(
    quick_ladder: None,
    tiny_pipeline: DefendedClassifier,
    tiny_folder: Path,
    tiny_images: Images,
    tmp_path: Path,
) -> None:
    few, net = tiny_images[slice(8)], tiny_pipeline.classifier
    full = victims.pipeline_victim(
        tiny_pipeline, load_variant(tiny_folder, "full"), "weights", rate=0.1
    )
    done = evaluation.evaluate(
        [victims.label_victim("classifier", net, "weights"), full],
        few,
        THREAT,
        BUDGET,
        rate=0.1,
        folder=tmp_path / "found",
        only=[],
    )
    rows = [report.row(m, data="blobs", command="c") for m in done.metrics]
    (bare,) = (r for r in rows if (r["subject"], r["name"]) == ("classifier", "whitening"))
    with torch.no_grad():
        guess = net((to_float(few.image) + THREAT.eps).clamp(0, 1)).argmax(1)
    assert bare["value"] <= float((guess == few.label).float().mean())
    card = {"model": "tiny", "threat_model": str(THREAT), "metrics": rows}
    head = next(line for line in report.markdown(card).splitlines() if line.startswith("| |"))
    assert "| whitening |" in head
    html = page.write(tmp_path / "page.html", card, rows, done, tiny_pipeline, pictures=None)
    text = html.read_text()
    assert "label right on brighter images" in text and "all pixels up by eps" in text
    assert "whitening" in report.table(rows)


class Shift(NamedTuple):
    by: float = 0.5


class Shifted(Purifier):
    """Brighter by a learned share."""

    name, Config = "shift", Shift

    def __init__(self, config: Shift) -> None:
        torch.nn.Module.__init__(self)
        self.config = config  # type: ignore[assignment]
        self.share = torch.nn.Parameter(torch.tensor(config.by))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.share).clamp(0, 1)


def test_a_new_purifier_is_saved_and_built_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(purifiers.PURIFIERS, Shifted.name, Shifted)
    net = Classifier(ClassifierConfig("resnet10", 3, width=0.125))
    whole = DefendedClassifier(net, Shifted(Shift(0.25)), known.FULL).eval()
    pipelines.save(tmp_path / "weights.safetensors", whole, ("a", "b", "c"))
    back, _ = pipelines.load(tmp_path / "weights.safetensors", "full")
    assert isinstance(back.purifier, Shifted)
    assert back.defend(torch.zeros(1, 3, 32, 32)).purified.mean() == 0.25
    monkeypatch.delitem(purifiers.PURIFIERS, Shifted.name)
    with pytest.raises(ValueError, match="unknown purifier 'shift'"):
        pipelines.load(tmp_path / "weights.safetensors", "full")


class Mean(Detector):
    """A detector that learns."""

    name = "mean"

    def __init__(self, classes: int, size: int) -> None:
        super().__init__(classes, size)
        self.register_buffer("level", torch.zeros(()))

    def forward(self, views: Views) -> Tensor:
        return (views.x.mean((1, 2, 3)) - self.level).abs()


def test_weights_from_before_a_detector_load_unless_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    weights = tiny_folder / "weights.safetensors"
    monkeypatch.setitem(known.DETECTORS, Mean.name, Mean)
    pipeline, _ = pipelines.load(weights, "lean")
    assert pipeline.detectors.names == LEAN
    # An ablation has no row for what learned nothing.
    assert pipeline.detectors.lacks("mean")
    assert "+ mean" not in [setup.name for setup in ablation.setups(pipeline)]
    config, _ = checkpoint.read(weights)
    config["variants"]["lean"] = [*LEAN, "mean"]
    whole, _ = pipelines.load_whole(weights)
    checkpoint.save(tmp_path / "newer.safetensors", whole, config)
    with pytest.raises(ValueError, match=r"detectors\.mean\.level"):
        pipelines.load(tmp_path / "newer.safetensors", "lean")


def test_a_file_names_the_detectors_of_its_variants(tiny_folder: Path, tmp_path: Path) -> None:
    whole, classes = pipelines.load_whole(tiny_folder / "weights.safetensors")
    whole.variants = whole.variants | {"lean": ("energy",)}
    pipelines.save(tmp_path / "weights.safetensors", whole, classes)
    lean, _ = pipelines.load(tmp_path / "weights.safetensors", "lean")
    assert lean.detectors.names == ("energy",)
    (row,) = [setup for setup in ablation.setups(lean) if setup.name == "lean"]
    assert row.detectors == ("energy",)


def test_a_file_that_names_no_detectors_has_those_of_its_time(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config, _ = checkpoint.read(tiny_folder / "weights.safetensors")
    whole, _ = pipelines.load_whole(tiny_folder / "weights.safetensors")
    del config["variants"], whole.detectors.residual
    checkpoint.save(tmp_path / "weights.safetensors", whole, config)
    lean, _ = pipelines.load(tmp_path / "weights.safetensors", "lean")
    assert lean.detectors.names == ("confidence", "energy")
