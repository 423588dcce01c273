import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
import torch
import typer
from blobs import blobs
from PIL import Image
from torchvision.models import get_model
from typer.testing import CliRunner

import rampart
from hardening import checkpoint, report
from hardening import folder as folders
from hardening.data import hold_out
from hardening.models import Classifier, ClassifierConfig

README = Path(rampart.__file__).parent / "README.md"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(rampart.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_user_gets_from_images_to_an_archive_with_six_commands(tmp_path: Path) -> None:
    for name, count, seed in (("train", 128, 0), ("held", 400, 1), ("test", 24, 2)):
        images = blobs(count, seed=seed)
        pixels, label = images.image.numpy(), images.label.numpy()
        np.savez(tmp_path / name, image=pixels, label=label, classes=images.classes)
    data = ["--data", tmp_path / "train.npz", "--held", tmp_path / "held.npz"]
    quick = ["--epochs", 1, "--batch-size", 32, "--validate-on", 16, "--device", "cpu"]
    classifier, model = tmp_path / "c" / "classifier.safetensors", tmp_path / "toy"
    run("train", *data, *quick, "--out", tmp_path / "c", "--arch", "resnet10", "--width", 0.125)
    run("purifier", *data, *quick, "--out", tmp_path / "p", "--classifier", classifier)
    generator = tmp_path / "p" / "purifier.safetensors"
    parts = ["--classifier", classifier, "--purifier", generator]
    run("calibrate", model, *data, *parts)
    few = ["--limit", 16, "--only", "pgd20", "--cache", tmp_path / "found"]
    assert "pgd20" in run("evaluate", model, "--data", tmp_path / "test.npz", *few)
    assert len((model / "evaluations.jsonl").read_text().splitlines()) == 1
    metrics = json.loads((model / "card.json").read_text())["metrics"]
    names = {(m["subject"], m["variant"], m["name"]) for m in metrics}
    assert {("classifier", "-", "pgd20"), ("pipeline", "full", "clean_rejection")} <= names
    assert all(m["n"] == 16 and len(m["interval"]) == 2 and m["command"] for m in metrics)
    test = ["--data", tmp_path / "test.npz"]
    run("evaluate", model, *test, *few, "--variant", "full", "--eps", 4)
    card = report.read_card(model)
    alone = [row for row in card["metrics"] if row.get("eps") == "4/255"]
    assert {(row["subject"], row["variant"]) for row in alone} == {("pipeline", "full")}
    assert card["threat_model"] == "Linf 8/255"  # the first one's
    assert "parity on" in run("archive", model, *test)
    assert (tmp_path / "toy.mar").is_file()


def test_harden_goes_all_the_way_and_repeats_only_what_other_inputs_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 64, 0), ("held", 400, 1)):
        images = blobs(count, seed=seed)
        np.savez(name, image=images.image.numpy(), label=images.label.numpy())
    data = ["--data", "train.npz", "--held", "held.npz", "--device", "cpu", "--evaluate-on", 0]
    net = ["--arch", "resnet10", "--width", 0.125, "--epochs", 1]
    command = ["harden", *data, *net, "--out", "store/mine.mar", "--purifier-epochs"]
    first = run(*command, 1)
    assert [line for line in first.splitlines() if line.startswith("[")] == [
        "[1/4] train",
        "[2/4] purifier",
        "[3/4] calibrate",
        "[4/4] archive",
    ]
    assert Path("store/mine.mar").is_file()
    assert Path("store/mine/weights.safetensors").is_file()
    card = report.read_card(Path("store/mine"))
    report.write_card(Path("store/mine"), card | {"ablation": {"measured": "since"}})
    Path("store/mine/evaluations.jsonl").write_text("logged since\n")
    packed = Path("store/mine.mar").read_bytes()
    with ZipFile("store/mine.mar", "a") as archive:
        archive.writestr("built", "since")
    again = run(*command, 1)
    assert again.count("done before") == 4 and "mine.mar is of these weights and stays" in again
    with ZipFile("store/mine.mar") as archive:
        assert archive.read("built") == b"since"
    Path("store/mine.mar").write_bytes(packed[:1000])  # as a full disk left it
    run(*command, 1)
    assert Path("store/mine.mar").read_bytes() == packed
    Path("store/mine/report.html").touch()
    assert report.read_card(Path("store/mine"))["ablation"] == {"measured": "since"}
    assert Path("store/mine/evaluations.jsonl").read_text() == "logged since\n"
    lean = run(*command, 0)
    assert "[1/3] train: done before" in lean
    assert lean.count("done before") == 1
    with ZipFile("store/mine.mar") as archive:
        assert json.loads(archive.read("card.json"))["variant"] == "lean"
    assert folders.variants_in(Path("store/mine")) == ["lean"]
    assert "ablation" not in report.read_card(Path("store/mine"))  # it was another model
    assert not Path("store/mine/report.html").exists()
    assert Path("store/mine/evaluations.jsonl").read_text() == "logged since\n"


