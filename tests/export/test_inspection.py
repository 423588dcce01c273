import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.inspection import inspect
from export.to_tensorrt import write_record


def test_an_archive_tells_its_policy_its_graph_and_that_it_runs(tiny_archive: Path) -> None:
    text = "\n".join(inspect(tiny_archive))
    for line in (
        "model: tiny, full, fp32",
        "false_alarm_rate 0.01",
        "input image: uint8 ('batch', 32, 32, 3)",
        "output purified: uint8",
        "CPUExecutionProvider",
        "it runs here, on the CPU",
    ):
        assert line in text


def test_a_graph_that_is_not_ours_is_shown_and_said_not_to_run(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "other.onnx")
    text = "\n".join(inspect(tmp_path / "other.onnx"))
    assert "input x: float ('n', 2)" in text
    assert "it does not run as a Rampart graph: " in text


def test_what_is_no_archive_or_changed_is_refused(tmp_path: Path, tiny_archive: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: neither an archive"):
        list(inspect(tmp_path / "a.txt"))
    with pytest.raises(FileNotFoundError, match=r"b\.mar"):
        list(inspect(tmp_path / "b.mar"))
    shutil.copy(tmp_path / "a.txt", tmp_path / "c.onnx")
    with pytest.raises(ValueError, match=r"c\.onnx is no ONNX graph"):
        list(inspect(tmp_path / "c.onnx"))
    content = tiny_archive.read_bytes()
    (tmp_path / "d.mar").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"d\.mar is not an archive"):
        list(inspect(tmp_path / "d.mar"))


def test_a_plan_is_told_by_its_record_and_not_loaded(tmp_path: Path) -> None:
    plan, graph = tmp_path / "a.plan", tmp_path / "a.onnx"
    plan.write_bytes(b"code")
    graph.write_bytes(b"graph")
    with pytest.raises(ValueError, match=r"no readable record a\.plan\.json"):
        list(inspect(plan))
    write_record(plan, graph, version="10.16.0", parity="parity on 96 images")
    told = "\n".join(inspect(plan))
    assert "TensorRT 10.16.0" in told and "gate: parity on 96 images" in told
    assert "its record has its hash" in told
    plan.write_bytes(b"other code")
    assert "is that of another file: do not load it" in "\n".join(inspect(plan))
