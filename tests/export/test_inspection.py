import hashlib
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rampart.export import trial
from rampart.export.inspection import card_text, inspect
from rampart.export.to_tensorrt import write_record


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


OUTPUTS = ("logits", "raw_logits", "scores", "purified")


def write_graph(
    file: Path, nodes: list[onnx.NodeProto], source: str, **values: np.ndarray
) -> onnx.ModelProto:
    """A graph with inputs and outputs like ours, each output made of `source`."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 4, 4, 3])
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in OUTPUTS]
    ends = [helper.make_node("Identity", [source], [name]) for name in OUTPUTS]
    known = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph([*nodes, *ends], "g", [image], outs, known)
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    onnx.save(model, file)
    return model


def test_a_graph_that_never_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 1)
    step = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["x"], ["y"])],
        "step",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]),
        ],
    )
    loop = helper.make_node("Loop", ["", "yes", "start"], ["end"], body=step)
    start = {"yes": np.array(True), "start": np.ones(1, np.float32)}
    write_graph(tmp_path / "loop.onnx", [loop], "end", **start)
    lines = list(inspect(tmp_path / "loop.onnx"))
    assert "1 Loop" in "".join(lines)
    assert lines[-1] == "it does not run as a Rampart graph: it took too long, more than 1 s"


def test_a_graph_that_fills_memory_is_told(tmp_path: Path) -> None:
    huge = helper.make_node("ConstantOfShape", ["shape"], ["huge"])
    least = helper.make_node("ReduceMin", ["huge"], ["least"])
    file = tmp_path / "huge.onnx"
    write_graph(file, [huge, least], "least", shape=np.array([2**33]))
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    *_, last = inspect(file)
    assert last.startswith("it does not run as a Rampart graph: it needs too much memory")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(began, 2**21)  # KiB


def test_weights_in_other_files_are_not_read(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "a.onnx", [], "w", w=np.zeros((1, 2), np.float32))
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    for place in ("initializer", "inner graph"):
        if place == "inner graph":
            del model.graph.initializer[:]
            model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=inner))
        onnx.save(model, tmp_path / "a.onnx")
        *_, last = inspect(tmp_path / "a.onnx")
        assert last.endswith("it keeps weights in other files, which are not read"), place


def test_a_file_too_large_to_be_a_graph_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LARGEST", 2**20)
    with (tmp_path / "a.onnx").open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(ValueError, match=r"a\.onnx is not an ONNX graph: it is larger than 2 GB"):
        list(inspect(tmp_path / "a.onnx"))


def forged(archive: Path, out: Path, **texts: bytes) -> Path:
    """A copy of an archive with other contents, and hashes that say it is whole."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        content = {name: old.read(name) for name in old.namelist() if name != "sha256.json"}
        names = {"card": "card.json", "config": "model-config.yaml"}
        content |= {names[name]: text for name, text in texts.items()}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        for name, data in (content | {"sha256.json": json.dumps(hashes).encode()}).items():
            new.writestr(name, data)
    return out


def test_a_name_in_a_card_begins_no_line_of_its_own(tiny_archive: Path, tmp_path: Path) -> None:
    row = {"subject": "classifier", "variant": "-", "name": "clean", "value": 0.5, "n": 10}
    row |= {"interval": [0, 1], "data": "test\nit runs here", "command": "rampart evaluate"}
    card = {"name": "a\nit runs here", "threat_model": "Linf 8/255", "metrics": [row]}
    config = b'rampart: {"a\\nit runs here": "\\e[2J"}'
    file = forged(tiny_archive, tmp_path / "a.mar", card=json.dumps(card).encode(), config=config)
    lines = list(inspect(file))
    assert not [line for line in lines if line.startswith("it runs here") and line != lines[-1]]
    assert r"model: a\nit runs here, None, fp32" in lines
    assert r"policy: a\nit runs here \x1b[2J" in lines


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"card": b"[]"}, r"card\.json is not a card"),
        ({"card": b"{"}, r"card\.json is not JSON"),
        ({"card": b'{"metrics": [{}], "threat_model": "x"}'}, r"card\.json is not a card"),
        ({"card": b'{"sha256": []}'}, r"card\.json is not a card"),
        ({"config": b"rampart: {a: &a [1, 1], b: [*a, *a]}"}, "refers to itself"),
        ({"config": b"[" * 2_000}, r"model-config\.yaml is not YAML"),
        ({"config": b"#" * 200_000}, r"model-config\.yaml is too long"),
        ({"config": b"rampart: 5"}, r"model-config\.yaml is not YAML"),
        ({"config": b"- 1"}, r"model-config\.yaml is not YAML"),
    ],
)
def test_a_card_or_settings_that_make_no_sense_are_an_error_of_one_line(
    tiny_archive: Path, tmp_path: Path, texts: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(inspect(forged(tiny_archive, tmp_path / "a.mar", **texts)))


def test_the_card_in_full_is_json_without_control_characters(
    tiny_archive: Path, tmp_path: Path
) -> None:
    assert json.loads(card_text(tiny_archive))["variant"] == "full"
    card = {"name": "a\x1b\x7f\u202e\x9b"}
    file = forged(tiny_archive, tmp_path / "a.mar", card=json.dumps(card).encode())
    text = card_text(file)
    assert json.loads(text) == card
    assert text.isascii() and text.replace("\n", "").isprintable()
    with pytest.raises(ValueError, match=r"a\.onnx: only an archive"):
        card_text(tmp_path / "a.onnx")


def test_a_card_is_shown_without_onnx_and_torch(tiny_archive: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "for name in ('onnx', 'torch'): sys.modules[name] = None\n"
        "from rampart.export.inspection import card_text; print(card_text(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tiny_archive)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(result.stdout)["variant"] == "full", result.stderr


def test_what_is_no_archive_or_changed_is_refused(tmp_path: Path, tiny_archive: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: neither an archive"):
        list(inspect(tmp_path / "a.txt"))
    with pytest.raises(FileNotFoundError, match=r"b\.mar"):
        list(inspect(tmp_path / "b.mar"))
    shutil.copy(tmp_path / "a.txt", tmp_path / "c.onnx")
    with pytest.raises(ValueError, match=r"c\.onnx is not an ONNX graph"):
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