@pytest.mark.parametrize(
    ("card", "held"),
    [
        ({"data": "mine.npz"}, None),
        ({"data": "a name", "commands": ["rampart train --data mine.npz"]}, None),
        ({"data": "mine.npz"}, "held.npz"),
    ],
)
def test_a_split_to_measure_on_has_no_image_of_training(
    lean_only: Path, card: dict[str, object], held: str | None
) -> None:
    every = {
        name: blobs(count, seed=seed) for name, count, seed in (("mine", 2200, 0), ("held", 400, 1))
    }
    for name, images in every.items():
        file = lean_only.with_name(name)
        np.savez(file, image=images.image.numpy(), label=images.label.numpy())
    report.write_card(lean_only, card)
    data = lean_only.with_name("mine.npz")
    beside = lean_only.with_name(held) if held else None
    seen, name = rampart.measured(lean_only, data, "", held=beside, part="validation", limit=None)
    trained = hold_out(every["mine"], every["held"] if held else None)[0]
    assert name == f"validation split of {held or 'mine.npz'}"
    assert len(seen) >= 50
    pixels = [{image.tobytes() for image in images.image.numpy()} for images in (seen, trained)]
    assert not pixels[0] & pixels[1]


def test_a_model_that_was_made_with_held_out_images_wants_them_again(lean_only: Path) -> None:
    data = lean_only.with_name("train.npz")
    images = blobs(2200)
    np.savez(data, image=images.image.numpy(), label=images.label.numpy())
    card = report.read_card(lean_only)
    made = {"commands": [f"rampart calibrate bare --data {data} --held held.npz"]}
    report.write_card(lean_only, card | made)
    wants = "was made with --held held.npz: pass it here as well"
    with pytest.raises(ValueError, match=wants):
        rampart.measured(lean_only, data, "", held=None, part="validation", limit=None)
    for command in ("ablate", "alarms", "quantize"):
        with pytest.raises(ValueError, match=wants):
            run(command, lean_only, "--data", data)


def test_a_failed_self_check_is_named_and_a_passed_one_is_not() -> None:
    check = {"name": "adaptive", "subject": "pipeline full", "seen": "", "passed": False}
    fine = check | {"name": "logits", "passed": True}
    with pytest.raises(rampart.ChecksFailed, match=r"failed: adaptive \(pipeline full\)\."):
        rampart.insist({"checks": [fine, check]})
    rampart.insist({"checks": [fine]})
    rampart.insist({})


def test_what_lies_outside_the_threat_model_goes_into_the_card(lean_only: Path) -> None:
    held = lean_only.with_name("held.npz")
    found = lean_only.with_name("found")
    output = run("outside", lean_only, "--data", held, "--limit", 4, "--cache", found)
    seen = report.read_card(lean_only)["outside"]
    assert {row["threat"] for row in seen["rows"]} > {"L2 0.5", "patch", "clean"}
    assert {row["n"] for row in seen["rows"]} == {4}
    assert "| JPEG, quality 25 | 4 |" in output
    assert "image scaling: " in output
    assert len((lean_only / "evaluations.jsonl").read_text().splitlines()) == 1


def test_what_cannot_be_shared_out_refuses_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="`rampart train` and `rampart purifier`, not the others"):
        run("harden", "--data", tmp_path, "--out", tmp_path / "mine.mar")


def test_a_folder_of_held_out_pictures_has_names_of_its_own(tmp_path: Path) -> None:
    for part, count in (("train", 60), ("held", 210)):
        for i, pixels in enumerate(blobs(count, seed=len(part)).image.numpy()):
            (tmp_path / part / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f"class{i % 2}" / f"{i:03}.png")
    images, held = rampart.read_data(tmp_path / "train", tmp_path / "held", 32)
    assert (len(images), len(held)) == (60, 210)
    with pytest.raises(ValueError, match="would be trained on"):
        rampart.read_data(tmp_path, tmp_path / "held", 32)


