"""The graph in ONNX Runtime: same numbers as torch, right device or none."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from rampart.handlers.engine import (
    MAX_BATCH,
    Engine,
    EngineError,
    Outputs,
    cpu_features,
    dots_bytes,
    tensorrt_options,
)
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier


def cuda_works() -> bool:
    return torch.cuda.is_available() and "CUDAExecutionProvider" in ort.get_available_providers()


without_cuda = pytest.mark.skipif(cuda_works(), reason="this machine has a working CUDA device")


@pytest.fixture(scope="module")
def engine(unpacked: Path) -> Engine:
    return Engine(unpacked / "graph.onnx", "cpu", threads=1)


@pytest.fixture(scope="module")
def images(tiny_images: Images) -> np.ndarray:
    return tiny_images.image[: MAX_BATCH + 3].numpy()


def test_outputs_equal_the_torch_pipeline(
    engine: Engine, images: np.ndarray, tiny_pipeline: DefendedClassifier
) -> None:
    with torch.no_grad():
        expected = tiny_pipeline(torch.from_numpy(images))
    for ours, theirs in zip(engine.run(images)[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cpuinfo", "exact"),
    [
        ("flags\t\t: sse4_2 avx2 avx512_vnni amx_int8\n", True),
        ("flags\t\t: sse4_2 avx2 avx_vnni\n", True),
        ("flags\t\t: sse4_2 avx2 avx512f\n", False),
        ("Features\t: fp asimd asimddp\n", True),
    ],
)
def test_a_cpu_is_known_by_whether_it_adds_products_of_bytes_without_overflow(
    tmp_path: Path, cpuinfo: str, exact: bool
) -> None:
    assert not dots_bytes(cpu_features(tmp_path / "missing"))
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}")
    assert dots_bytes(cpu_features(tmp_path / "cpuinfo")) is exact


def test_batches_beyond_the_maximum_equal_single_images(engine: Engine, images: np.ndarray) -> None:
    together = engine.run(images)
    singles = [engine.run(image[None]) for image in images]
    for index, name in enumerate(Outputs._fields):
        alone = np.concatenate([single[index] for single in singles])
        np.testing.assert_allclose(together[index], alone, rtol=1e-3, atol=1e-4, err_msg=name)
    assert together.purified.shape == images.shape and together.purified.dtype == np.uint8


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 32, 32, 3), dtype=np.float32),
        np.zeros((1, 3, 32, 32), dtype=np.uint8),
        np.zeros((32, 32, 3), dtype=np.uint8),
        np.zeros((0, 32, 32, 3), dtype=np.uint8),
    ],
)
def test_other_than_uint8_images_are_refused(engine: Engine, batch: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8 images"):
        engine.run(batch)


@without_cuda
def test_cuda_without_a_device_is_an_error_that_names_what_is_missing(unpacked: Path) -> None:
    with pytest.raises(EngineError, match=r"no CUDA device.*onnxruntime"):
        Engine(unpacked / "graph.onnx", "cuda")


@without_cuda
def test_tensorrt_without_its_libraries_is_an_error_that_names_them(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMPART_ENGINES", str(tmp_path))
    with pytest.raises(EngineError, match=r"no TENSORRT device.*(TensorRT 10|onnxruntime-gpu)"):
        Engine(unpacked / "graph.onnx", "tensorrt")


def test_what_tensorrt_builds_is_kept_by_graph_and_version(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMPART_ENGINES", str(tmp_path))
    options = tensorrt_options(unpacked / "graph.onnx", 0)
    folder = Path(options["trt_engine_cache_path"])
    assert folder.parent == tmp_path and ort.__version__ in folder.name
    assert options["trt_profile_max_shapes"] == f"image:{MAX_BATCH}x32x32x3"
    model = onnx.load(unpacked / "graph.onnx")
    model.doc_string = "another graph"
    onnx.save(model, tmp_path / "other.onnx")
    other = tensorrt_options(tmp_path / "other.onnx", 0)
    assert other["trt_engine_cache_path"] != options["trt_engine_cache_path"]


@without_cuda
def test_auto_runs_on_the_cpu_and_says_so_where_cuda_was_hoped_for(
    unpacked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert Engine(unpacked / "graph.onnx", "auto", 1).device == "cpu"
    hoped = "CUDAExecutionProvider" in ort.get_available_providers()
    assert ("Running on the CPU instead: no CUDA device" in caplog.text) == hoped


@pytest.mark.skipif(not cuda_works(), reason="needs a GPU that CUDA can use")
def test_cuda_gives_the_same_labels(unpacked: Path, engine: Engine, images: np.ndarray) -> None:
    cuda = Engine(unpacked / "graph.onnx", "cuda")
    labels = cuda.run(images).logits.argmax(axis=1)
    np.testing.assert_array_equal(labels, engine.run(images).logits.argmax(axis=1))


def test_onnxruntime_reports_to_nobody(unpacked: Path, tmp_path: Path) -> None:
    """Its telemetry leaves a session file in the temporary folder and a cache at home."""
    code = (
        "import sys; from pathlib import Path; from rampart.handlers.engine import Engine;"
        "Engine(Path(sys.argv[1]), 'cpu', 1)"
    )
    environment = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    environment |= {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    graph = str(unpacked / "graph.onnx")
    subprocess.run([sys.executable, "-c", code, graph], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_is_refused(unpacked: Path) -> None:
    with pytest.raises(EngineError, match="choose one of cpu, cuda, tensorrt, auto"):
        Engine(unpacked / "graph.onnx", "tpu")


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"graph\.onnx is not a graph"):
        Engine(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("picture", ["n", 8, 8, 3]), ("image", [1, 8, 8, 3]), ("image", ["n", 3, 8, 8])],
)
def test_a_graph_of_another_kind_is_refused(
    tmp_path: Path, name: str, shape: list[str | int]
) -> None:
    image = helper.make_tensor_value_info(name, TensorProto.UINT8, shape)
    names = ("logits", "raw_logits", "scores", "purified")
    nodes = [helper.make_node("Identity", [name], [output]) for output in names]
    outputs = [helper.make_tensor_value_info(output, TensorProto.UINT8, shape) for output in names]
    graph = helper.make_graph(nodes, "other", [image], outputs)
    path = tmp_path / "graph.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    with pytest.raises(EngineError, match=r"not a Rampart graph.*export it again"):
        Engine(path)
