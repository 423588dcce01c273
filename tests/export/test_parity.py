from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rampart.export import parity
from rampart.export.build import sample_crops
from rampart.export.to_onnx import to_onnx
from rampart.handlers.engine import Engine, Outputs
from rampart.handlers.verdict import Calibration
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.calibrate import detection_margin, load_variant
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier


@pytest.fixture(scope="module")
def calibration(tiny_folder: Path) -> Calibration:
    return load_variant(tiny_folder, "full")


@pytest.fixture(scope="module")
def engine(tiny_graph: Path) -> Engine:
    return Engine(tiny_graph, device="cpu")


@pytest.mark.parametrize("rate", [0, 0.01])
def test_the_gate_passes_the_graph_of_the_same_pipeline(
    rate: float,
    engine: Engine,
    tiny_pipeline: DefendedClassifier,
    calibration: Calibration,
    tiny_images: Images,
) -> None:
    found = parity.compare(tiny_pipeline, engine, calibration, tiny_images.image[:16], rate=rate)
    assert found.images == 48
    assert found.labels_differ == found.decisions_differ == 0
    assert 0 < found.logits < 1e-3


def test_the_gate_stops_a_graph_with_other_weights(
    engine: Engine, tiny_folder: Path, calibration: Calibration, tiny_images: Images
) -> None:
    other, _ = pipelines.load(tiny_folder / "weights.safetensors")
    with torch.no_grad():
        other.classifier.head.weight.neg_()
    with pytest.raises(RuntimeError, match=r"decides differently.*labels differ on [1-9]"):
        parity.compare(other, engine, calibration, tiny_images.image[:16])


def test_the_gate_stops_scores_that_say_nothing(
    engine: Engine, tiny_folder: Path, calibration: Calibration, tiny_images: Images
) -> None:
    other, _ = pipelines.load(tiny_folder / "weights.safetensors")
    other.detectors.feature_distance.whiten.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"scores by [0-9]\.[0-9]+, .*; labels differ on 0"):
        parity.compare(other, engine, calibration, tiny_images.image[:8])


class Altered:
    """A graph of which one output is another one."""

    def __init__(self, engine: Engine, change: Callable[[Outputs], Outputs]) -> None:
        self.engine, self.change = engine, change
        self.device, self.image_shape = engine.device, engine.image_shape

    def run(self, images: np.ndarray) -> Outputs:
        return self.change(self.engine.run(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out._replace(logits=100 * out.logits),
        lambda out: out._replace(raw_logits=0 * out.raw_logits),
        lambda out: out._replace(raw_logits=out.raw_logits * np.float32("nan")),
        lambda out: out._replace(purified=255 - out.purified),
        lambda out: out._replace(scores=np.where(out.scores > 0, np.float32("nan"), out.scores)),
    ],
)
def test_the_gate_stops_outputs_that_decide_nothing_and_are_shown(
    change: Callable[[Outputs], Outputs],
    engine: Engine,
    tiny_pipeline: DefendedClassifier,
    calibration: Calibration,
    tiny_images: Images,
) -> None:
    with pytest.raises(RuntimeError, match="labels differ on 0, decisions on 0"):
        parity.compare(tiny_pipeline, Altered(engine, change), calibration, tiny_images.image[:8])


@pytest.mark.slow
def test_scores_in_logits_are_held_to_their_range(tmp_path: Path) -> None:
    folder = Path("model_store/traffic-signs")
    guarded, _ = pipelines.load(folder / "weights.safetensors", "guarded")
    engine = Engine(to_onnx(guarded, tmp_path / "graph.onnx"))
    image, calibration = sample_crops(32)[:24], load_variant(folder, "guarded")
    found = parity.compare(guarded, engine, calibration, image)
    # The sign of a slope near zero may turn, which moves a margin of several logits a little.
    assert found.decisions_differ == 0 and found.scores < 0.02
    far = Altered(engine, lambda out: out._replace(scores=out.scores + np.float32(0.02)))
    with pytest.raises(RuntimeError, match="decides differently"):
        parity.compare(guarded, far, calibration, image)


def test_near_threshold_images_straddle_the_decision_closely(
    tiny_pipeline: DefendedClassifier, calibration: Calibration, tiny_images: Images
) -> None:
    x = tiny_images.image[:16].permute(0, 3, 1, 2) / 255
    near = parity.near_threshold(tiny_pipeline, calibration, x, rate=0.05)
    with torch.no_grad():
        before, after = (tiny_pipeline.defend(v).scores for v in (x, near))
    gap = [detection_margin(s, calibration, 0.05).abs().median() for s in (before, after)]
    assert gap[1] < 0.2 * gap[0]


def test_the_built_in_crops_are_real_and_all_different() -> None:
    crops = sample_crops(32, count=8)
    assert crops.shape == (8, 32, 32, 3)
    assert len({crop.numpy().tobytes() for crop in crops}) == 8