def test_a_second_head_is_the_same_whenever_the_command_runs(tmp_path: Path) -> None:
    images = blobs(2000, size=16)
    np.savez(tmp_path / "images", image=images.image.numpy(), label=images.label.numpy())
    data = ["--data", tmp_path / "images.npz", "--validate-on", 8, "--device", "cpu"]
    small = ["--arch", "resnet10", "--width", 0.125, "--image-size", 16, "--epochs", 1]
    run("train", *data, *small, "--out", tmp_path / "a")
    first = tmp_path / "a" / "classifier.safetensors"
    again = ["train", *data, "--epochs", 1, "--init", first, "--rectify", "--out", tmp_path / "b"]
    run(*again)
    assert "continuing" in run(*again)


def test_harden_without_weights_or_training_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass --weights, or --epochs"):
        run("harden", "--data", tmp_path, "--out", tmp_path / "mine.mar", "--epochs", 0)


def test_a_model_without_a_purifier_is_archived_as_lean(tmp_path: Path, tiny_folder: Path) -> None:
    model = tmp_path / "bare"
    shutil.copytree(tiny_folder, model, ignore=shutil.ignore_patterns("calibration-full.json"))
    run("archive", model)
    with ZipFile(tmp_path / "bare.mar") as archive:
        assert json.loads(archive.read("card.json"))["variant"] == "lean"


def test_training_goes_on_from_earlier_weights_and_remembers_both_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count, classes in (("train", 64, 10), ("held", 400, 10), ("two", 2000, 2)):
        images = blobs(count)
        label = images.label.numpy() % classes
        names = images.classes[:classes]
        np.savez(tmp_path / name, image=images.image.numpy(), label=label, classes=names)
    held = ["--held", tmp_path / "held.npz", "--validate-on", 16, "--device", "cpu"]
    quick = [*held, "--epochs", 1, "--batch-size", 32]
    data = ["--data", tmp_path / "train.npz"]
    first = tmp_path / "a" / "classifier.safetensors"
    run("train", *data, *quick, "--out", tmp_path / "a", "--arch", "resnet10", "--width", 0.125)
    second = tmp_path / "b" / "classifier.safetensors"
    monkeypatch.setattr("sys.argv", ["rampart", "train", "--init", str(first)])
    run("train", *data, *quick, "--out", tmp_path / "b", "--init", first, "--lr", 0)
    config, state = checkpoint.read(second)
    assert config["classifier"]["arch"] == "resnet10"
    assert config["training"].count("Recipe(") == 2
    assert config["commands"][1] == "rampart train --init classifier.safetensors"
    monkeypatch.setattr("sys.argv", ["rampart", "calibrate", "two words"])
    run("calibrate", tmp_path / "m", *data, "--held", tmp_path / "held.npz", "--classifier", second)
    made = [*config["commands"], "rampart calibrate 'two words'"]
    assert report.read_card(tmp_path / "m")["commands"] == made
    for name, tensor in checkpoint.read(first)[1].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(state[name], tensor, msg=name)
    with pytest.raises(ValueError, match=r"10 classes apart"):
        run("train", "--data", tmp_path / "two.npz", "--out", tmp_path / "c", "--init", first)


def test_adopted_weights_calibrate_as_trained_ones_do(tmp_path: Path) -> None:
    images = blobs(400, size=96)
    np.savez(tmp_path / "held", image=images.image.numpy(), label=images.label.numpy())
    net = get_model("squeezenet1_1", weights=None, num_classes=10)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    classifier = tmp_path / "classifier.safetensors"
    what = ["--arch", "squeezenet1_1", "--classes", 10, "--image-size", 96]
    assert "mean (0.485" in run("adopt", tmp_path / "w.pth", "--out", classifier, *what)
    data = ["--data", tmp_path / "held.npz", "--held", tmp_path / "held.npz"]
    run("calibrate", tmp_path / "mine", *data, "--classifier", classifier)
    assert report.read_card(tmp_path / "mine")["training"]["classifier"] == "adopted from w.pth"


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
    assert "metrics" not in card and "no file" in card["training"]["classifier"]


