"""From a file of `rampart train` to an archive that finds objects, by the verbs."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command import run
from drawn import write_voc
from PIL import Image

from rampart.handlers.image import as_png
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming
from rampart.hardening.model import provenance
from rampart.hardening.objects import defended
from rampart.hardening.objects.detector import ObjectDetector, save
from rampart.models import load
from rampart.scenes import SceneModel

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, learned_objects: ObjectDetector) -> Path:
    """A data set with 60 validation pictures, trained weights, and what `calibrate` made."""
    folder = tmp_path_factory.mktemp("home")
    write_voc(folder / "voc", 70, parts={"train": range(10), "val": range(10, 70)})
    write_voc(folder / "few", 12, parts={"train": range(4), "val": range(4, 12)}, seed=1)
    save(folder / "detector.safetensors", learned_objects, {"commands": ["rampart train"]})
    provenance.write(folder, np.array([1, 2], np.uint64))
    weights = folder / "detector.safetensors"
    said = run("calibrate", folder / "cells", "--data", folder / "voc", "--classifier", weights)
    assert (
        "full promises" not in said and "lean promises at most 5.0% of clean images flagged" in said
    )
    return folder


def test_calibrate_makes_a_model_folder_of_an_object_detector(home: Path) -> None:
    card = json.loads((home / "cells" / "card.json").read_text())
    assert (card["task"], card["model"], card["min_confidence"]) == ("detect", "cells", 0.5)
    assert card["objects"]["classes"] == ["disc", "square"]
    assert card["commands"][0] == "rampart train" and len(card["commands"]) == 2
    assert set(card["promise"]) == {"lean, fp32"}
    assert isinstance(load(home / "cells"), SceneModel)
    assert provenance.read(home / "cells").tolist() == [1, 2]  # as beside the weights
    with Image.open(home / "cells" / "sample.png") as picture:
        assert picture.size == (96, 80)


def test_archive_packs_it_and_the_endpoint_shows_boxes_of_the_confidence_that_was_asked_for(
    home: Path,
) -> None:
    words = ("--variant", "lean", "--min-confidence", 0.2, "--images", home / "few")
    said = run("archive", home / "cells", *words)
    assert "boxes have an IoU of" in said and "0 boxes have no like" in said
    with zipfile.ZipFile(home / "cells.mar") as content:
        content.extractall(home / "unpacked")
        picture = content.read("sample.png")
    settings = {"false_alarm_rate": 0.05, "min_confidence": 0.2}
    service = Service.open(home / "unpacked", settings)
    answer = json.loads(service.answer([Incoming({}, [picture])])[0].body)
    assert service.summary["min_confidence"] == 0.2 and answer["model"]["name"] == "cells"
    assert all(box["confidence"] > 0.2 for box in answer["boxes"])
    told = run("inspect", home / "cells.mar")
    assert "model: cells, lean, fp32" in told and "it runs here, on the CPU" in told
    assert "output boxes: float" in told and "min_confidence 0.2" in told


def test_a_finished_archive_is_calibrated_anew_on_pictures_of_any_size(
    home: Path, tmp_path: Path
) -> None:
    draws = np.random.default_rng(0)
    (tmp_path / "traffic").mkdir()
    for number in range(30):
        shape = (*draws.integers(60, 200, 2), 3)
        noise = draws.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "traffic" / f"{number}.png")
    archive, out = home / "cells.mar", tmp_path / "new.mar"
    run("calibrate", "--archive", archive, "--images", tmp_path / "traffic", "--out", out)
    with zipfile.ZipFile(out) as content, zipfile.ZipFile(archive) as old:
        assert json.loads(content.read("calibration.json"))["images"] == 30
        assert content.read("graph.onnx") == old.read("graph.onnx")


@pytest.mark.parametrize(
    ("verb", "options", "told"),
    [
        ("export", ["--triton", "models"], "use --backend python"),
        ("export", ["--tensorrt", "a.plan"], "only classifiers have a TensorRT plan"),
        ("archive", ["--min-confidence", "1"], "above 0 and below 1"),
        ("evaluate", ["--images", "voc"], "finds objects.*`rampart objects`"),
        ("quantize", ["--data", "voc", "--precision", "fp16"], "there is only int8"),
    ],
)
def test_what_an_object_detector_does_not_do_is_said_in_one_sentence(
    verb: str, options: list[str], told: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=told) as error:
        run(verb, "cells", *options)
    assert "\n" not in str(error.value)
    assert not (home / "models").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "x", "--classifier", "detector.safetensors"),
        ("calibrate", "cells", "--guarded"),
        ("quantize", "cells"),
    ],
)
def test_pictures_with_boxes_are_held_out_by_their_own_parts_alone(
    words: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match="--held few: leave it out"):
        run(*words, "--data", "voc", "--held", "few")


def test_the_variant_guarded_is_of_classifiers(home: Path, tmp_path: Path) -> None:
    weights = home / "detector.safetensors"
    words = ("--data", home / "voc", "--classifier", weights, "--purifier", weights)
    with pytest.raises(ValueError, match="holds no purifier"):
        run("calibrate", tmp_path / "x", *words)


def test_a_finished_detector_gets_the_variant_guarded_and_serves_it(
    home: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(home / "cells", tmp_path / "cells"))
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    said = run("calibrate", model, "--data", home / "voc", "--guarded")
    after = {file.name: file.read_bytes() for file in model.iterdir()}
    assert set(after) - set(before) == {"calibration-guarded.json"}
    assert {name for name in before if after[name] != before[name]} == {"card.json"}
    assert "guarded promises" in said and str(model / "calibration-guarded.json") in said
    loaded = SceneModel.load(model)
    assert loaded.variants == ["lean", "guarded"] and loaded.best_variant == "lean"
    assert loaded.radius == 4 / 255  # no training is on record: half of the usual 8/255
    with pytest.raises(ValueError, match="has the variant guarded already"):
        run("calibrate", model, "--data", home / "voc", "--guarded")
    run("archive", model, "--variant", "guarded", "--images", home / "few")
    with zipfile.ZipFile(tmp_path / "cells.mar") as content:
        content.extractall(tmp_path / "unpacked")
        picture = content.read("sample.png")
    service = Service.open(tmp_path / "unpacked", {"false_alarm_rate": 0.05})
    answer = json.loads(service.answer([Incoming({}, [picture])])[0].body)
    assert list(answer["detail"]["scores"]) == ["emptiness", "crowd", "doubt", "consistency"]


def test_the_step_goes_half_as_far_as_the_attacks_of_training(
    learned_objects: ObjectDetector, tmp_path: Path
) -> None:
    trained = {"training": {"detector": "method='nfgsm', threat=Threat(norm='Linf', eps=0.04)"}}
    model = SceneModel(learned_objects, {}, card=trained)
    assert model.radius == 0.02
    model.write_weights(tmp_path / "weights.safetensors")
    assert defended.load(tmp_path / "weights.safetensors", "guarded")[0].radius == 0.02
    save(tmp_path / "older.safetensors", learned_objects)
    assert defended.load(tmp_path / "older.safetensors", "guarded")[0].radius == defended.RADIUS


@pytest.mark.slow
def test_attack_draws_what_each_aim_makes_of_the_boxes(home: Path, tmp_path: Path) -> None:
    said = run("attack", "--model", home / "cells", "--eps", 8, "--out", tmp_path / "out")
    names = ("clean", "vanish", "fabricate", "mislabel", "vanish-unflagged")
    views = {}
    for name in (*names, "panel"):
        with Image.open(tmp_path / "out" / f"{name}.png") as file:
            views[name] = np.asarray(file)
    assert views.pop("panel").shape[1] > 5 * 288
    assert all(view.shape == (128, 128, 3) for view in views.values())
    for name in names[1:]:
        change = np.abs(views[name].astype(int) - views["clean"])
        assert 4 <= change.max() <= 8 and f"{name}.png: " in said
    with pytest.raises(ValueError, match="--twin and --as-samples are for classifiers"):
        run("attack", "--model", home / "cells", "--twin", home / "cells", "--out", tmp_path)


@pytest.mark.slow
def test_a_purifier_goes_from_its_training_into_the_endpoint(home: Path, tmp_path: Path) -> None:
    data = ("--data", home / "voc", "--classifier", home / "detector.safetensors")
    small = ("--eps", 4, "--epochs", 2, "--batch-size", 5, "--lr", 0.003, "--validate-on", 2)
    said = run("purifier", *data, *small, "--device", "cpu", "--out", tmp_path / "p")
    assert "augmentation: flip, crop, shrink, light" in said  # the file does not tell
    assert "purifier: about" in said and "without the purifier: clean" in said
    file, cells = tmp_path / "p" / "purifier.safetensors", tmp_path / "cells"
    said = run("calibrate", cells, *data, "--purifier", file)
    assert "full promises at most 5.0% of clean images flagged" in said
    card = json.loads((cells / "card.json").read_text())
    assert set(card["training"]) == {"detector", "purifier"} and len(card["commands"]) == 2
    said = run("archive", cells, "--variant", "full", "--images", home / "few")
    assert "0 boxes have no like" in said
    with zipfile.ZipFile(tmp_path / "cells.mar") as content:
        content.extractall(tmp_path / "unpacked")
        picture = content.read("sample.png")
    service = Service.open(tmp_path / "unpacked", {"false_alarm_rate": 0.05})
    answer = json.loads(service.answer([Incoming({}, [picture])])[0].body)
    model = SceneModel.load(cells)
    (own,) = model.predict([picture], variant="full")
    assert model.detector.purifier is not None
    assert [box["index"] for box in answer["boxes"]] == [box["index"] for box in own.boxes]
    scores = answer["detail"]["scores"]
    assert list(scores)[-2:] == ["purification", "purified"] and scores["purification"] > 1e-4

    common = (home / "voc", "--part", "validation", "--steps", 1, "--limit", 2)
    said = run("objects", cells / "weights.safetensors", *common, "--cache", tmp_path / "found")
    assert "weights.safetensors, behind its purifier, on 2 pictures" in said
    run("attack", "--model", cells, "--eps", 8, "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "panel.png") as panel:
        assert panel.width > 6 * 288
    said = run("quantize", cells, "--data", home / "voc")
    assert "full: int8 against fp32 on 60 pictures: mAP50" in said


@pytest.mark.slow
def test_quantize_makes_an_int8_form_that_finds_as_much_and_archive_takes_it(
    home: Path, tmp_path: Path
) -> None:
    cells = Path(shutil.copytree(home / "cells", tmp_path / "cells"))
    said = run("quantize", cells, "--data", home / "voc")
    assert "lean: int8 against fp32 on 60 pictures: mAP50" in said
    card = json.loads((cells / "card.json").read_text())
    made = card["int8"]["lean"]
    assert made["map50"][0] > 0.5 and made["map50"][0] - made["map50"][1] <= 0.01
    assert made["attacked"][0] < made["map50"][0]
    assert set(card["promise"]) == {"lean, fp32", "lean, int8"}
    run("archive", cells, "--variant", "lean", "--images", home / "few")
    assert "model: cells, lean, int8" in run("inspect", tmp_path / "cells.mar")
    with zipfile.ZipFile(tmp_path / "cells.mar") as content:
        content.extractall(tmp_path / "unpacked")
    service = Service.open(tmp_path / "unpacked", {"false_alarm_rate": 0.05})
    with Image.open(sorted((home / "voc" / "JPEGImages").iterdir())[12]) as picture:
        sent = as_png(np.array(picture))
    answer = json.loads(service.answer([Incoming({}, [sent])])[0].body)
    assert answer["boxes"] and answer["decision"] == "accept"
