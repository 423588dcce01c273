"""An object detector's graph, its gate, and the archive made of it."""

import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from drawn import boxed
from torch import nn

from rampart.export import scenes as gate
from rampart.export.archive import archive
from rampart.export.build import build
from rampart.export.scenes import Shown, together
from rampart.export.shipped import SceneParity, find
from rampart.export.to_onnx import check_batch_is_dynamic
from rampart.export.to_tensorrt import unsupported
from rampart.handlers.engine import Engine, EngineError, SceneEngine, SceneOutputs
from rampart.hardening.model import registry
from rampart.hardening.model.classifier import ClassifierConfig
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects.defended import VARIANTS, DefendedDetector
from rampart.hardening.objects.detector import ObjectConfig, ObjectDetector, of_factory
from rampart.scenes import SceneModel


@pytest.fixture(scope="module")
def graph(scene_folder: Path) -> Path:
    return scene_folder / "graph-lean.onnx"


@pytest.fixture(scope="module")
def engine(graph: Path) -> SceneEngine:
    return SceneEngine(graph, threads=1)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return boxed(6, seed=7).image


def test_the_graph_takes_any_batch_and_gives_candidates_of_one_size(
    graph: Path, engine: SceneEngine, image: torch.Tensor
) -> None:
    check_batch_is_dynamic(graph)
    assert tuple(one.name for one in onnx.load(graph).graph.output) == SceneOutputs._fields
    for batch in (1, 3, 6):
        out = engine.run(image[:batch].numpy())
        count = out.labels.shape[1]
        assert out.boxes.shape == (batch, count, 4) and out.confidences.shape == (batch, count)
        assert out.scores.shape == (batch, 3) and out.labels.dtype == np.int64


@pytest.mark.slow
def test_the_gate_passes_the_graph_of_the_same_pipeline(
    scene_folder: Path, image: torch.Tensor, tmp_path: Path
) -> None:
    found = build(scene_folder, "lean", tmp_path / "graph.onnx", images=image, rate=0.02)
    assert isinstance(found, SceneParity)
    assert found.images == 18 and found.boxes > 50
    assert found.unmatched == found.decisions_differ == 0
    assert found.iou > 0.999 and found.confidence < 1e-3 and found.scores < 1e-3


def own(name: str) -> ObjectDetector:
    """A network of tests/owned.py, with heads that tell places apart."""
    registry.import_factory(f"owned:{name}")
    torch.manual_seed(0)
    detector = of_factory(f"owned:{name}", ("disc", "square"), 128)
    with torch.no_grad():
        for part, weight in detector.named_parameters():
            if "head" in part or "predictor" in part:
                weight.copy_(torch.randn_like(weight) / 20)
    return detector


@pytest.mark.slow
def test_the_gate_passes_a_faster_rcnn_of_yours_that_looks_at_several_maps(
    image: torch.Tensor, tmp_path: Path
) -> None:
    model = SceneModel.calibrate(own("faster_rcnn"), boxed(80, seed=1).image)
    folder = model.save(tmp_path / "own")
    found = build(folder, "lean", tmp_path / "graph.onnx", images=image, rate=0.1)
    assert isinstance(found, SceneParity) and found.boxes > 1000
    assert found.unmatched == found.decisions_differ == 0
    check_batch_is_dynamic(tmp_path / "graph.onnx")


@pytest.mark.slow
def test_the_graph_of_a_retinanet_of_yours_says_what_the_network_says(tmp_path: Path) -> None:
    pipeline = DefendedDetector(own("retinanet"), VARIANTS["lean"]).eval().requires_grad_(False)
    engine = SceneEngine(gate.to_onnx(pipeline, tmp_path / "graph.onnx"), threads=1)
    for batch in (1, 3):
        noise = torch.randint(0, 256, (batch, 128, 128, 3), dtype=torch.uint8)  # without ties
        for mine, other in zip(engine.run(noise.numpy()), pipeline(noise), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), other, rtol=1e-3, atol=1e-3)


def small(arch: str) -> ObjectDetector:
    """An untrained network on a pyramid of three maps, or a MobileNetV3."""
    torch.manual_seed(0)
    below = None if arch == "ssdlite" else ClassifierConfig("resnet10", 2, 0.125, 128)
    detector = ObjectDetector(ObjectConfig(arch, ("disc", "square"), 128, below))
    for part, weight in detector.named_parameters():
        if "head" in part or "predictor" in part:
            nn.init.normal_(weight, std=0.05)
    for layer in detector.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    detector.train().dense(torch.rand(2, 3, 128, 128))  # or all values of a MobileNetV3 fade
    return detector.eval()