@pytest.fixture
def lean_only(tmp_path: Path, tiny_folder: Path) -> Path:
    """A model folder without the full variant, and beside it held.npz to measure it on."""
    model = tmp_path / "bare"
    shutil.copytree(tiny_folder, model, ignore=shutil.ignore_patterns("calibration-full.json"))
    card = {"model": "bare", "data": "blobs", "training": {}, "calibration_images": 100}
    net = {"arch": "resnet10", "classes": 10, "width": 0.125, "image_size": 32}
    report.write_card(model, card | {"classifier": net, "commands": []})
    images = blobs(600)
    np.savez(tmp_path / "held", image=images.image, label=images.label, classes=images.classes)
    return model


def test_false_alarms_go_into_the_card_with_their_remedies(lean_only: Path) -> None:
    held = lean_only.with_name("held.npz")
    output = run("alarms", lean_only, "--data", held, "--held", held, "--limit", 50)
    seen = report.read_card(lean_only)["false_alarms"]
    assert list(seen["coverage"]) == ["lean"]
    assert {row["variant"] for row in seen["rows"]} == {"lean"}
    assert len(seen["remedies"]) == sum(row["too_many"] for row in seen["rows"])
    assert "| JPEG, quality 75 | 50 |" in output
    assert "lean, promised 5%: " in output


def test_a_variant_alone_goes_with_an_attack_and_must_be_there(lean_only: Path) -> None:
    data = ["--data", lean_only.with_name("held.npz")]
    with pytest.raises(ValueError, match="--variant goes with --only"):
        run("evaluate", lean_only, *data, "--variant", "full")
    for command in (["evaluate", *data, "--only", "pgd20"], ["archive"], ["export", "--out", "x"]):
        with pytest.raises(ValueError, match="is not calibrated as full: leave out --variant"):
            run(command[0], lean_only, *command[1:], "--variant", "full")


def test_the_ablation_goes_into_the_card_and_chooses_the_default_variant(
    tmp_path: Path, lean_only: Path
) -> None:
    model, held = lean_only, lean_only.with_name("held.npz")
    data = ["--data", held, "--held", held]
    output = run("ablate", model, *data, "--limit", 4, "--steps", 1, "--cache", tmp_path / "found")
    assert "| + feature_distance |" in output
    seen = report.read_card(model)["ablation"]
    assert seen["n"] == 4
    assert seen["threat_model"] == "Linf 8/255"
    assert seen["rows"][0]["name"] == "classifier"
    assert seen["default"]["variant"] == folders.best_variant(model) == "lean"
    assert (model / "ablation.png").is_file()


def test_an_ablation_on_test_images_is_logged_and_chooses_nothing(
    tmp_path: Path, lean_only: Path
) -> None:
    model, held = lean_only, lean_only.with_name("held.npz")
    images = blobs(6, seed=77)
    parts = {"image": images.image, "label": images.label}
    np.savez(tmp_path / "test", **parts, classes=images.classes)
    np.savez(tmp_path / "other", **parts, classes=images.classes[::-1])
    data = ["--data", held, "--held", held, "--steps", 1, "--cache", tmp_path / "found"]
    with pytest.raises(ValueError, match="the images have the classes"):
        run("ablate", model, *data, "--test", tmp_path / "other.npz")
    output = run("ablate", model, *data, "--test", tmp_path / "test.npz")
    assert "| lean | 20.0% |" in output
    card = report.read_card(model)
    assert card["test_ablation"]["data"] == "6 test.npz"
    names = [row["name"] for row in card["test_ablation"]["rows"]]
    assert names == ["classifier", "+ confidence", "lean"]
    assert "ablation" not in card
    assert '"data": "6 test.npz"' in (model / "evaluations.jsonl").read_text().splitlines()[-1]


def test_an_ablation_of_one_row_is_printed_and_kept_nowhere(
    tmp_path: Path, lean_only: Path
) -> None:
    model, held = lean_only, lean_only.with_name("held.npz")
    before = report.read_card(model)
    data = ["--data", held, "--held", held, "--limit", 4, "--steps", 1]
    output = run("ablate", model, *data, "--only", "+ energy", "--cache", tmp_path / "found")
    assert "| + energy | 20.0% |" in output and "| + median |" not in output
    assert report.read_card(model) == before
    with pytest.raises(ValueError, match="--only goes without --test and --twin"):
        run("ablate", model, *data, "--test", held, "--only", "+ energy")


