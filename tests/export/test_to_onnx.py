from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from rampart.export.to_onnx import OUTPUTS, check_batch_is_dynamic, to_onnx
from rampart.handlers.engine import Engine
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier


def test_the_graph_has_the_documented_border(tiny_graph: Path) -> None:
    model = onnx.load(tiny_graph)
    onnx.checker.check_model(model)
    image = model.graph.input[0]
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in image.type.tensor_type.shape.dim[1:]] == [32, 32, 3]
    assert tuple(output.name for output in model.graph.output) == OUTPUTS


def test_the_graph_says_nothing_of_where_its_code_lay(tiny_graph: Path) -> None:
    assert b".py" not in tiny_graph.read_bytes()


@pytest.mark.parametrize("count", [1, 3, 32])
def test_any_batch_gives_what_torch_gives(
    tiny_graph: Path, tiny_pipeline: DefendedClassifier, tiny_images: Images, count: int
) -> None:
    image = tiny_images.image[:count]
    found = Engine(tiny_graph, device="cpu").run(image.numpy())
    with torch.no_grad():
        expected = tiny_pipeline(image)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(found.raw_logits, expected.raw_logits, atol=1e-4)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)


@pytest.mark.training
def test_the_lean_graph_is_one_file_and_runs_the_classifier_once(
    tmp_path: Path, tiny_graph: Path, tiny_folder: Path
) -> None:
    lean, _ = pipelines.load(tiny_folder / "weights.safetensors", "lean")
    kinds = [n.op_type for n in onnx.load(to_onnx(lean, tmp_path / "lean.onnx")).graph.node]
    assert [file.name for file in tmp_path.iterdir()] == ["lean.onnx"]  # weights inside
    # A ResNet-10 has 12 convolutions; the tiny purifier of `full` adds four.
    assert kinds.count("Conv") == 12
    assert [n.op_type for n in onnx.load(tiny_graph).graph.node].count("Conv") == 16


def test_a_frozen_batch_is_refused(tmp_path: Path, tiny_graph: Path) -> None:
    model = onnx.load(tiny_graph)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "frozen.onnx")
    with pytest.raises(RuntimeError, match="logits has a fixed batch of 2"):
        check_batch_is_dynamic(tmp_path / "frozen.onnx")