# Max-pooling and nearest upsampling; each class alone; depthwise layers and hard swish.
@pytest.mark.parametrize(
    "make",
    [
        partial(small, "ssd"),
        pytest.param(partial(own, "retinanet"), marks=pytest.mark.slow),
        pytest.param(partial(small, "ssdlite"), marks=pytest.mark.slow),
    ],
)
def test_the_graph_of_guarded_takes_the_step_that_torch_takes_at_any_batch(
    make: Callable[[], ObjectDetector], tmp_path: Path
) -> None:
    pipeline = DefendedDetector(make(), VARIANTS["guarded"]).eval().requires_grad_(False)
    graph = gate.to_onnx(pipeline, tmp_path / "graph.onnx")
    engine = SceneEngine(graph, threads=1)
    for batch in (1, 3):
        noise = torch.randint(0, 256, (batch, 128, 128, 3), dtype=torch.uint8)
        out, mine = engine.run(noise.numpy()), pipeline(noise)
        assert (mine.scores[:, 3] > 1e-3).all()
        torch.testing.assert_close(torch.from_numpy(out.scores), mine.scores, rtol=1e-3, atol=1e-5)
        assert np.abs(out.confidences - mine.confidences.numpy()).max() < 1e-4
    # `quantize` finds the network by the names of its weights.
    names = [value.name for value in onnx.load(graph).graph.initializer]
    assert any(name.startswith("detector.net.backbone.") for name in names)


def test_a_faster_rcnn_is_told_at_once_that_its_gradient_has_no_graph(image: torch.Tensor) -> None:
    told = r"fasterrcnn cannot have the variant guarded \(leave out --guarded\).*roi_align_backward"
    with pytest.raises(ValueError, match=told) as error:
        SceneModel.calibrate(small("fasterrcnn"), image, guarded=True)
    assert "\n" not in str(error.value)


def test_the_gate_stops_a_graph_with_other_weights(
    engine: SceneEngine, scene_folder: Path, image: torch.Tensor
) -> None:
    other = SceneModel.load(scene_folder)
    with torch.no_grad():
        for name, weight in other.detector.named_parameters():
            if "regression_head" in name:
                weight.add_(0.2)
    with pytest.raises(RuntimeError, match=r"finds other objects.* [1-9]\d* boxes have no like"):
        gate.compare(other.pipeline("lean"), engine, other.calibration("lean"), image, rate=0.02)


class Altered:
    """A graph of which one output is another one."""

    def __init__(self, engine: SceneEngine, change: Callable[[SceneOutputs], SceneOutputs]) -> None:
        self.engine, self.change = engine, change
        self.device, self.image_shape = engine.device, engine.image_shape

    def run(self, images: np.ndarray) -> SceneOutputs:
        return self.change(self.engine.run(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out._replace(boxes=out.boxes + np.float32(1)),
        lambda out: out._replace(labels=1 - out.labels),
        lambda out: out._replace(confidences=out.confidences * np.float32(0.9)),
        lambda out: out._replace(confidences=0 * out.confidences),
        lambda out: out._replace(boxes=out.boxes * np.float32("nan")),
        lambda out: out._replace(scores=out.scores * np.float32("nan")),
        lambda out: out._replace(scores=out.scores + np.float32(50)),
    ],
)
def test_the_gate_stops_outputs_that_differ(
    change: Callable[[SceneOutputs], SceneOutputs],
    engine: SceneEngine,
    scenes: SceneModel,
    image: torch.Tensor,
) -> None:
    altered, table = Altered(engine, change), scenes.calibration("lean")
    with pytest.raises(RuntimeError, match="finds other objects"):
        gate.compare(scenes.pipeline("lean"), altered, table, image, rate=0.02)


