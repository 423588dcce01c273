"""A folder of ONNX files from elsewhere, attacked one after the other and put side by side."""

import json
from pathlib import Path

import pytest
from blobs import blobs
from command import run
from onnx_files import quantized, saved

from rampart.hardening.attack.pgd import Threat
from rampart.onnx_study import Described, evaluate
from rampart.onnx_table import compare, described_of
from rampart.studies import Study

KERAS = Path(__file__).with_name("keras.onnx")  # made by keras_file.py


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(Threat("Linf", 4 / 255), quick=True, cache=tmp_path / "found", command="it")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("images") / "images.npz", blobs(200, size=16, seed=3))


def test_kerass_own_export_has_a_page_of_the_whole_ladder(
    tmp_path: Path, images: Path, study: Study
) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(KERAS.read_bytes())
    found = evaluate(file, images, study, limit=20, gallery=tmp_path / "gallery.html")
    told = "takes nhwc, 16 pixels a side, any batch; range bytes, found by accuracy on 200 images"
    assert told in found.lines[0] and "its softmax cut off" in found.lines[0]
    rows = {row["name"]: row["value"] for row in found.card["metrics"]}
    assert rows["robust"] <= min(rows["pgd20"], rows["autoattack_short"]) < rows["clean"]
    page = (tmp_path / "net-report.html").read_text()
    assert "Robustness of net" in page and "an attacker who knows every part" in page
    kept = round(20 * rows["robust"])
    assert f"the label of {kept / 20:.1%}" in page and "served by default" not in page
    assert "It takes nhwc, 16 pixels a side; range bytes" in page
    assert "its twin in torch passed the parity gate" in page and "self-checks passed" in page
    assert page.count("chelsea") == 1 and page.count("difference x10") == 2  # words and alt text
    gallery = (tmp_path / "gallery.html").read_text()
    assert "6 of the 20 evaluated images" in gallery
    assert gallery.count("difference x10: at most") == 12


def test_a_black_box_has_a_page_that_promises_no_worst_case(
    tmp_path: Path, images: Path, study: Study
) -> None:
    file = quantized(KERAS, tmp_path / "int8.onnx")
    found = evaluate(file, images, study, limit=6)
    rows = {row["name"]: row["value"] for row in found.card["metrics"]}
    page = (tmp_path / "int8-report.html").read_text()
    assert "an attacker who sees its answers alone" in page and "worst case" not in page.replace(
        "so this is no worst case", ""
    )
    assert (
        f"Square leaves {rows['square']:.1%}" in page and "It was attacked as a black box" in page
    )
    assert "knows every part" not in page and "chelsea" not in page


def test_a_folder_is_ranked_with_black_boxes_last_and_refused_files_named(
    tmp_path: Path, images: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "b.onnx").write_bytes(KERAS.read_bytes())
    quantized(KERAS, folder / "a.onnx")
    (folder / "c.onnx").write_bytes(b"no file of ONNX")
    said = run(
        "evaluate", folder, "--images", images, "--quick", "--limit", 6, "--eps", 4,
        "--cache", tmp_path / "found",
    )  # fmt: skip
    text = (folder / "table.md").read_text()
    assert text in said and "6 of images.npz (n = 6), Linf 4/255" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert [line[:2] for line in lines] == [["| 1", "b.onnx"], ["| -", "a.onnx"]]
    robust = json.loads((folder / "b-measured.json").read_text())["metrics"]
    worst = next(row["value"] for row in robust if row["name"] == "robust")
    assert lines[0][4].startswith(f"{worst:.1%} (") and lines[1][4].startswith("at most ")
    assert f"- c.onnx was refused: {folder / 'c.onnx'} is no ONNX file" in text


def test_a_folder_without_a_file_that_can_be_evaluated_is_refused(
    tmp_path: Path, images: Path, study: Study
) -> None:
    (tmp_path / "c.onnx").write_bytes(b"no file of ONNX")
    with pytest.raises(ValueError, match=r"no file was evaluated: .*c\.onnx is no ONNX file"):
        compare(tmp_path, images, study)
    assert not (tmp_path / "table.md").exists()


def test_a_range_once_named_is_that_of_the_table_while_the_file_is_the_same(
    tmp_path: Path, images: Path, study: Study
) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(KERAS.read_bytes())
    evaluate(file, images, study, described=Described("bytes"), limit=4, rungs=["pgd20"])
    assert described_of(file, Described()) == Described("bytes")
    assert described_of(file, Described("unit")) == Described("unit")
    file.write_bytes(KERAS.read_bytes() + b"\n")
    assert described_of(file, Described()) == Described()


@pytest.mark.parametrize("option", ["--variant=lean", "--int8", "--into-card", "--gallery=a.html"])
def test_options_of_our_models_are_refused_with_a_folder_of_files(
    option: str, tmp_path: Path, images: Path
) -> None:
    (tmp_path / "c.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=f"not a Rampart model: leave out {option.split('=')[0]}$"):
        run("evaluate", tmp_path, "--images", images, option)
