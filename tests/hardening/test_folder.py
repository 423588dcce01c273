import shutil
from pathlib import Path

import pytest

from hardening import report
from hardening.folder import best_variant, calibrated, deliver, passed, sibling, trained_on


def test_the_variant_that_the_ablation_chose_is_taken_where_there_is_one(
    tmp_path: Path, tiny_folder: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "tiny")
    assert best_variant(model) == "full"
    report.write_card(model, {"ablation": {"default": {"variant": "lean"}}})
    assert best_variant(model) == "lean"
    (model / "calibration-lean.json").unlink()
    assert best_variant(model) == "full"


def test_a_folder_that_is_not_calibrated_says_what_makes_it_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a calibrated model: `rampart calibrate`"):
        calibrated(tmp_path)


def test_a_twin_is_the_folder_beside_that_is_called_undefended(tmp_path: Path) -> None:
    assert sibling(tmp_path / "mine") is None
    (tmp_path / "mine-undefended").mkdir()
    assert sibling(tmp_path / "mine") == tmp_path / "mine-undefended"


def test_the_images_of_training_are_known_by_name_and_by_command() -> None:
    card = {"data": "cifar10", "commands": ["rampart train --data 'my pictures/train.npz' --out c"]}
    assert passed(card, "--data") == ["train.npz"]
    assert [trained_on(card, Path(name)) for name in ("cifar10", "x/train.npz", "c")] == [
        True,
        True,
        False,
    ]


def test_delivered_again_the_same_model_keeps_its_figures_and_another_one_does_not(
    tmp_path: Path, tiny_folder: Path
) -> None:
    made, target = shutil.copytree(tiny_folder, tmp_path / "made"), tmp_path / "store"
    card = report.read_card(made)
    row = {"subject": "classifier", "variant": "-", "name": "clean", "value": 0.5, "data": "d"}
    report.write_card(made, card | {"metrics": [row]})
    assert not deliver(made, target)
    later = row | {"name": "pgd20", "value": 0.4}
    report.write_card(target, report.read_card(target) | {"metrics": [row, later], "outside": {}})
    (target / "evaluations.jsonl").write_text("since\n")
    (made / "evaluations.jsonl").write_text("then\n")
    assert deliver(made, target)
    assert report.read_card(target)["metrics"] == [later, row]
    assert "outside" in report.read_card(target)
    assert (target / "evaluations.jsonl").read_text() == "since\nthen\n"
    (target / "curve.png").touch()
    (made / "calibration-lean.json").write_text("{}")
    assert not deliver(made, target)
    assert report.read_card(target)["metrics"] == [row]
    assert not (target / "curve.png").exists()
    assert (target / "evaluations.jsonl").read_text() == "since\nthen\n"
