"""Object detectors on the command line: trained where the data have boxes, and attacked."""

import hashlib
import json
import shutil
import zipfile
from inspect import signature
from pathlib import Path

import pytest
import torch
from command import run
from drawn import boxed, write_voc

from rampart import inputs
from rampart.cli.train import train
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.objects.attack import Budget
from rampart.hardening.objects.boxes import Found
from rampart.hardening.objects.jitter import JITTERS
from rampart.hardening.objects.training import AIMS, METHODS, ObjectRecipe
from rampart.hardening.report.card import markdown

NONE = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
TINY = ("--image-size", 128, "--width", 0.125, "--arch", "ssd-resnet10", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.training
def test_pictures_with_boxes_make_an_object_detector_that_is_then_attacked(tmp_path: Path) -> None:
    data = write_voc(tmp_path / "voc", 12, parts={"train": range(8), "val": range(8, 12)})
    small = ("--data", data, *TINY, "--epochs", 1, "--batch-size", 4, "--validate-on", 2)
    said = run("train", *small, "--eps", 4, "--augment", "flip", "--out", tmp_path / "run")
    file = tmp_path / "run" / "objects.safetensors"
    assert f"best object detector: {file}" in said
    assert "voc, train: 8 pictures, 1 of them empty; objects: disc" in said
    assert "object detector: about" in said and "(1 epochs of 2 steps," in said
    config = checkpoint.read(file)[0]
    assert config["task"] == "detect" and config["object_detector"]["size"] == 128
    assert "eps=0.0156" in config["training"] and "augment=('flip',)" in config["training"]
    assert len(config["commands"]) == 1

    # It goes on from its own weights, and refuses those that know other classes.
    again = run("train", *small, "--init", file, "--out", tmp_path / "more")
    assert "best object detector" in again
    assert len(checkpoint.read(tmp_path / "more" / "objects.safetensors")[0]["commands"]) == 2

    out = tmp_path / "figures.json"
    common = (data, "--part", "validation", "--steps", 1, "--limit", 2)
    said = run("objects", file, *common, "--out", out, "--cache", tmp_path / "found")
    assert "worst case" in said and "apgd vanish" in said
    figures = json.loads(out.read_text())
    assert figures["task"] == "detect" and figures["rows"]["clean"]["n"] == 2
    with pytest.raises(ValueError, match="has no part test"):
        run("objects", file, data)


@pytest.mark.slow
@pytest.mark.training
def test_your_own_object_detector_is_trained_attacked_and_calibrated(tmp_path: Path) -> None:
    data = write_voc(tmp_path / "voc", 48, parts={"train": range(4), "val": range(4, 48)})
    own = ("--arch", "owned:ssd")
    small = ("--data", data, "--image-size", 128, "--device", "cpu", "--validate-on", 2)
    with pytest.raises(ValueError, match="makes a Linear"):
        run("train", *small, "--arch", "owned:classifier", "--out", tmp_path / "run")
    run("train", *small, *own, "--epochs", 1, "--batch-size", 4, "--out", tmp_path / "run")
    file = tmp_path / "run" / "objects.safetensors"
    with pytest.raises(ValueError, match="has its own backbone"):
        run("train", *small, *own, "--init", scene_classifier(tmp_path), "--out", tmp_path / "b")
    said = run("objects", file, data, *own, "--part", "validation", "--steps", 1, "--limit", 2)
    assert "worst case" in said and "apgd localization" in said


def scene_classifier(folder: Path) -> Path:
    """A file of a classifier's weights."""
    net = Classifier(ClassifierConfig("resnet10", 10, 0.125))
    checkpoint.save(folder / "c.safetensors", net, {"classifier": net.config._asdict()})
    return folder / "c.safetensors"


@pytest.mark.slow
@pytest.mark.training
def test_harden_goes_from_pictures_with_boxes_to_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rampart.studies import ChecksFailed

    monkeypatch.chdir(tmp_path)
    data = write_voc(tmp_path / "voc", 48, parts={"train": range(8), "val": range(8, 48)})
    asked = ("harden", "--data", data, *TINY, "--epochs", 1, "--batch-size", 8)
    asked = (*asked, "--method", "standard", "--out", tmp_path / "cells.mar", "--evaluate-on", 2)
    with pytest.raises(ChecksFailed, match="finds next to nothing"):
        run(*asked)
    said = run(*asked, "--anyway")
    assert "[1/4] train: done before" in said and "warning: the detector finds next to" in said
    assert (tmp_path / "cells.mar").stat().st_size > 100_000
    card = json.loads((tmp_path / "cells" / "card.json").read_text())
    assert card["task"] == "detect" and len(card["commands"]) == 1
    attacks = card["attacks"]
    assert (attacks["n"], attacks["data"]) == (2, "voc, validation")
    assert attacks["budget"] == "10 steps, 0 queries"
    (line,) = map(json.loads, (tmp_path / "cells" / "evaluations.jsonl").read_text().splitlines())
    assert line["command"] == attacks["command"] == card["commands"][0] and line["n"] == 2
    again = run(*asked, "--anyway")
    assert "[3/4] evaluate: done before" in again and "[4/4] archive: done before" in again
    assert len((tmp_path / "cells" / "evaluations.jsonl").read_text().splitlines()) == 1
    assert any((tmp_path / "runs" / "found").iterdir())  # an attack that was cut goes on
    assert "sample.png" in zipfile.ZipFile(tmp_path / "cells.mar").namelist()
    run(*asked, "--anyway", "--no-sample")
    assert "sample.png" not in zipfile.ZipFile(tmp_path / "cells.mar").namelist()
    run(*asked[:-1], 0, "--anyway", "--guarded")
    promise = json.loads((tmp_path / "cells" / "card.json").read_text())["promise"]
    assert set(promise) == {"lean, fp32", "guarded, fp32"}
    with pytest.raises(ValueError, match="fasterrcnn cannot have the variant guarded"):
        run(*asked, "--guarded", "--arch", "fasterrcnn")


def test_an_evaluation_is_logged_beside_the_model_and_fewer_pictures_replace_no_figures(
    tmp_path: Path, scene_folder: Path
) -> None:
    data = write_voc(tmp_path / "voc", 8, parts={"train": range(4), "val": range(4, 8)})
    home = Path(shutil.copytree(scene_folder, tmp_path / "cells"))
    weights = home / "weights.safetensors"
    common = (weights, data, "--part", "validation", "--steps", 1, "--cache", tmp_path / "found")

    def log() -> list[dict[str, object]]:
        return list(map(json.loads, (home / "evaluations.jsonl").read_text().splitlines()))

    run("objects", *common, "--limit", 2)
    assert "attacks" not in json.loads((home / "card.json").read_text())
    run("objects", *common, "--limit", 3, "--into-card")
    card = (home / "card.json").read_text()
    attacks = json.loads(card)["attacks"]
    assert attacks["n"] == 3
    said = run("objects", *common, "--limit", 2, "--into-card")
    assert "the card keeps its figures on 3 pictures: these are on only 2" in said
    assert (home / "card.json").read_text() == card
    assert [line["n"] for line in log()] == [2, 3, 2]
    assert {line["data"] for line in log()} == {"voc, validation"}
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {line["weights"] for line in log()} == {digest}
    assert log()[1]["command"] == attacks["command"]
    run("objects", *common, "--limit", 1, "--into-card", "--variant", "lean")
    both = json.loads((home / "card.json").read_text())
    assert both["attacks"] == attacks and both["attacks, lean"]["n"] == 1
    assert markdown(both).count("(n = ") == 2 and ", flagged as lean:" in markdown(both)
    with pytest.raises(ValueError, match="not calibrated as guarded: leave out --variant"):
        run("objects", *common, "--variant", "guarded")


@pytest.mark.parametrize("budget", [Budget(1, 5, True), Budget(2, 0, True), Budget(2, 5)])
def test_a_weaker_attack_replaces_no_figures_of_a_stronger_one(
    tmp_path: Path, scene_folder: Path, budget: Budget, capsys: pytest.CaptureFixture[str]
) -> None:
    from rampart.hardening.objects.judge import Judgement, figures
    from rampart.objects import keep

    home = Path(shutil.copytree(scene_folder, tmp_path / "cells"))
    row = figures(boxed(2).truth, [NONE] * 2, 2)

    def budget_kept(budget: Budget) -> str:
        names = ["clean", "worst case", *(["patch sum"] if budget.patches else [])]
        judgement = Judgement(dict.fromkeys(names, row), {}, 0)
        setting = {"data": "voc, test", "threat_model": "Linf 4/255", "command": "rampart objects"}
        keep(home, judgement, setting | {"budget": str(budget)}, into_card=True)
        kept: str = json.loads((home / "card.json").read_text())["attacks"]["budget"]
        return kept

    strong = "2 steps, 5 queries, patches"
    assert budget_kept(Budget(2, 5, patches=True)) == strong
    assert budget_kept(budget) == strong
    said = f"the card keeps its figures of {strong}: these are of only {budget}"
    assert said in capsys.readouterr().out
    assert budget_kept(Budget(3, 5, patches=True)) == "3 steps, 5 queries, patches"


def test_pictures_of_training_are_left_out_of_what_passes_as_held_out(
    tmp_path: Path, scene_folder: Path
) -> None:
    from rampart.hardening.model import provenance
    from rampart.hardening.objects.scenes import divided

    data = write_voc(tmp_path / "voc", 4, parts={"train": range(2), "val": range(2, 4)})
    home = Path(shutil.copytree(scene_folder, tmp_path / "cells"))
    prints = provenance.fingerprints(divided(data).validation.boxed(128).image)
    common = ("objects", home / "weights.safetensors", data, "--part", "validation", "--steps", 1)
    common = (*common, "--cache", tmp_path / "found")
    provenance.write(home, prints[:1])
    said = run(*common)
    assert "was trained on them, by their pixels: 1 pictures" in said and "on 1 pictures" in said
    provenance.write(home, prints)
    with pytest.raises(ValueError, match="was trained on all of these 2 pictures"):
        run(*common)


def test_the_ball_is_that_of_the_model_where_no_eps_is_given(
    tmp_path: Path, scene_folder: Path
) -> None:
    data = write_voc(tmp_path / "voc", 4, parts={"train": range(2), "val": range(2, 4)})
    home = Path(shutil.copytree(scene_folder, tmp_path / "cells"))
    card = json.loads((home / "card.json").read_text())
    (home / "card.json").write_text(json.dumps(card | {"threat_model": "Linf 2/255"}))
    common = (data, "--part", "validation", "--steps", 1, "--limit", 1)
    common = (*common, "--cache", tmp_path / "found")
    said = run("objects", home / "weights.safetensors", *common, "--into-card")
    assert "on 1 pictures (validation), Linf 2/255, 1 steps" in said
    attacks = json.loads((home / "card.json").read_text())["attacks"]
    assert attacks["threat_model"] == "Linf 2/255"


def test_what_attacks_an_object_detector_goes_together(tmp_path: Path, scene_folder: Path) -> None:
    from found import untrained

    from rampart.hardening.objects.detector import ObjectConfig, ObjectDetector, save

    data = write_voc(tmp_path / "voc", 4, parts={"train": range(2), "val": range(2, 4)})
    weights, other = scene_folder / "weights.safetensors", tmp_path / "o.safetensors"
    save(other, untrained())
    asked = ("objects", weights, data, "--part", "validation")
    with pytest.raises(ValueError, match="--into-card does not go with --crafted-on"):
        run(*asked, "--crafted-on", other, "--into-card")
    with pytest.raises(ValueError, match=r"--queries 5: the random search is of Linf alone"):
        run(*asked, "--norm", "L2", "--queries", 5)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no usable CUDA device"):
            run(*asked, "--device", "cuda")
    save(other, ObjectDetector(ObjectConfig("ssdlite", ("cell",), 192)))
    with pytest.raises(ValueError, match=r"is not a twin of .*it finds cell at 192 pixels"):
        run(*asked, "--crafted-on", other)


def test_figures_for_a_card_that_is_not_there_are_refused_before_any_attack(
    tmp_path: Path, scene_folder: Path
) -> None:
    data = write_voc(tmp_path / "voc", 4, parts={"train": range(2), "val": range(2, 4)})
    alone = shutil.copy(scene_folder / "weights.safetensors", tmp_path / "objects.safetensors")
    with pytest.raises(ValueError, match="is not in a model folder"):
        run("objects", alone, data, "--part", "validation", "--into-card")


# What is said of a classifier of your own, where nobody says anything.
OWN: dict[str, object] = {"head": "", "channels": 3, "channels_last": False}


def whole_way(tmp_path: Path, **changed: object) -> None:
    usual: dict[str, object] = dict.fromkeys(
        ("arch", "weights", "epochs", "augment", "balance", "purifier_epochs")
    )
    usual |= {"method": "nfgsm", "activation": "relu", "data": tmp_path / "voc"} | OWN
    inputs.whole_way(**(usual | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"arch": "vgg11"}, "--arch vgg11 is a classifier"),
        ({"method": "mart"}, "choose among standard, nfgsm, pgd"),
        ({"purifier_epochs": 2}, "`rampart purifier` trains an object detector's"),
        ({"augment": ["cutout"]}, "choose among flip, turn"),
        ({"activation": "silu"}, "--activation is for classifiers"),
        ({"head": "fc"}, "--head is for classifiers"),
        ({"channels": 1}, "--channels is for classifiers"),
        ({"channels_last": True}, "--channels-last is for classifiers"),
        ({"balance": 0.5}, "--balance is for classifiers"),
        ({"epochs": 0, "weights": Path("a")}, "rampart calibrate"),
        ({"weights": Path("nothing.pth")}, r"nothing\.pth"),
        ({"data": Path(), "arch": "fasterrcnn"}, "has no boxes"),
    ],
)
def test_the_whole_way_refuses_what_is_of_the_other_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], word: str
) -> None:
    write_voc(tmp_path / "voc", 2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    whole_way(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        whole_way(tmp_path, **changed)


def learning(tmp_path: Path, **changed: object) -> None:
    usual: dict[str, object] = dict.fromkeys(("arch", "teacher", "augment", "aim", "passes"))
    usual |= {"method": "nfgsm", "smoothing": 0, "steps": 10, "awp": 0, "balance": 0} | OWN
    usual |= {"activation": "relu", "rectify": False, "compile": False, "data": tmp_path / "voc"}
    inputs.learning(**(usual | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"arch": "resnet18"}, "--arch resnet18 is a classifier: choose one of ssdlite"),
        ({"method": "trades"}, "choose among standard, nfgsm, pgd"),
        ({"awp": 0.005}, "--awp is for classifiers"),
        ({"activation": "silu"}, "--activation is for classifiers"),
        ({"head": "fc"}, "--head is for classifiers"),
        ({"channels": 1}, "--channels is for classifiers"),
        ({"channels_last": True}, "--channels-last is for classifiers"),
        ({"balance": 0.5}, "--balance is for classifiers"),
        ({"augment": ["warp"]}, "choose among flip, turn"),
        ({"data": Path(), "arch": "ssd"}, "finds objects, but . has no boxes"),
        ({"data": Path(), "aim": "sum"}, "--aim and --passes go with boxes"),
        ({"data": Path(), "augment": ["cutmix"], "method": "mart"}, "not go with --method mart"),
        ({"data": Path(), "augment": ["cutmix"], "rectify": True}, "not go with --rectify"),
        ({"data": Path(), "augment": ["turn"]}, "choose among flip, crop, warp"),
    ],
)
def test_options_of_the_other_task_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], word: str
) -> None:
    write_voc(tmp_path / "voc", 2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=word):
        learning(tmp_path, **changed)


