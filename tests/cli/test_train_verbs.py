import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from blobs import blobs
from command import run
from PIL import Image
from torchvision.models import get_model

from rampart.assembly import deliver
from rampart.cli.options import Threat
from rampart.hardening.model import checkpoint
from rampart.hardening.model import folder as folders
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.purifier import Purifier, PurifierConfig, described
from rampart.hardening.report import card as report
from rampart.hardening.train.loop import Recipe
from rampart.studies import ChecksFailed
from rampart.training import pick_device

SMALL = ("--arch", "resnet10", "--width", 0.125, "--image-size", 16)  # tried in a second


@pytest.mark.slow
@pytest.mark.training
def test_harden_goes_all_the_way_and_repeats_only_what_other_inputs_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 64, 0), ("held", 400, 1)):
        images = blobs(count, size=16, seed=seed)
        np.savez(name, image=images.image.numpy(), label=images.label.numpy())
    data = ["--data", "train.npz", "--held", "held.npz", "--device", "cpu", "--evaluate-on", 0]
    net = ["--arch", "resnet10", "--width", 0.125, "--image-size", 16, "--epochs", 1]
    command = ["harden", *data, *net, "--out", "store/mine.mar", "--anyway", "--purifier-epochs"]
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
        assert archive.read("built") == b"since" and "sample.png" in archive.namelist()
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


