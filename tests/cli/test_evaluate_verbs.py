import json
import shutil
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from blobs import blobs
from command import run
from in_torch import InTorch
from PIL import Image

from rampart.hardening.attack.ladder import QUICK
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.checks import Check
from rampart.hardening.model.images import Images
from rampart.hardening.report import card as report
from rampart.hardening.report.page import FROM_CARD
from rampart.model import Model
from rampart.studies import ChecksFailed, Study, enter_figures, insist, write_pages


@pytest.mark.slow
@pytest.mark.training
def test_a_user_gets_from_images_to_an_archive_with_six_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count, seed in (("train", 64, 0), ("held", 400, 1), ("test", 12, 2)):
        images = blobs(count, size=16, seed=seed)
        pixels, label = images.image.numpy(), images.label.numpy()
        np.savez(tmp_path / name, image=pixels, label=label, classes=images.classes)
    data = ["--data", tmp_path / "train.npz", "--held", tmp_path / "held.npz"]
    quick = ["--epochs", 1, "--batch-size", 32, "--validate-on", 16, "--device", "cpu"]
    classifier, model = tmp_path / "c" / "classifier.safetensors", tmp_path / "toy"
    net = ["--arch", "resnet10", "--width", 0.125, "--image-size", 16]
    run("train", *data, *quick, *net, "--out", tmp_path / "c")
    run("purifier", *data, *quick, "--out", tmp_path / "p", "--classifier", classifier)
    generator = tmp_path / "p" / "purifier.safetensors"
    parts = ["--classifier", classifier, "--purifier", generator]
    run("calibrate", model, *data, *parts)
    few = ["--limit", 8, "--rung", "pgd20", "--cache", tmp_path / "found", "--into-card"]
    assert "pgd20" in run("evaluate", model, "--images", tmp_path / "test.npz", *few)
    assert len((model / "evaluations.jsonl").read_text().splitlines()) == 1
    metrics = json.loads((model / "card.json").read_text())["metrics"]
    names = {(m["subject"], m["variant"], m["name"]) for m in metrics}
    assert {("classifier", "-", "pgd20"), ("pipeline", "full", "clean_rejection")} <= names
    assert all(m["n"] == 8 and len(m["interval"]) == 2 and m["command"] for m in metrics)
    test = ["--images", tmp_path / "test.npz"]
    with monkeypatch.context() as patch:  # the graphs were exported and asked above
        patch.setattr("rampart.model.to_engine", InTorch)
        beside = [word for word in few if word != "--into-card"]
        before = (model / "card.json").read_bytes()
        run("evaluate", model, *test, *beside, "--variant", "full", "--eps", 2)
        assert (model / "card.json").read_bytes() == before
        rows = report.read_card(model, report.MEASURED)["metrics"]
        assert {row["eps"] for row in rows if row["name"] == "pgd20"} == {"2/255"}
        run("evaluate", model, *test, *few, "--variant", "full", "--eps", 4)
    card = report.read_card(model)
    alone = [row for row in card["metrics"] if row.get("eps") == "4/255"]
    assert {(row["subject"], row["variant"]) for row in alone} == {("pipeline", "full")}
    assert card["threat_model"] == "Linf 8/255"  # the first one's
    assert "parity on" in run("archive", model, *test)
    with ZipFile(tmp_path / "toy.mar") as packed, packed.open("sample.png") as sample:
        pixels = np.asarray(Image.open(sample))
    assert (model / "sample.png").stat().st_size <= 8192
    assert (blobs(400, size=16, seed=1).image.numpy() == pixels).all((1, 2, 3)).sum() == 1


