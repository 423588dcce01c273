from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from rampart.export.to_onnx import export
from rampart.export.to_triton import PValue, check_p_values, to_triton
from rampart.handlers.engine import OUTPUTS
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.model.images import Images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_shipped: Path) -> Path:
    return to_triton(tiny_shipped, tmp_path_factory.mktemp("repository"), variant="full")


def test_the_config_is_one_that_triton_reads_and_names_what_the_graph_has(model: Path) -> None:
    text = (model / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == (model.name, "onnxruntime")
    session = ort.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {"TYPE_UINT8": "uint8", "TYPE_FP32": "float", "TYPE_FP64": "double"}
    for told, own in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [entry.name for entry in told] == [value.name for value in own]
        for entry, value in zip(told, own, strict=True):
            kind = model_config_pb2.DataType.Name(entry.data_type)
            assert value.type == f"tensor({kinds[kind]})"
            assert list(entry.dims) == value.shape[1:]  # without the batch
    (warm,) = config.model_warmup
    assert list(warm.inputs["image"].dims) == list(config.input[0].dims)
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    labels = (model / config.output[0].label_filename).read_text().splitlines()
    assert len(labels) == config.output[0].dims[0]


def test_the_graph_is_the_exported_one_with_the_p_value_of_the_handler(
    model: Path, tiny_calibration: Calibration, tiny_images: Images
) -> None:
    image = tiny_images.image[:32].numpy()
    path = model / "1" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, len(image)):
        *_, scores, _, p = session.run([*OUTPUTS, "p_value"], {"image": image[:batch]})
        np.testing.assert_allclose(p[:, 0], p_values(scores, tiny_calibration), atol=1e-9)
    assert len(set(p[:, 0])) > 20


def steps(knots: NDArray[np.float64]) -> Calibration:
    surprise = np.linspace(0, 3, knots.shape[1])
    combined = np.sort(np.random.default_rng(0).exponential(2, 50))
    return Calibration(("a", "b"), knots, surprise, combined, 50, "full")


@pytest.mark.parametrize("doubled", [False, True])
def test_p_values_are_the_handlers_below_between_and_beyond_the_knots(doubled: bool) -> None:
    knots = np.sort(np.random.default_rng(1).normal(size=(2, 9)))
    if doubled:  # a score that many images share
        knots[:, 3:6] = knots[:, 3:4]
    calibration = steps(knots)
    around = np.linspace(-6, 9, 400)
    scores = np.stack([around, around[::-1]], 1).astype(np.float32)
    p = PValue(calibration)(torch.from_numpy(scores))[:, 0].numpy()
    np.testing.assert_allclose(p, p_values(scores, calibration), atol=1e-9)


def test_p_values_of_another_calibration_are_found_out(
    tiny_calibration: Calibration, tmp_path: Path
) -> None:
    other = replace(tiny_calibration, knots=tiny_calibration.knots * 0.9)
    example = {"scores": torch.zeros(2, len(other.detectors))}
    tail = export(PValue(other), example, ("p_value",), tmp_path / "tail.onnx")
    check_p_values(tail, other)
    with pytest.raises(RuntimeError, match=r"p-values are off by up to [01]"):
        check_p_values(tail, tiny_calibration)


def test_a_version_that_a_server_may_be_reading_is_not_replaced(
    model: Path, tiny_shipped: Path
) -> None:
    before = (model / "1" / "model.onnx").read_bytes()
    with pytest.raises(ValueError, match=r"tiny/1 exists: name another --model-version"):
        to_triton(tiny_shipped, model.parent, variant="full")
    to_triton(tiny_shipped, model.parent, variant="full", version=2)
    assert (model / "2" / "model.onnx").is_file()
    assert (model / "1" / "model.onnx").read_bytes() == before
    assert {path.name for path in model.iterdir()} == {"1", "2", "config.pbtxt", "labels.txt"}
    with pytest.raises(ValueError, match=r"config\.pbtxt belongs to a model with other .* outputs"):
        to_triton(tiny_shipped, model.parent, variant="lean", version=3)
    assert not (model / "3").exists()
