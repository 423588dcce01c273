import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import onnx
import pytest
import torch
from blobs import blobs
from command import run
from PIL import Image

from rampart.hardening.model import checkpoint
from rampart.hardening.model import folder as folders
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.report import card as report


@pytest.mark.training
def test_a_model_without_a_purifier_is_archived_as_lean(tmp_path: Path, tiny_folder: Path) -> None:
    model = tmp_path / "bare"
    shutil.copytree(tiny_folder, model, ignore=shutil.ignore_patterns("calibration-full.json"))
    run("archive", model)
    with ZipFile(tmp_path / "bare.mar") as archive:
        assert json.loads(archive.read("card.json"))["variant"] == "lean"


@pytest.mark.training
def test_a_calibration_that_fails_leaves_the_folder_as_it_was_and_one_of_another_net_leaves_nothing(
    tmp_path: Path, lean_only: Path
) -> None:
    held = lean_only.with_name("held.npz")
    data = ["--data", held, "--held", held]
    (lean_only / "report.html").touch()
    before = {file.name: file.read_bytes() for file in lean_only.iterdir()}
    other = Classifier(ClassifierConfig("resnet10", 3, width=0.125))
    checkpoint.save(tmp_path / "three.safetensors", other, {"classifier": other.config._asdict()})
    for wrong in (tmp_path / "three.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises((ValueError, RuntimeError, OSError)):
            run("calibrate", lean_only, *data, "--classifier", wrong)
        assert {file.name: file.read_bytes() for file in lean_only.iterdir()} == before
    known = ["--classifier", lean_only / "weights.safetensors"]
    run("calibrate", tmp_path / "again", *data, *known)  # a model folder's weights are a classifier
    torch.manual_seed(7)
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125))
    checkpoint.save(tmp_path / "c.safetensors", net, {"classifier": net.config._asdict()})
    output = run("calibrate", lean_only, *data, "--classifier", tmp_path / "c.safetensors")
    assert str(lean_only / "calibration-lean.json") in output
    assert not (lean_only / "report.html").exists()
    card = report.read_card(lean_only)
    assert "metrics" not in card and "not recorded" in card["training"]["classifier"]


@pytest.mark.training
def test_a_finished_model_gets_the_variant_guarded_and_keeps_the_rest(lean_only: Path) -> None:
    held = lean_only.with_name("held.npz")
    data = ["--data", held, "--held", held]
    before = {file.name: file.read_bytes() for file in lean_only.iterdir()}
    output = run("calibrate", lean_only, *data, "--guarded")
    after = {file.name: file.read_bytes() for file in lean_only.iterdir()}
    assert set(after) - set(before) == {"calibration-guarded.json"}
    assert {name for name in before if after[name] != before[name]} == {"card.json"}
    assert "guarded promises" in output and str(lean_only / "calibration-guarded.json") in output
    with pytest.raises(ValueError, match="has the variant guarded already"):
        run("calibrate", lean_only, *data, "--guarded")
    with pytest.raises(ValueError, match="--guarded without --classifier takes only"):
        run("calibrate", lean_only, *data, "--guarded", "--data-name", "mine")


