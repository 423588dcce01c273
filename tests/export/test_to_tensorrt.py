import importlib.util
import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from rampart.export.archive import archive
from rampart.export.precision import lower
from rampart.export.quantize import quantize
from rampart.export.to_tensorrt import (
    shapes,
    timing_name,
    to_tensorrt,
    trtexec_line,
    unsupported,
    write_record,
)
from rampart.hardening.model.files import graph_file
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import Variant, load

missing = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="this machine has TensorRT"
)


def test_the_profile_spans_from_one_image_to_the_largest_batch() -> None:
    assert shapes(32) == [(1, 32, 32, 3), (8, 32, 32, 3), (32, 32, 32, 3)]


def key(graph: Path, gpu: str = "H200", tensorrt: str = "10.16") -> str:
    return timing_name(graph, gpu=gpu, tensorrt=tensorrt)


def test_the_name_of_a_timing_cache_changes_with_everything_that_was_timed(
    tiny_graph: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(tiny_graph.read_bytes() + b"\0")
    changed = [key(tiny_graph, gpu="L4"), key(tiny_graph, tensorrt="11.0"), key(other)]
    assert key(tiny_graph) == key(tiny_graph)
    assert len({key(tiny_graph), *changed}) == 4


def test_trtexec_is_told_the_same() -> None:
    assert trtexec_line(Path("g.onnx"), Path("g.plan"), 32) == (
        "trtexec --onnx=g.onnx --stronglyTyped --noTF32 --minShapes=image:1x32x32x3"
        " --optShapes=image:8x32x32x3 --maxShapes=image:32x32x32x3 --saveEngine=g.plan"
    )


@pytest.mark.parametrize("variant", ["full", "lean"])
def test_every_node_of_our_graphs_is_one_that_tensorrt_takes(
    variant: Variant, tiny_shipped: Path, tmp_path: Path
) -> None:
    assert unsupported(graph_file(tiny_shipped, variant)) == {}
    pipeline, _ = load(tiny_shipped / "weights.safetensors", variant)
    assert unsupported(lower(pipeline, "fp16", tmp_path / "g.onnx", Path())) == {}


def test_what_tensorrt_would_not_take_is_found(tmp_path: Path) -> None:
    def value(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["n", 4])

    nodes = [
        helper.make_node("Transpose", ["image"], ["turned"], "early"),
        helper.make_node("Cast", ["turned"], ["x"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Det", ["x"], ["y"], "odd"),
        helper.make_node("Cast", ["y"], ["small"], "inside", to=TensorProto.UINT8),
        helper.make_node("Transpose", ["small"], ["out"], "late"),
    ]
    ends = [value("image", TensorProto.UINT8)], [value("out", TensorProto.UINT8)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", *ends)), tmp_path / "g.onnx")
    assert unsupported(tmp_path / "g.onnx") == {
        "8-bit input that is not cast at once": ["early"],
        "Det is not in the support matrix": ["odd"],
        "8-bit values inside the graph": ["inside"],
    }


@missing
def test_without_tensorrt_it_says_what_to_install_and_what_trtexec_would_do(
    tiny_shipped: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"pip install .*tensorrt-cu13.*trtexec --onnx="):
        to_tensorrt(tiny_shipped, tmp_path / "tiny.plan", variant="lean")
    assert not list(tmp_path.iterdir())


def test_an_archive_takes_a_plan_of_its_own_graph_alone(
    tiny_shipped: Path, tiny_graph: Path, tiny_images: Images, tmp_path: Path
) -> None:
    plan = tmp_path / "tiny.plan"
    plan.write_bytes(b"not run here")
    record = write_record(plan, tiny_graph, version="10.16.0", parity="parity on 96 images")
    assert json.loads(record.read_text())["tensorrt"] == "10.16.0"
    archive(tiny_shipped, tmp_path / "a.mar", plan=plan)
    int8 = tmp_path / "int8.onnx"
    quantize(tiny_graph, tmp_path / "ranges.json", int8, tiny_images.image[:64].numpy())
    write_record(plan, int8, version="10.16.0", parity="parity on 96 images")
    with pytest.raises(RuntimeError, match="is not the file that"):
        archive(tiny_shipped, tmp_path / "b.mar", plan=plan)