@pytest.mark.parametrize(
    ("data", "classifier", "augment", "word"),
    [
        ("voc", "c", None, r"c\.safetensors is a classifier, but .*voc has boxes"),
        ("empty", "o", None, r"o\.safetensors is an object detector, but .*empty has no boxes"),
        ("voc", "o", ["warp"], "choose among flip, turn, crop, shrink, light"),
        ("empty", "c", ["turn"], "choose among flip, crop, warp"),
        ("empty", "c", ["cutmix"], "choose among flip, crop, warp"),
    ],
)
def test_a_purifier_is_trained_on_what_the_network_behind_it_was(
    tmp_path: Path, data: str, classifier: str, augment: list[str] | None, word: str
) -> None:
    from found import untrained

    from rampart.hardening.objects.detector import save

    write_voc(tmp_path / "voc", 2)
    (tmp_path / "empty").mkdir()
    scene_classifier(tmp_path)
    save(tmp_path / "o.safetensors", untrained())
    for fitting in (("voc", "o"), ("empty", "c")):
        inputs.cleaning(
            data=tmp_path / fitting[0],
            classifier=tmp_path / f"{fitting[1]}.safetensors",
            augment=["flip", "none"],
        )
    weights = tmp_path / f"{classifier}.safetensors"
    with pytest.raises(ValueError, match=word):
        inputs.cleaning(data=tmp_path / data, classifier=weights, augment=augment)