def test_a_box_too_many_has_no_like_whoever_found_it() -> None:
    def answer(*confidences: float) -> Shown:
        corners = np.arange(len(confidences), dtype=np.float32)[:, None] * 20
        boxes = np.concatenate([corners, corners, corners + 9, corners + 9], 1)
        labels = np.zeros(len(confidences), np.int64)
        return Shown(boxes, np.array(confidences, np.float32), labels)

    assert together([answer(0.9, 0.5)], [answer(0.9, 0.5)]).unmatched == 0
    for pair in ((answer(0.9, 0.5), answer(0.9)), (answer(0.9), answer(0.9, 0.5))):
        assert together(*([one] for one in pair)).unmatched == 1
    # One that rounding alone may have brought over the threshold is no fault.
    assert together([answer(0.9, 0.051)], [answer(0.9)]).unmatched == 0


@pytest.mark.parametrize("variant", ["full", "guarded"])
def test_every_score_has_a_gradient_that_attacks_can_follow(
    variant: Variant, scenes: SceneModel
) -> None:
    x = to_float(boxed(3, seed=3).image)[1:].requires_grad_()
    scores = scenes.as_variant(variant, VARIANTS[variant]).defend(x).scores
    assert scores.shape == (2, 4) and scores.isfinite().all()
    for score in scores.T:
        (slope,) = torch.autograd.grad(score.sum(), x, retain_graph=True)
        assert (slope.flatten(1).abs().sum(1) > 0).all()


def test_each_kind_of_engine_refuses_the_graph_of_the_other(graph: Path, tiny_graph: Path) -> None:
    with pytest.raises(EngineError, match="outputs logits, raw_logits, scores, purified"):
        Engine(graph)
    with pytest.raises(EngineError, match="outputs boxes, confidences, labels, scores"):
        SceneEngine(tiny_graph)


def test_an_archive_says_what_it_is_for_and_packs_the_shipped_graph(
    scene_folder: Path, scene_archive: Path
) -> None:
    with zipfile.ZipFile(scene_archive) as content:
        card = json.loads(content.read("card.json"))
        assert content.read("graph.onnx") == (scene_folder / "graph-lean.onnx").read_bytes()
        assert json.loads(content.read("labels.json")) == ["disc", "square"]
    assert (card["task"], card["variant"], card["max_overlap"]) == ("detect", "lean", 0.45)
    shipped = find(scene_folder, "lean")
    assert shipped and "boxes have an IoU of" in str(shipped.parity)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_confidence": 1.5}, "min_confidence must be a number above 0 and below 1"),
        ({"min_confidence": "0.5"}, "min_confidence must be a number"),
        ({"nonsense": 1}, "unknown rampart setting"),
    ],
)
def test_settings_that_the_endpoint_would_refuse_are_refused_before_anything_is_exported(
    settings: dict[str, object], words: str, scene_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        archive(scene_folder, tmp_path / "a.mar", variant="lean", settings={"rampart": settings})
    assert not list(tmp_path.iterdir())


def test_a_threshold_for_boxes_is_no_setting_of_a_classifier(
    tiny_shipped: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="min_confidence is not a setting for this kind"):
        archive(tiny_shipped, tmp_path / "a.mar", settings={"rampart": {"min_confidence": 0.5}})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ssdlite", "ssd", "fasterrcnn"])
def test_every_architecture_becomes_a_graph_of_any_batch_that_finds_what_torch_finds(
    arch: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone = None if arch == "ssdlite" else ClassifierConfig("resnet10", 2, 0.125)
    detector = ObjectDetector(ObjectConfig(arch, ("a", "b", "c"), 128, backbone)).eval()
    with torch.no_grad():
        for weight in detector.parameters():  # new ones say nearly the same of all anchors
            weight.add_(0.05 * torch.randn_like(weight))
    pipeline = DefendedDetector(detector, VARIANTS["full"]).eval().requires_grad_(False)
    engine = SceneEngine(gate.to_onnx(pipeline, tmp_path / "graph.onnx"), threads=1)
    picture = boxed(3, seed=2).image
    own = SceneOutputs(*(part.numpy() for part in pipeline(picture)))
    for batch in (1, 3):
        out = engine.run(picture[:batch].numpy())
        pairs = (gate.shown(SceneOutputs(*(p[:batch] for p in own)), 0.45), gate.shown(out, 0.45))
        gaps = together(*pairs)
        # Which of untrained proposals is the last to be looked at, rounding may decide.
        assert gaps.boxes > 20 and gaps.unmatched <= 0.02 * gaps.boxes
        np.testing.assert_allclose(out.scores, own.scores[:batch], rtol=2e-3, atol=2e-3)


def test_tensorrts_parser_takes_the_graph(graph: Path) -> None:
    assert not unsupported(graph)
