import json
import shutil
import zipfile
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from test_parity import Altered

from rampart.export import parity
from rampart.export.archive import archive
from rampart.export.build import sample_crops
from rampart.export.precision import lower, make
from rampart.export.shipped import parts
from rampart.handlers.engine import Engine
from rampart.hardening.model.calibrate import Precision, calibration_file, load_variant
from rampart.hardening.model.card import read_card, write_card
from rampart.hardening.model.images import Images, split
from rampart.hardening.model.pipeline import DefendedClassifier


def gate(images: Images, precision: str = "int8") -> partial[parity.Agreement]:
    few = split(images, "validation")
    return partial(parity.agree, images=few, precision=precision, rate=0.05)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Path) -> Path:
    return Path(shutil.copy(tiny_graph, tmp_path_factory.mktemp("p")))


@pytest.fixture(scope="module")
def fp16(graph: Path, tiny_pipeline: DefendedClassifier) -> Path:
    return lower(tiny_pipeline, "fp16", graph.with_name("fp16.onnx"), Path())


def test_fp16_is_inside_and_what_decides_stays_float32(fp16: Path) -> None:
    made = onnx.load(fp16).graph
    kinds = {value.name: value.data_type for value in made.initializer}
    weights = {name: kind for name, kind in kinds.items() if ".weight" in name or ".bias" in name}
    half = {name for name, kind in weights.items() if kind == TensorProto.FLOAT16}
    assert {name.split(".")[0] for name in half} == {"classifier", "purifier"}
    assert {name for name in weights if name not in half} == {
        "classifier.head.weight",
        "classifier.head.bias",
    }
    outputs = {value.name: value.type.tensor_type.elem_type for value in made.output}
    assert outputs.pop("purified") == TensorProto.UINT8
    assert set(outputs.values()) == {TensorProto.FLOAT}
    produced = {name: node for node in made.node for name in node.output}
    softmax = [node for node in made.node if node.op_type == "Softmax"]
    assert softmax and all(produced[node.input[0]].op_type != "Cast" for node in softmax)


def test_the_gate_asks_for_equal_labels_and_the_promised_rate(
    graph: Path, fp16: Path, tiny_folder: Path, tiny_images: Images
) -> None:
    held, calibration = split(tiny_images, "validation"), load_variant(tiny_folder, "full")
    before, after = Engine(graph), Engine(fp16)
    found = parity.agree(
        (before, calibration), (after, calibration), held, precision="fp16", rate=0.05
    )
    assert found.images == len(held)
    assert found.equal == 1 - len(found.differ) / len(held) > 0.9
    same = found._replace(equal=1, accuracy=(0.7, 0.7), flagged=(0.05, 0.05))
    assert same.holds
    assert not same._replace(equal=0.994).holds
    assert same._replace(equal=0.994, precision="int8").holds
    assert not same._replace(equal=0.979, precision="int8").holds
    assert not same._replace(accuracy=(0.7, 0.694)).holds
    assert same._replace(accuracy=(0.7, 0.694), precision="int8").holds
    assert not same._replace(accuracy=(0.7, 0.68), precision="int8").holds
    assert not same._replace(flagged=(0.05, 0.2)).holds
    assert same._replace(flagged=(0.2, 0.2)).holds, "fp32 breaks the promise as well"


def test_a_graph_of_another_net_is_not_taken_for_a_form_of_this_one(
    graph: Path, fp16: Path, tiny_folder: Path, tiny_images: Images
) -> None:
    other = onnx.load(graph)
    for value in other.graph.initializer:
        if value.name.startswith("classifier.head."):
            value.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(value), value.name))
    onnx.save(other, graph.with_name("turned.onnx"))
    table, crops = load_variant(tiny_folder, "full"), sample_crops(32)
    before, half = (Engine(graph), table), Engine(fp16)
    turned = Engine(graph.with_name("turned.onnx"))
    assert "on 100% of the labels of 32" in parity.check_close(before, (half, table), crops)
    with pytest.raises(RuntimeError, match="only agrees with the fp32 one on 0%"):
        parity.check_close(before, (turned, table), crops)
    for scores in (-1e6, 1e6):  # accepts everything, flags everything
        constant = Altered(half, lambda out, x=scores: out._replace(scores=0 * out.scores + x))
        with pytest.raises(RuntimeError, match="p-values differ"):
            parity.check_close(before, (constant, table), tiny_images.image[:32])


@pytest.mark.parametrize(
    ("precision", "size"),
    [("int8", 0.6), pytest.param("fp16", 0.65, marks=pytest.mark.slow)],
)
def test_an_archive_in_lower_precision_is_smaller_calibrated_for_itself_and_answers(
    precision: Precision,
    size: float,
    tiny_folder: Path,
    tiny_shipped: Path,
    tiny_images: Images,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    with pytest.raises(
        ValueError, match=f"was not made: `rampart quantize --precision {precision}"
    ):
        archive(folder, tmp_path / "early.mar", variant="lean", precision=precision)
    found = make(
        folder, "lean", precision, tiny_images, gate(tiny_images, precision), source="blobs"
    )
    assert found.equal >= parity.GATES[precision][0]
    made = {"lean": {"sha256": parts(folder, "lean", precision)}}
    write_card(folder, read_card(folder) | {precision: made})
    archive(folder, tmp_path / f"{precision}.mar", variant="lean", precision=precision)
    archive(tiny_shipped, tmp_path / "fp32.mar", variant="lean")
    content = []
    for name in ("fp32", precision):
        with zipfile.ZipFile(tmp_path / f"{name}.mar") as packed:
            packed.extractall(tmp_path / name)
        card = json.loads((tmp_path / name / "card.json").read_text())
        assert card["precision"] == name
        weight = (tmp_path / name / "graph.onnx").stat().st_size
        content.append((weight, (tmp_path / name / "calibration.json").read_bytes()))
    assert content[1][0] < size * content[0][0]
    assert calibration_file(folder, "lean", precision).read_bytes() == content[1][1]
    assert content[0][1] != content[1][1]
    out = Engine(tmp_path / precision / "graph.onnx").run(tiny_images.image[:4].numpy())
    assert out.logits.shape == (4, 10) and out.purified.shape == (4, 32, 32, 3)
    calibration_file(folder, "lean", precision).write_text("{}")
    with pytest.raises(ValueError, match="was made of other files than these"):
        archive(folder, tmp_path / "late.mar", variant="lean", precision=precision)


def test_a_form_that_fails_its_gate_leaves_nothing_behind(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    before = sorted(file.name for file in folder.iterdir())
    monkeypatch.setitem(parity.GATES, "int8", (1.01, 0))  # equal labels on all images fall short
    with pytest.raises(RuntimeError, match="loses too much in int8, so nothing was written"):
        make(folder, "full", "int8", tiny_images, gate(tiny_images), source="blobs")
    assert sorted(file.name for file in folder.iterdir()) == before


def test_images_unlike_the_calibration_are_held_against_int8_no_more_than_against_fp32(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    first = len(split(tiny_images, "validation"))
    noise = torch.randint(256, (first, 32, 32, 3), generator=torch.manual_seed(0)).byte()
    image = torch.cat([noise, tiny_images.image[first:]])
    mixed = Images(image, tiny_images.label, tiny_images.classes)
    found = make(folder, "full", "int8", mixed, gate(mixed), source="blobs")
    assert found.flagged == (1, 1)


def test_images_of_other_classes_are_refused(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    other = Images(tiny_images.image, tiny_images.label, tuple("abcdefghij"))
    with pytest.raises(ValueError, match="the images have the classes"):
        make(folder, "full", "int8", other, gate(other), source="letters")