@pytest.mark.slow
@pytest.mark.training
def test_int8_is_made_gated_and_taken_once_it_is_measured_to_be_as_robust(
    tmp_path: Path, lean_only: Path
) -> None:
    held = lean_only.with_name("held.npz")
    assert ": lean, fp32, " in run("archive", lean_only, "--out", tmp_path / "a.mar")
    output = run("quantize", lean_only, "--data", held, "--held", held, "--rate", 0.05)
    assert output.splitlines()[-1].startswith("lean: int8 against fp32 on 174 images: ")
    kept = report.read_card(lean_only)["promise"]["lean, int8"]
    assert (kept["rate"], kept["calibration_images"], kept["n"]) == (0.05, 310, 174)
    assert f"lean, int8: {kept['flagged']} of 174 validation images flagged, " in output
    options = ["--part", "validation", "--limit", 8, "--rung", "pgd20", "--int8", "--rate", 0.05]
    options += ["--into-card"]
    run("evaluate", lean_only, "--images", held, *options, "--cache", tmp_path / "found")
    card = report.read_card(lean_only)
    # Worst cases take the whole ladder; what stands in for them here is of the same images.
    found = [row for row in card["metrics"] if row["name"] == "pgd20"]
    assert {"classifier", "pipeline", "graph:int8"} == {row["subject"] for row in found}
    table = run("evaluate", lean_only, "--images", held, *options, "--variant", "lean", "--eps", 4)
    assert "graph:int8  lean     pgd20" in table
    assert "classifier" not in table and "pipeline" not in table
    kept = [row | {"name": "robust", "attack": "all", "value": 0.5, "n": 100} for row in found]
    for row in kept:
        row.pop("rate", None)
    card["metrics"] += kept
    report.write_card(lean_only, card)
    assert ": lean, int8, " in run("archive", lean_only, "--out", tmp_path / "a.mar")
    next(row for row in kept if row["subject"] == "graph:int8")["value"] = 0.48
    check = {"name": "logits", "passed": True, "seen": ""}
    card["checks"] = [check | {"subject": who} for who in ("pipeline lean", "graph:int8 lean")]
    report.write_card(lean_only, card)
    assert folders.best_precision(lean_only, "lean") == "fp32"
    # A new int8 graph has none of the old one's figures and self-checks.
    run("quantize", lean_only, "--data", held, "--held", held, "--rate", 0.05, "--limit", 64)
    card = report.read_card(lean_only)
    assert {"classifier", "pipeline"} == {row["subject"] for row in card["metrics"]}
    assert [row["subject"] for row in card["checks"]] == ["pipeline lean"]


@pytest.mark.training
def test_an_archive_is_calibrated_anew_on_pictures_without_labels(
    tmp_path: Path, tiny_archive: Path
) -> None:
    (tmp_path / "traffic").mkdir()
    for number, image in enumerate(blobs(120, seed=3).image.numpy()):
        Image.fromarray(image).save(tmp_path / "traffic" / f"{number}.png")
    archive = shutil.copy(tiny_archive, tmp_path / "mine.mar")
    output = run("calibrate", "--archive", archive, "--images", tmp_path / "traffic")
    assert re.search(r"flags \d+\.\d% of these 120 pictures \(promised: 1\.0%\); drift 0", output)
    assert (tmp_path / "mine-recalibrated.mar").is_file()


@pytest.mark.parametrize(
    "options", [[], ["--archive", "a.mar"], ["store/a", "--data", "d"], ["--images", "i"]]
)
def test_calibrate_without_all_it_needs_names_both_ways(options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--classifier FILE .* or\s--archive FILE\.mar --images"):
        run("calibrate", *options)


@pytest.mark.parametrize("option", ["store/a", "--skip-bad", "--guarded"])
def test_an_archive_has_its_own_classifier_to_calibrate(option: str) -> None:
    with pytest.raises(ValueError, match="take only --out"):
        run("calibrate", option, "--archive", "a.mar", "--images", "i")


@pytest.mark.training
def test_the_card_of_an_archive_is_printed_in_full(tiny_archive: Path) -> None:
    with ZipFile(tiny_archive) as packed:
        card = json.loads(packed.read("card.json"))
    assert json.loads(run("inspect", tiny_archive, "--card")) == card


@pytest.mark.training
def test_names_out_of_files_do_not_act_on_the_terminal(tiny_archive: Path, tmp_path: Path) -> None:
    file = shutil.copy(tiny_archive, tmp_path / "a.mar")
    with ZipFile(file, "a") as packed:
        packed.writestr("\x1b[2J\nall is well\u202e.txt", "x")
    done = subprocess.run(
        [sys.executable, "-m", "rampart", "verify", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert r"\x1b[2J" in done.stderr and r"all is well\u202e.txt, which nobody" in done.stderr
    with ZipFile(tiny_archive) as packed:
        model = onnx.load_model_from_string(packed.read("graph.onnx"))
    model.graph.input[0].name = "\x1b]0;mine\x07\nit runs here"
    onnx.save(model, tmp_path / "a.onnx")
    shown = run("inspect", tmp_path / "a.onnx")
    assert "\x1b" not in shown and "\x07" not in shown and "\nit runs here" not in shown
    assert r"input \x1b]0;mine\x07\nit runs here: uint8" in shown