def test_what_an_object_detector_is_trained_with_goes_together(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", 2)
    for arch in (None, "ssd", "ssd-resnet34", "fasterrcnn-resnet50", "ssdlite"):
        learning(tmp_path, arch=arch, aim="strongest", passes=2, augment=["turn", "none"])


def test_the_names_that_are_checked_early_are_those_that_there_are() -> None:
    assert inputs.OBJECT_METHODS == METHODS
    assert (*JITTERS, "none") == inputs.JITTERS
    assert signature(train).parameters["steps"].default == ObjectRecipe().steps
    assert inputs.Aim.__args__ == AIMS  # type: ignore[attr-defined]


def test_every_fault_of_a_training_is_told_before_it(tmp_path: Path) -> None:
    from rampart import objects
    from rampart.sources import Source
    from rampart.training import Run

    (tmp_path / "voc" / "Annotations").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    net, recipe = objects.Network("ssd-alexnet", 100), ObjectRecipe()
    with pytest.raises(ValueError, match=r"3 things|2 things") as error:
        objects.train_from(Source(tmp_path / "voc"), net, recipe, Run(tmp_path / "file", "cpu"))
    text = str(error.value)
    assert "ssd needs one of resnet10" in text and "to train on" in text
    with pytest.raises(ValueError, match="Pictures with boxes are split by"):
        objects.read(Source(tmp_path / "voc", tmp_path))


def test_a_training_whose_validation_shows_no_object_does_not_begin(tmp_path: Path) -> None:
    from found import untrained

    from rampart.hardening.objects.detector import save

    data = write_voc(tmp_path / "voc", 8, parts={"train": range(3, 8), "val": range(3)})
    asked = ("train", "--data", data, *TINY, "--out", tmp_path / "run")
    with pytest.raises(ValueError, match=r"none of 1 validation pictures shows .* --validate-on"):
        run(*asked, "--validate-on", 1)
    write_voc(data, 8, parts={"val": range(1)})
    with pytest.raises(ValueError, match=r"none of 1 .*list pictures with objects as its part val"):
        run(*asked)
    save(tmp_path / "o.safetensors", untrained())
    weights = ("--classifier", tmp_path / "o.safetensors", "--out", tmp_path / "run")
    with pytest.raises(ValueError, match=r"none of 1 validation pictures shows an object"):
        run("purifier", "--data", data, *weights, "--device", "cpu")
    assert not (tmp_path / "run").exists()


def test_weights_to_begin_with_must_fit(tmp_path: Path) -> None:
    from found import TINY as BACKBONE
    from found import untrained

    from rampart.hardening.model.classifier import Classifier
    from rampart.hardening.objects.detector import save
    from rampart.objects import Network, begin

    save(tmp_path / "o.safetensors", untrained())
    with pytest.raises(ValueError, match="finds disc, square, but the pictures show cell"):
        begin(Network(), ("cell",), tmp_path / "o.safetensors")
    classifier = tmp_path / "c.safetensors"
    checkpoint.save(classifier, Classifier(BACKBONE), {"classifier": BACKBONE._asdict()})
    assert begin(Network("fasterrcnn", 128), ("cell",), classifier).config.backbone == BACKBONE
    with pytest.raises(ValueError, match="its own backbone"):
        begin(Network("ssdlite", 128), ("cell",), classifier)