@pytest.mark.slow
def test_the_report_follows_the_cards_threat_with_a_sample_and_without(
    lean_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.model.to_engine", InTorch)
    sample, page = lean_only / "sample.png", lean_only / "report.html"

    def measured(eps: int) -> str:
        model, budget = Model.load(lean_only), QUICK._replace(steps=1, targets=1, queries=1)
        study = Study(Threat("Linf", eps / 255), device="cpu", into_card=True)
        image, found = blobs(6).image, lean_only.parent / "found"
        # An untrained network is right where it is said to be.
        few = Images(image, model.pipeline("lean")(image).logits.argmax(1), model.classes)
        figures = model.evaluate(few, budget, threat=study.threat, cache=found, device="cpu")
        kept, own = enter_figures(model, figures, study, whole=True)
        return "\n".join(write_pages(model, figures, study, kept, own=own, gallery=None))

    assert str(page) in measured(8)
    assert "(chelsea)" in page.read_text()
    checks = report.read_card(lean_only)["checks"]
    assert {(check["data"], check["n"]) for check in checks} == {("images in memory", 6)}
    without = page.read_bytes()
    Image.fromarray(blobs(1).image[0].numpy()).save(sample)
    assert "the card is of Linf 8/255" in measured(4)
    assert page.read_bytes() == without
    assert str(page) in measured(8)
    assert "sample.png of the model" in page.read_text()
    assert str(page) in run("report", lean_only)
    assert FROM_CARD in page.read_text()


CARD = ["--into-card"]


def test_a_failed_self_check_is_named_and_a_passed_one_is_not() -> None:
    check = {"name": "adaptive", "subject": "pipeline full", "seen": "", "passed": False}
    fine = check | {"name": "logits", "passed": True}
    with pytest.raises(ChecksFailed, match=r"failed: adaptive \(pipeline full\)\."):
        insist({"checks": [fine, check]})
    insist({"checks": [fine]})
    insist({})


@pytest.mark.training
@pytest.mark.slow
def test_what_lies_outside_the_threat_model_goes_into_the_card(lean_only: Path) -> None:
    held = lean_only.with_name("held.npz")
    found = lean_only.with_name("found")
    output = run(
        "outside", lean_only, "--images", held, "--limit", 4, "--cache", found, "--into-card"
    )
    seen = report.read_card(lean_only)["outside"]
    assert {row["threat"] for row in seen["rows"]} > {"L2 0.5", "patch", "clean"}
    assert {row["n"] for row in seen["rows"]} == {4}
    assert "| JPEG, quality 25 | 4 |" in output
    assert "image scaling: " in output
    assert len((lean_only / "evaluations.jsonl").read_text().splitlines()) == 1


@pytest.mark.training
@pytest.mark.slow
def test_what_a_purifier_is_for_goes_into_card_and_report_from_every_side(
    lean_only: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = lean_only
    shutil.copy(tiny_folder / "calibration-full.json", model)
    shutil.copytree(model, tmp_path / "bare-undefended")
    few = ["--limit", 4, "--cache", tmp_path / "found", "--also-from", tiny_folder]
    line = ["uses", model, "--images", tmp_path / "held.npz", *few]
    before = (model / "card.json").read_bytes()
    assert "| PGD-20 on tiny | 4 |" in run(*line)
    assert (model / "card.json").read_bytes() == before
    head = "<!-- purifier of bare: made by `rampart table`, do not edit -->"
    text = f"{head}\n\nnothing yet\n\n<!-- end of purifier of bare -->\n"
    assert report.with_figures(text, [model]) == text
    output = run(*line, "--into-card")
    part = report.read_card(model)["purifier"]
    assert {row["subject"] for row in part["rows"]} == {"classifier", "undefended"}
    assert {row["n"] for row in part["rows"]} == {4} and part["threat_model"] == "Linf 8/255"
    assert all(line in output for line in part["advice"]) and len(part["advice"]) == 2
    text = report.with_figures(text, [model])
    assert "nothing yet" not in text and part["advice"][0] in text and "| clean | 4 |" in text


@pytest.mark.training
def test_false_alarms_go_into_the_card_with_their_remedies(lean_only: Path) -> None:
    held = lean_only.with_name("held.npz")
    alarms = ["alarms", lean_only, "--data", held, "--held", held, "--limit"]
    output = run(*alarms, 50, "--into-card")
    seen = report.read_card(lean_only)["false_alarms"]
    assert list(seen["coverage"]) == ["lean"]
    assert {row["variant"] for row in seen["rows"]} == {"lean"}
    assert len(seen["remedies"]) == sum(row["too_many"] for row in seen["rows"])
    assert "| JPEG, quality 75 | 50 |" in output
    assert "lean, promised 5%: " in output
    card = (lean_only / "card.json").read_bytes()
    # Fewer images replace nothing, with a word; and without being told, nothing at all does.
    assert "the card keeps its false_alarms of 50 images, and not 40" in run(*alarms, 40, *CARD)
    assert "--into-card writes them into the card" in run(*alarms, 60)
    assert (lean_only / "card.json").read_bytes() == card
    beside = report.read_card(lean_only, report.MEASURED)["false_alarms"]
    assert beside["rows"][0]["n"] == 60
    run(*alarms, 60, *CARD)
    assert report.read_card(lean_only)["false_alarms"]["rows"][0]["n"] == 60


def test_a_variant_alone_goes_with_an_attack_and_must_be_there(lean_only: Path) -> None:
    data = ["--images", lean_only.with_name("held.npz")]
    with pytest.raises(ValueError, match="--variant needs --rung"):
        run("evaluate", lean_only, *data, "--variant", "full")
    for command in (["evaluate", *data, "--rung", "pgd20"], ["archive"], ["export", "--out", "x"]):
        with pytest.raises(ValueError, match="is not calibrated as full: leave out --variant"):
            run(command[0], lean_only, *command[1:], "--variant", "full")


@pytest.mark.training
@pytest.mark.slow
def test_the_ablation_goes_into_the_card_and_chooses_the_default_variant(
    tmp_path: Path, lean_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.studies.to_engine", InTorch)
    model, held = lean_only, lean_only.with_name("held.npz")
    data = ["--data", held, "--held", held]
    output = run("ablate", model, *data, "--limit", 4, "--steps", 1, "--cache", tmp_path / "found")
    assert "| + feature_distance |" in output and "ablation" not in report.read_card(model)
    assert (model / "measured-ablation.png").is_file()
    run("ablate", model, *data, "--limit", 4, "--steps", 1, "--cache", tmp_path / "found", *CARD)
    seen = report.read_card(model)["ablation"]
    assert seen["n"] == 4
    assert seen["threat_model"] == "Linf 8/255"
    assert seen["rows"][0]["name"] == "classifier"
    assert seen["default"]["variant"] == Model.load(model).best_variant == "lean"
    assert (model / "ablation.png").is_file()


@pytest.mark.training
def test_an_ablation_on_test_images_is_logged_and_chooses_nothing(
    tmp_path: Path, lean_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.studies.to_engine", InTorch)
    model, held = lean_only, lean_only.with_name("held.npz")
    images = blobs(6, seed=77)
    # An untrained network is right where it is said to be.
    label = Model.load(model).pipeline("lean")(images.image).logits.argmax(1)
    parts = {"image": images.image, "label": label}
    np.savez(tmp_path / "test", **parts, classes=images.classes)
    np.savez(tmp_path / "other", **parts, classes=images.classes[::-1])
    data = ["--data", held, "--held", held, "--steps", 1, "--cache", tmp_path / "found"]
    with pytest.raises(ValueError, match="the images have the classes"):
        run("ablate", model, *data, "--test", tmp_path / "other.npz")
    output = run("ablate", model, *data, "--test", tmp_path / "test.npz", *CARD)
    assert "| lean | 5.0% |" in output and ", 1 steps, 3 targets, 200 queries" in output
    card = report.read_card(model)
    checked = card["test_ablation"]["checks"]
    assert {check["subject"] for check in checked} == {"lean, detectors"}
    assert all(str(Check(**check)) in output.splitlines() for check in checked)
    assert card["test_ablation"]["data"] == "6 test.npz"
    names = [row["name"] for row in card["test_ablation"]["rows"]]
    assert names == ["classifier", "+ confidence", "lean"]
    assert "ablation" not in card
    assert '"data": "6 test.npz"' in (model / "evaluations.jsonl").read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.training
def test_an_ablation_of_one_row_is_printed_and_kept_nowhere(
    tmp_path: Path, lean_only: Path
) -> None:
    model, held = lean_only, lean_only.with_name("held.npz")
    before = report.read_card(model)
    data = ["--data", held, "--held", held, "--limit", 4, "--steps", 1]
    output = run("ablate", model, *data, "--row", "+ energy", "--cache", tmp_path / "found")
    assert "| + energy | 5.0% |" in output and "| + median |" not in output
    assert report.read_card(model) == before
    with pytest.raises(ValueError, match="--row does not work with --test or --twin"):
        run("ablate", model, *data, "--test", held, "--row", "+ energy")


def test_a_folder_that_is_no_model_has_no_row_in_a_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a calibrated model folder"):
        run("table", tmp_path, "--readme", tmp_path / "README.md")
