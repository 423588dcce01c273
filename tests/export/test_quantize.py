import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.numpy_helper import to_array

from rampart.export.quantize import network_nodes, quantize
from rampart.export.to_onnx import to_onnx
from rampart.handlers.engine import Engine, overflows
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Path) -> Path:
    return Path(shutil.copy(tiny_graph, tmp_path_factory.mktemp("q")))


@pytest.fixture(scope="module")
def int8(graph: Path, tiny_images: Images) -> Path:
    image = tiny_images.image[:128].numpy()
    return quantize(graph, graph.with_name("ranges.json"), graph.with_name("int8.onnx"), image)


def test_the_classifier_is_quantized_and_what_surrounds_it_is_not(graph: Path, int8: Path) -> None:
    before, after = onnx.load(graph).graph, onnx.load(int8).graph
    weights = {value.name: value for value in after.initializer}
    kinds = {
        name.split(".weight")[0]: weights[name].data_type
        for name in weights
        if ".weight" in name and "scale" not in name and "zero_point" not in name
    }
    layers = {name for name, kind in kinds.items() if kind == TensorProto.INT8}
    floats = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    assert layers and all(name.startswith("classifier.backbone.") for name in layers)
    assert {"classifier.head", "purifier.residual.1"} <= floats
    assert not any(name.startswith("classifier.backbone.") for name in floats)
    inside = {n.op_type for n in before.node if n.name in network_nodes(before)}
    assert inside == {"Conv", "Relu", "Add"}


def test_ranges_that_were_kept_give_the_same_graph_again(graph: Path, int8: Path) -> None:
    again = quantize(graph, graph.with_name("ranges.json"), graph.with_name("again.onnx"))
    assert again.read_bytes() == int8.read_bytes()


def untrained(folder: Path, *looks: str, activation: str = "relu") -> Path:
    """The graph of an untrained network."""
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig("resnet10", 10, 0.125, activation=activation))
    pipeline = DefendedClassifier(net, None, looks).eval().requires_grad_(False)
    return to_onnx(pipeline, folder / "graph.onnx")


def test_silu_is_quantized_with_the_layers_around_it(tmp_path: Path, tiny_images: Images) -> None:
    graph, image = (
        untrained(tmp_path, "confidence", activation="silu"),
        tiny_images.image[:128].numpy(),
    )
    nodes = onnx.load(graph).graph
    inside = [n.op_type for n in nodes.node if n.name in network_nodes(nodes)]
    assert inside.count("Sigmoid") == inside.count("Mul") == 9  # one a ReLU of a ResNet-10
    int8 = quantize(graph, tmp_path / "ranges.json", tmp_path / "int8.onnx", image)
    exact, near = (Engine(file).run(image).logits for file in (graph, int8))
    assert np.abs(exact - near).max() < 0.1 * np.ptp(exact)


class Gated(torch.nn.Module):
    """It compares what a ReLU gave, in other ways than the gradient of one does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8))
        self.three, self.fc = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x).relu()
        large, some = (y > 0.3).to(y.dtype), (y > 0).to(y.dtype)
        y = self.two(y * large) * some + some
        return self.fc(self.three(y).relu().mean((2, 3)))


def test_comparisons_of_your_own_network_are_no_masks_of_a_backward_pass(
    tmp_path: Path, tiny_images: Images
) -> None:
    torch.manual_seed(0)
    net = Classifier.wrap(Gated(), head="fc", classes=10, image_size=32)
    pipeline = DefendedClassifier(net, None, ("confidence",)).eval().requires_grad_(False)
    graph, image = to_onnx(pipeline, tmp_path / "a.onnx"), tiny_images.image[:128].numpy()
    int8 = quantize(graph, tmp_path / "ranges.json", tmp_path / "int8.onnx", image)
    kinds = [n.op_type for n in onnx.load(int8).graph.node]
    assert kinds.count("Greater") == 2
    exact, near = (Engine(file).run(image).logits for file in (graph, int8))
    assert np.abs(exact - near).max() < 0.1 * np.ptp(exact)


@pytest.mark.slow
def test_products_of_a_backward_pass_stay_in_float32(tmp_path: Path) -> None:
    nodes = onnx.load(untrained(tmp_path, "consistency", activation="silu")).graph
    inside = [n.op_type for n in nodes.node if n.name in network_nodes(nodes)]
    assert [n.op_type for n in nodes.node].count("Mul") > 30
    # Of the two looks at the image, before the step and after it.
    assert inside.count("Mul") == inside.count("Sigmoid") == 18


@pytest.mark.slow
def test_the_backward_pass_of_consistency_is_quantized_too(
    tmp_path: Path, tiny_images: Images
) -> None:
    graph, image = untrained(tmp_path, "consistency"), tiny_images.image[:128].numpy()
    nodes = onnx.load(graph).graph
    inside = set(network_nodes(nodes))
    backward = [n for n in nodes.node if any(name.endswith("_turned") for name in n.input)]
    # The stem, eight convolutions of ResNet-10 and three that shorten.
    assert len(backward) == 12 and {n.name for n in backward} < inside
    assert "BatchNormalization" not in {n.op_type for n in nodes.node}
    int8 = quantize(graph, tmp_path / "ranges.json", tmp_path / "int8.onnx", image)
    # Where a ReLU let nothing pass is seen in 8 bits, without a way through float32.
    kinds = [n.op_type for n in onnx.load(int8).graph.node]
    assert kinds.count("Clip") - kinds.count("Greater") >= 9
    exact, near = (Engine(file).run(image).scores[:, 0] for file in (graph, int8))
    assert np.corrcoef(exact, near)[0, 1] > 0.98
    assert np.abs(exact - near).mean() < 0.2 * np.std(exact)


def test_weights_have_7_bits_and_need_no_guard_where_products_are_added_in_16(int8: Path) -> None:
    model = onnx.load(int8)
    weights = [
        to_array(value)
        for value in model.graph.initializer
        if value.data_type == TensorProto.INT8 and value.name.endswith("quantized")
    ]
    assert len(weights) > 5
    assert max(np.abs(one.astype(int)).max() for one in weights) in (63, 64)
    assert not overflows(int8, {"avx2"})


def test_ranges_of_8_bits_give_8_bits_again_with_their_guard(
    graph: Path, int8: Path, tmp_path: Path
) -> None:
    ranges = json.loads(graph.with_name("ranges.json").read_text())
    assert ranges.pop("rampart_weight_bits") == 7
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    before = quantize(graph, tmp_path / "ranges.json", tmp_path / "before.onnx")
    weights = [to_array(value) for value in onnx.load(before).graph.initializer]
    assert max(np.abs(one.astype(int)).max() for one in weights if one.dtype == np.int8) == 127
    assert overflows(before, {"avx2"}) and not overflows(before, {"avx2", "avx512_vnni"})


def test_without_ranges_the_command_that_makes_them_is_named(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`rampart quantize` makes it"):
        quantize(graph, tmp_path / "ranges.json", tmp_path / "out.onnx")


def test_a_graph_without_our_names_is_refused() -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    with pytest.raises(ValueError, match=r"no layer whose weights are named classifier\.\* or"):
        network_nodes(onnx.helper.make_graph([node], "g", [], []))