def test_int8_is_made_gated_and_taken_once_it_is_measured_to_be_as_robust(
    tmp_path: Path, lean_only: Path
) -> None:
    held = lean_only.with_name("held.npz")
    assert ": lean, fp32, " in run("archive", lean_only, "--out", tmp_path / "a.mar")
    output = run("quantize", lean_only, "--data", held, "--held", held, "--rate", 0.05)
    assert output.splitlines()[-1].startswith("lean: int8 beside fp32 on 174 images: ")
    options = ["--part", "validation", "--limit", 8, "--only", "pgd20", "--int8", "--rate", 0.05]
    run("evaluate", lean_only, "--data", held, *options, "--cache", tmp_path / "found")
    card = report.read_card(lean_only)
    # Worst cases take the whole ladder; what stands in for them here is of the same images.
    found = [row for row in card["metrics"] if row["name"] == "pgd20"]
    assert {"classifier", "pipeline", "graph:int8"} == {row["subject"] for row in found}
    table = run("evaluate", lean_only, "--data", held, *options, "--variant", "lean", "--eps", 4)
    assert "graph:int8  lean     pgd20" in table
    assert "classifier" not in table and "pipeline" not in table
    kept = [row | {"name": "robust", "attack": "all", "value": 0.5, "n": 100} for row in found]
    for row in kept:
        row.pop("rate", None)
    card["metrics"] += kept
    report.write_card(lean_only, card)
    assert ": lean, int8, " in run("archive", lean_only, "--out", tmp_path / "a.mar")
    next(row for row in kept if row["subject"] == "graph:int8")["value"] = 0.48
    report.write_card(lean_only, card)
    assert folders.best_precision(lean_only, "lean") == "fp32"
    # A new int8 graph has none of the old one's figures.
    run("quantize", lean_only, "--data", held, "--held", held, "--rate", 0.05, "--limit", 64)
    subjects = {row["subject"] for row in report.read_card(lean_only)["metrics"]}
    assert {"classifier", "pipeline"} == subjects


def test_an_archive_is_calibrated_anew_on_pictures_without_labels(
    tmp_path: Path, tiny_archive: Path
) -> None:
    (tmp_path / "traffic").mkdir()
    for number, image in enumerate(blobs(120, seed=3).image.numpy()):
        Image.fromarray(image).save(tmp_path / "traffic" / f"{number}.png")
    archive = shutil.copy(tiny_archive, tmp_path / "mine.mar")
    output = run("calibrate", "--model", archive, "--images", tmp_path / "traffic")
    assert re.search(
        r"flags \d+\.\d% of these 120 pictures where it promises 1\.0%; drift 0", output
    )
    assert (tmp_path / "mine-recalibrated.mar").is_file()


@pytest.mark.parametrize(
    "options", [[], ["--model", "a.mar"], ["store/a", "--data", "d"], ["--images", "i"]]
)
def test_calibrate_without_all_it_needs_names_both_ways(options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--classifier FILE .* or --model FILE\.mar --images"):
        run("calibrate", *options)


def test_an_archive_has_its_own_classifier_to_calibrate() -> None:
    with pytest.raises(ValueError, match="go alone"):
        run("calibrate", "store/a", "--model", "a.mar", "--images", "i")


def test_attack_writes_8_bit_pictures_within_eps_that_change_the_label(
    tmp_path: Path, tiny_folder: Path
) -> None:
    output = run("attack", "--model", tiny_folder, "--out", tmp_path, "--eps", 8)
    clean, attacked = (
        np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        for name in ("clean", "attacked")
    )
    assert clean.shape == attacked.shape == (32, 32, 3)
    assert 1 <= np.abs(clean - attacked).max() <= 8
    labels = re.findall(r"png: (\w+) \d+%", output)
    assert len(set(labels)) == 2
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.size[0] > 3 * 288


@pytest.mark.parametrize("verb", ["attack", "certify", "purify"])
def test_a_picture_that_cannot_be_read_is_named(
    tmp_path: Path, tiny_folder: Path, verb: str
) -> None:
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"note\.txt: .*PNG"):
        run(verb, tmp_path / "note.txt", "--model", tiny_folder)