@pytest.mark.training
def test_harden_proposes_what_nobody_said_and_packs_no_model_at_chance_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 held-out images 59 are of class 0, which one epoch does not beat."""
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 64, 0), ("held", 60, 1)):
        images = blobs(count, size=16, seed=seed)
        label = np.arange(count) % (2 if name == "train" else 60) == 1
        np.savez(name, image=images.image.numpy(), label=label.astype(int), classes=["cat", "dog"])
    data = ["--data", "train.npz", "--held", "held.npz", "--device", "cpu", "--evaluate-on", 0]
    command = ["harden", *data, "--epochs", 1, "--width", 0.125, "--out", "store/mine.mar"]
    with pytest.raises(
        ChecksFailed, match=r"held-out images, and guessing .* 98\.3%.*--anyway packs it"
    ):
        run(*command)
    assert not Path("store").exists()
    told = run(*command, "--anyway")
    assert Path("store/mine.mar").is_file() and "train: done before" in told
    table = told[
        told.index("proposed for the options that you did not set:") : told.index("[1/3] train")
    ]
    for option, value in (
        ("--image-size", "16"),
        ("--arch", "resnet10"),
        ("--batch-size", "8"),
        ("--purifier-epochs", "0"),
        ("--augment", "flip, crop"),
    ):
        assert f"\n  {option}".ljust(22) + f"{value} " in table
    assert "--epochs" not in table.replace("--purifier-epochs", "") and "--width" not in table
    card = report.read_card(Path("store/mine"))
    assert card["promise"]["lean, fp32"]["rate"] == 0.05
    report.check_card(card)
    with ZipFile("store/mine.mar") as archive:
        assert "false_alarm_rate: 0.05" in archive.read("model-config.yaml").decode()
    with pytest.raises(ValueError, match=r"store/mine is not packed: it is right on .* --anyway"):
        run("archive", "store/mine", "--out", "again.mar")
    assert "again.mar: lean, fp32" in run("archive", "store/mine", "--out", "again.mar", "--anyway")


@pytest.mark.training
@pytest.mark.slow
def test_harden_replaces_an_archive_that_it_packed_and_keeps_one_that_was_rebuilt_since(
    tmp_path: Path, tiny_folder: Path, tiny_archive: Path
) -> None:
    out, runs = tmp_path / "store" / "mine.mar", tmp_path / "runs" / "mine"
    packed = [runs / f"archive-{one}" / "mine.mar" for one in "ab"]
    for number, file in enumerate(packed):
        file.parent.mkdir(parents=True)
        shutil.copy(tiny_archive, file)
        with ZipFile(file, "a") as archive:
            archive.writestr("sample.png", str(number))
    for file in (*packed, packed[0]):
        assert deliver(tiny_folder, file, out) == []
        assert out.read_bytes() == file.read_bytes()
    shutil.copy(tiny_archive, out)
    (said,) = deliver(tiny_folder, packed[1], out)
    assert "stays as it is: `rampart archive` rebuilds it" in said
    assert out.read_bytes() == tiny_archive.read_bytes()


def test_on_a_terminal_harden_asks_before_it_trains_unless_yes_is_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = blobs(90, size=16)
    np.savez("data", image=images.image.numpy(), label=images.label.numpy() % 2)
    command = ["-m", "rampart", "harden", "--data", "data.npz", "--out", "mine.mar"]
    command += ["--device", "cpu", "--evaluate-on", "0"]
    leader, follower = pty.openpty()
    with os.fdopen(leader, "wb") as keys:
        keys.write(b"n\n")
        keys.flush()
        asked = subprocess.run([sys.executable, *command], stdin=follower, capture_output=True)
    os.close(follower)
    assert b"Continue with these settings?" in asked.stdout and asked.returncode == 1
    assert b"classifier: about " in asked.stdout
    assert not list(Path("runs").glob("*/train-*"))
    small = ["--yes", "--epochs", "1", "--arch", "resnet10", "--width", "0.125", "--anyway"]
    leader, follower = pty.openpty()
    taken = subprocess.run(
        [sys.executable, *command, *small], stdin=follower, capture_output=True, timeout=300
    )
    os.close(leader)
    os.close(follower)
    assert b"Continue" not in taken.stdout and taken.returncode == 0, taken.stderr
    assert Path("mine.mar").is_file()


def test_what_cannot_be_shared_out_refuses_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="`rampart train` and `rampart purifier`, not the others"):
        run("harden", "--data", tmp_path, "--out", tmp_path / "mine.mar")


def test_harden_without_weights_or_training_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass --weights, or --epochs"):
        run("harden", "--data", tmp_path, "--out", tmp_path / "mine.mar", "--epochs", 0)


@pytest.mark.slow
@pytest.mark.training
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


@pytest.mark.training
@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"has 10 classes, but"):
        run("train", "--data", tmp_path / "two.npz", "--out", tmp_path / "c", "--init", first)


@pytest.mark.training
def test_too_few_images_to_hold_out_are_refused_before_training(tmp_path: Path) -> None:
    images = blobs(60, size=16)
    np.savez(tmp_path / "few.npz", image=images.image.numpy(), label=images.label.numpy())
    with pytest.raises(ValueError, match=r"leaves 30 held-out images.* at least 80 .*2,000 images"):
        run("train", "--data", tmp_path / "few.npz", "--out", tmp_path / "c", *SMALL)


@pytest.mark.training
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


def test_asking_for_cuda_where_there_is_none_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA: here it is usable")
    with pytest.raises(ValueError, match="--device cpu"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")


def test_eps_has_a_default_in_the_unit_of_its_norm() -> None:
    assert str(Threat("Linf").ball()) == "Linf 8/255"
    assert str(Threat("L2").ball()) == "L2 0.5"
    assert str(Threat("Linf", 4).ball()) == "Linf 4/255"


@pytest.mark.training
def test_adopt_takes_timms_own_normalization_and_says_what_it_took(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save({"model": net.state_dict(), "epoch": 1}, tmp_path / "w.pth")
    options = ["--arch", "timm:vit_tiny_patch16_224", "--classes", 3, "--image-size", 32]
    told = run("adopt", tmp_path / "w.pth", *options, "--out", tmp_path / "c.safetensors")
    half = (0.5, 0.5, 0.5)
    assert "weights: entry model\n" in told
    assert f"normalization: mean {half}, std {half}\n" in told
    config = checkpoint.read(tmp_path / "c.safetensors")[0]["classifier"]
    assert (config["mean"], config["std"]) == ([*half], [*half])


def test_adopt_refuses_what_no_other_command_could_use(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name, img_size=32).state_dict(), tmp_path / "two.pt")
    words = ["--arch", f"timm:{name}", "--image-size", 32, "--classes", 1000]
    with pytest.raises(ValueError, match=r"deit_tiny_distilled.* more than one head"):
        run("adopt", tmp_path / "two.pt", "--out", tmp_path / "a.safetensors", *words)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.training
@pytest.mark.parametrize("verb", ["train", "harden", "purifier", "calibrate"])
def test_bad_pictures_stop_every_verb_that_makes_a_model_unless_they_are_left_out(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That there are too few images comes after they are read."""
    monkeypatch.chdir(tmp_path)
    for index, image in enumerate(blobs(20).image.numpy()):
        file = Path("data", f"{index % 2}", f"{index}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    Path("data/0/empty.png").touch()
    Path("data/1/cut.png").write_bytes(file.read_bytes()[:100])
    net = Classifier(ClassifierConfig("resnet10", 2, width=0.125, image_size=16))
    checkpoint.save(Path("c.safetensors"), net, {"classifier": net.config._asdict()})
    options = {
        "train": ["--out", "run", *SMALL],
        "harden": ["--out", "mine.mar", *SMALL],
        "purifier": ["--out", "run", "--classifier", "c.safetensors"],
        "calibrate": ["mine", "--classifier", "c.safetensors"],
    }
    command = [verb, *options[verb], "--data", "data"]
    with pytest.raises(ValueError, match=r"2 of 22 pictures .*\n.*empty\.png.*\n.*cut\.png"):
        run(*command)
    with pytest.raises(ValueError, match="leaves 10 held-out images, 6 of them to calibrate on"):
        run(*command, "--skip-bad")


@pytest.mark.training
@pytest.mark.parametrize(
    ("training", "options", "told"),
    [
        (repr(Recipe(augment=("crop",))), (), "crop"),
        (repr(Recipe()), ("--augment", "crop", "--augment", "warp"), "crop, warp"),
        ("adopted from signs.pth", (), "crop"),
    ],
)
def test_a_purifier_is_trained_on_images_as_its_classifier_was(
    training: str, options: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    data, out = tmp_path / "signs.npz", tmp_path / "run"
    images = blobs(200, size=16)
    np.savez(data, image=images.image.numpy(), label=images.label.numpy())  # classes 0 to 9
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    content = {"classifier": net.config._asdict(), "training": training}
    checkpoint.save(tmp_path / "c.safetensors", net, content)
    command = ["purifier", "--data", data, "--classifier", tmp_path / "c.safetensors", *options]
    said = run(*command, "--out", out, "--epochs", 1, "--batch-size", 64, "--validate-on", 8)
    assert f"augmentation: {told}\n" in said
    recipe = checkpoint.read(out / "purifier.safetensors")[0]["training"]
    assert f"augment={tuple(told.split(', '))!r}" in recipe


@pytest.mark.training
def test_calibrate_and_purifier_list_all_that_is_wrong_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = blobs(200, size=16)
    np.savez("data.npz", image=images.image.numpy(), label=images.label.numpy() % 3)
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    checkpoint.save(Path("c.safetensors"), net, {"classifier": net.config._asdict()})
    data = ["--data", "data.npz", "--classifier", "c.safetensors"]
    faults = ["images have 3 classes, but the network has 10", "logits that are not finite"]
    for command in (["calibrate", "my model"], ["purifier", "--out", "/proc/run"]):
        with pytest.raises(ValueError, match="3 things to put right") as told:
            run(*command, *data)
        place = "name is part of the model's address" if "my model" in command else "/proc"
        assert all(fault in str(told.value) for fault in (*faults, place))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "data.npz"]


@pytest.mark.training
def test_a_purifier_that_makes_no_numbers_is_refused_before_calibration(tmp_path: Path) -> None:
    images = blobs(200, size=16)
    np.savez(tmp_path / "data.npz", image=images.image.numpy(), label=images.label.numpy())
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    checkpoint.save(tmp_path / "c.safetensors", net, {"classifier": net.config._asdict()})
    purifier = Purifier(PurifierConfig(width=8, depth=1))
    with torch.no_grad():
        purifier.residual[-2].weight.fill_(float("nan"))
    checkpoint.save(tmp_path / "p.safetensors", purifier, {"purifier": described(purifier)})
    data = ["--data", tmp_path / "data.npz", "--classifier", tmp_path / "c.safetensors"]
    with pytest.raises(
        ValueError, match=r"the purifier makes images .* not finite: train it again"
    ):
        run("calibrate", tmp_path / "m", *data, "--purifier", tmp_path / "p.safetensors")


@pytest.mark.training
def test_harden_lists_the_faults_of_weights_beside_those_of_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = blobs(200, size=96)
    np.savez("data.npz", image=images.image.numpy(), label=images.label.numpy())
    state = get_model("squeezenet1_1", weights=None, num_classes=10).state_dict()
    state["classifier.1.bias"][0] = float("nan")
    state["features.0.weight"].zero_()
    torch.save(state, "w.pth")
    options = ["--weights", "w.pth", "--arch", "squeezenet1_1", "--image-size", 96, "--epochs", 0]
    with pytest.raises(ValueError, match="things to put right") as told:
        run("harden", "--data", "data.npz", "--out", "/proc/mine.mar", *options)
    for fault in ("NaN or infinity in classifier.1.bias", "nothing but 0 in features.0", "/proc"):
        assert fault in str(told.value)
