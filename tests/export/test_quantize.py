import json
import shutil
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from export import parity
from export.archive import archive, int8_parts, sample_crops
from export.quantize import classifier_nodes, make, quantize, ranges_file
from export.to_onnx import to_onnx
from handlers.engine import Engine
from hardening import pipeline as pipelines
from hardening.calibrate import calibration_file, load_variant
from hardening.data import Images, split
from hardening.pipeline import DefendedClassifier
from hardening.report import read_card, write_card


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: DefendedClassifier) -> Path:
    return to_onnx(tiny_pipeline, tmp_path_factory.mktemp("q") / "graph.onnx")


@pytest.fixture(scope="module")
def int8(graph: Path, tiny_images: Images) -> Path:
    image = tiny_images.image[:128].numpy()
    return quantize(graph, ranges_file(graph.parent, "full"), graph.with_name("int8.onnx"), image)


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
    inside = {n.op_type for n in before.node if n.name in classifier_nodes(before)}
    assert inside == {"Conv", "Relu", "Add"}


def test_ranges_that_were_kept_give_the_same_graph_again(graph: Path, int8: Path) -> None:
    again = quantize(graph, ranges_file(graph.parent, "full"), graph.with_name("again.onnx"))
    assert again.read_bytes() == int8.read_bytes()


def test_without_ranges_the_command_that_makes_them_is_named(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`rampart quantize` makes it"):
        quantize(graph, tmp_path / "ranges.json", tmp_path / "out.onnx")


def test_a_graph_without_our_names_is_refused() -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    with pytest.raises(ValueError, match=r"no layer whose weights are named classifier\."):
        classifier_nodes(onnx.helper.make_graph([node], "g", [], []))


def test_the_gate_asks_for_equal_labels_and_the_promised_rate(
    graph: Path, int8: Path, tiny_folder: Path, tiny_images: Images
) -> None:
    held, calibration = split(tiny_images, "validation"), load_variant(tiny_folder, "full")
    before, after = Engine(graph), Engine(int8)
    found = parity.agree(before, after, calibration, held, rate=0.05)
    assert found.images == len(held)
    assert found.same == 1 - len(found.differ) / len(held) > 0.9
    assert parity.agree(before, before, calibration, held, rate=0.05).holds
    assert not found._replace(same=0.979).holds
    assert not found._replace(same=1, accuracy=(0.7, 0.68)).holds
    assert not found._replace(same=1, flagged=0.2).holds


def test_a_graph_of_another_net_is_not_taken_for_the_int8_form(
    graph: Path, int8: Path, tiny_folder: Path, tiny_images: Images
) -> None:
    other, _ = pipelines.load(tiny_folder / "weights.safetensors")
    with torch.no_grad():
        other.classifier.head.weight.neg_()
        other.classifier.head.bias.neg_()
    before, turned = Engine(graph), Engine(to_onnx(other, graph.with_name("turned.onnx")))
    parity.check_close(before, Engine(int8), sample_crops(32))
    with pytest.raises(RuntimeError, match="labels of the fp32 one on only 0%"):
        parity.check_close(before, turned, sample_crops(32))


def test_the_int8_archive_is_smaller_calibrated_for_itself_and_answers(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    with pytest.raises(ValueError, match="tiny full was not made: `rampart quantize`"):
        archive(folder, tmp_path / "early.mar", precision="int8")
    found = make(folder, "full", tiny_images, source="blobs", rate=0.05)
    assert found.same >= 0.98
    made = {"full": {"sha256": int8_parts(folder, "full")}}
    write_card(folder, read_card(folder) | {"int8": made})
    archive(folder, tmp_path / "fp32.mar")
    archive(folder, tmp_path / "int8.mar", precision="int8")
    content = []
    for name in ("fp32", "int8"):
        with zipfile.ZipFile(tmp_path / f"{name}.mar") as packed:
            packed.extractall(tmp_path / name)
        card = json.loads((tmp_path / name / "card.json").read_text())
        assert card["precision"] == name
        size = (tmp_path / name / "graph.onnx").stat().st_size
        content.append((size, (tmp_path / name / "calibration.json").read_bytes()))
    assert content[1][0] < 0.6 * content[0][0]
    assert content[1][1] == calibration_file(folder, "full", "int8").read_bytes() != content[0][1]
    out = Engine(tmp_path / "int8" / "graph.onnx").run(tiny_images.image[:4].numpy())
    assert out.logits.shape == (4, 10) and out.purified.shape == (4, 32, 32, 3)
    ranges_file(folder, "full").write_text("{}")
    with pytest.raises(ValueError, match="was made of other files than these"):
        archive(folder, tmp_path / "late.mar", precision="int8")


def test_a_form_that_fails_its_gate_leaves_nothing_behind(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    before = sorted(file.name for file in folder.iterdir())
    first = len(split(tiny_images, "validation"))
    noise = torch.randint(256, (first, 32, 32, 3), generator=torch.manual_seed(0)).byte()
    image = torch.cat([noise, tiny_images.image[first:]])  # all flagged: unlike the rest
    mixed = Images(image, tiny_images.label, tiny_images.classes)
    with pytest.raises(RuntimeError, match="loses too much in int8, so nothing was written"):
        make(folder, "full", mixed, source="blobs", rate=0.05)
    assert sorted(file.name for file in folder.iterdir()) == before


def test_images_of_other_classes_are_refused(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    other = Images(tiny_images.image, tiny_images.label, tuple("abcdefghij"))
    with pytest.raises(ValueError, match="the images have the classes"):
        make(folder, "full", other, source="letters")