def test_a_purified_picture_stands_beside_the_one_sent(tmp_path: Path, tiny_folder: Path) -> None:
    sheet, size = tmp_path / "purified.png", 32
    out = run("purify", "--model", tiny_folder, "--out", sheet)
    assert [line.split(":")[0] for line in out.splitlines()][:2] == ["as sent", "purified"]
    out = run("purify", "--model", tiny_folder, "--out", sheet, "--hide", 0, 0, 8, 8)
    assert "projected: " in out
    with Image.open(sheet) as panel:
        assert panel.size[0] > 3 * 288
    with pytest.raises(ValueError, match=rf"--hide .*{size}x{size} picture"):
        run("purify", "--model", tiny_folder, "--out", sheet, "--hide", size, 0, 8, 8)


def test_a_picture_is_certified_or_abstained_on(tiny_folder: Path) -> None:
    sure = run("certify", "--model", tiny_folder, "--samples", 300, "--sigma", 0.001)
    assert re.search(r"holds within an L2 radius of 0\.00\d .* 300 of 300 noisy", sure)
    lost = run("certify", "--model", tiny_folder, "--samples", 3, "--sigma", 0.001)
    assert lost.startswith("abstains: ")


def test_an_expected_failure_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rampart", "archive", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("rampart: no checkpoint at ")
    assert done.stderr.count("\n") == 1


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


def test_the_card_of_an_archive_is_printed_in_full(tiny_archive: Path) -> None:
    with ZipFile(tiny_archive) as packed:
        card = json.loads(packed.read("card.json"))
    assert json.loads(run("inspect", tiny_archive, "--card")) == card


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['skimage.data'] = None; import rampart; rampart.main()"
    command = [sys.executable, "-c", code, "serve"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "rampart: this needs skimage.data: `make .venv/dev` installs it\n"


def test_asking_for_cuda_where_there_is_none_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA: here it is usable")
    with pytest.raises(ValueError, match="--device cpu"):
        rampart.pick_device("cuda")
    assert rampart.pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train", "--data", "x", "--out", "y", "--batch-size", 0], "--batch-size"),
        (["train", "--data", "x", "--out", "y", "--epochs", 0], "--epochs"),
        (["train", "--data", "x", "--out", "y", "--eps", -8], "--eps"),
        (["attack", "--rate", 5], "--rate"),
        (["evaluate", "x", "--data", "y", "--rate", 1.5], "--rate"),
        (["evaluate", "x", "--data", "y", "--limit", 0], "--limit"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(command: list[object], option: str) -> None:
    done = CliRunner().invoke(rampart.app, [str(a) for a in command])
    assert done.exit_code == 2 and option in done.output and "or equal to" in done.output


def test_a_folder_that_is_no_model_has_no_row_in_a_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a calibrated model"):
        run("table", tmp_path, "--readme", tmp_path / "README.md")


def test_too_few_images_to_hold_out_are_refused_before_training(tmp_path: Path) -> None:
    images = blobs(300)
    np.savez(tmp_path / "few.npz", image=images.image.numpy(), label=images.label.numpy())
    with pytest.raises(ValueError, match="2,000 images"):
        run("train", "--data", tmp_path / "few.npz", "--out", tmp_path / "c")


def test_eps_has_a_default_in_the_unit_of_its_norm() -> None:
    assert str(rampart.threat_of("Linf", None)) == "Linf 8/255"
    assert str(rampart.threat_of("L2", None)) == "L2 0.5"
    assert str(rampart.threat_of("Linf", 4)) == "Linf 4/255"


def test_the_readme_is_finished_and_its_files_exist() -> None:
    text = README.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert (README.parent / target).is_file(), target


def test_the_tables_in_the_readme_are_those_of_the_cards() -> None:
    store = README.parent / "model_store"
    models = [store / "cifar10", *sorted(f for f in store.glob("cifar10-*") if f.is_dir())]
    for model in models:
        report.check_card(report.read_card(model))
    assert report.with_tables(README.read_text(), models) == README.read_text()


def documented() -> list[str]:
    text = README.read_text().replace("\\\n", " ")
    return re.findall(r"^\.venv/bin/rampart (.+)$", text, re.MULTILINE)


def test_the_readme_documents_the_way_from_training_to_serving() -> None:
    verbs = {line.split()[0] for line in documented()}
    assert {"train", "purifier", "calibrate", "evaluate", "archive", "serve", "attack"} <= verbs


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_line_parses(line: str) -> None:
    verb, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(rampart.app).commands[verb]
    command.make_context(verb, arguments)
