import os
import shutil
from pathlib import Path

import pytest

from rampart.hardening.model.files import TRAINED_ON
from rampart.hardening.model.folder import (
    calibrated,
    deliver,
    held_beside,
    is_of,
    sibling,
    trained_on,
)
from rampart.hardening.report import card as report


def test_a_folder_that_is_not_calibrated_says_what_makes_it_so(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="not a calibrated model folder: create one with `rampart calibrate`"
    ):
        calibrated(tmp_path)


def test_a_twin_is_the_folder_beside_that_is_called_undefended(tmp_path: Path) -> None:
    assert sibling(tmp_path / "mine") is None
    (tmp_path / "mine-undefended").mkdir()
    assert sibling(tmp_path / "mine") == tmp_path / "mine-undefended"


ROW = {"subject": "classifier", "variant": "-", "name": "clean", "value": 0.5, "data": "d"}
ROW |= {"n": 10, "interval": [0.4, 0.6], "command": "c"}
QUICK = {"name": "logits", "subject": "classifier", "passed": True, "seen": "", "data": "d", "n": 9}


def test_the_images_of_training_are_known_by_name_and_by_command() -> None:
    lines = [
        "rampart train --data 'my pictures/train.npz' --out c",
        "rampart train --data=d=1/more",
    ]
    card = {"data": "cifar10", "commands": lines}
    names = ("cifar10", "x/train.npz", "more", "c", "d=1")
    known = [trained_on(card, Path(name)) for name in names]
    assert known == [True, True, True, False, False]


def test_held_out_images_belong_to_the_images_of_their_own_command() -> None:
    first = "rampart train --data old/imagenet --held old/val --out pre"
    card = {"commands": [first, "rampart train --data new/mine --held=new/mine-val --init pre/c"]}
    assert held_beside(card, Path("imagenet")) == ["val"]
    assert held_beside(card, Path("mine")) == ["mine-val"]
    assert held_beside({"commands": [first]}, Path("mine")) == []


@pytest.fixture
def made(tmp_path: Path, tiny_folder: Path) -> Path:
    """A finished model folder, with a figure, a page and a log."""
    folder = shutil.copytree(tiny_folder, tmp_path / "made")
    report.write_card(folder, report.read_card(folder) | {"metrics": [ROW], "checks": [QUICK]})
    (folder / "report.html").write_text("quick")
    (folder / "evaluations.jsonl").write_text("then\n")
    for file in folder.iterdir():
        os.utime(file, (1000, 1000))
    return folder


def test_the_same_model_keeps_what_was_measured_since(tmp_path: Path, made: Path) -> None:
    target = tmp_path / "store"
    assert not deliver(made, target)
    later = ROW | {"name": "pgd20", "value": 0.4}
    whole = QUICK | {"n": 10}
    since = {"metrics": [ROW, later], "outside": {}, "checks": [whole]}
    report.write_card(target, report.read_card(target) | since)
    (target / "report.html").write_text("whole")
    (target / "evaluations.jsonl").write_text("then\nsince\n")
    for _ in range(2):
        assert deliver(made, target)
        card = report.read_card(target)
        assert sorted(row["name"] for row in card["metrics"]) == ["clean", "pgd20"]
        assert card["checks"] == [whole] and "outside" in card
        assert (target / "report.html").read_text() == "whole"
        assert (target / "evaluations.jsonl").read_text() == "then\nsince\n"


def test_what_a_later_stage_measures_of_the_same_model_replaces_the_old(
    tmp_path: Path, made: Path
) -> None:
    target = tmp_path / "store"
    deliver(made, target)
    report.write_card(made, report.read_card(made) | {"checks": [QUICK | {"seen": "new"}]})
    (made / "report.html").write_text("new")
    for name in ("card.json", "report.html"):
        os.utime(made / name, (2**32, 2**32))
    assert deliver(made, target)
    assert [check["seen"] for check in report.read_card(target)["checks"]] == ["new"]
    assert (target / "report.html").read_text() == "new"


def test_a_self_check_that_failed_goes_by_no_later_stage_on_fewer_images(
    tmp_path: Path, made: Path
) -> None:
    target, failed = tmp_path / "store", QUICK | {"passed": False, "n": 10}
    deliver(made, target)
    report.write_card(target, report.read_card(target) | {"checks": [failed]})
    os.utime(made / "card.json", (2**32, 2**32))
    assert deliver(made, target)
    assert report.read_card(target)["checks"] == [failed]


def test_another_model_takes_nothing_over_but_the_log_and_leaves_other_files_alone(
    tmp_path: Path, made: Path
) -> None:
    target = tmp_path / "store"
    deliver(made, target)
    report.write_card(target, report.read_card(target) | {"outside": {}})
    for name in ("ablation.png", "mine.png", "calibration-full-int8.json", TRAINED_ON):
        (target / name).touch()
    (made / "calibration-lean.json").write_text("{}")
    (made / "evaluations.jsonl").write_text("new\n")
    (made / "report.html").unlink()
    assert not deliver(made, target)
    assert "outside" not in report.read_card(target)
    assert (target / "evaluations.jsonl").read_text() == "then\nnew\n"
    kept = {file.name for file in target.iterdir()} - {file.name for file in made.iterdir()}
    assert kept == {"mine.png"}


def test_weights_never_stand_under_the_calibrations_of_others_however_a_delivery_ends(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    (other / "weights.safetensors").write_bytes(b"other")
    (other / "calibration-lean.json").write_text("{}")
    whole = content_of(made), content_of(other)
    replace, left = Path.replace, 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    for steps in range(len(list(other.iterdir()))):
        target = shutil.copytree(made, tmp_path / str(steps))
        left = steps
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                deliver(other, target)
        pairs = [zip(content_of(target), one, strict=True) for one in whole]
        assert any(all(here in (b"", there) for here, there in pair) for pair in pairs)
        deliver(other, target)
        assert content_of(target) == content_of(other)


def content_of(folder: Path) -> tuple[bytes, ...]:
    """What decides, of a folder."""
    files = ("weights.safetensors", "calibration-full.json", "calibration-lean.json")
    return tuple((folder / n).read_bytes() if (folder / n).is_file() else b"" for n in files)


def test_a_full_disk_leaves_the_model_that_was_there(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    (other / "weights.safetensors").write_bytes(b"other")
    (other / "calibration-lean.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in made.iterdir()}

    def full(source: Path, place: Path) -> None:
        if source.name == "weights.safetensors":
            raise OSError(28, "No space left on device")
        shutil.copy(source, place)

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        deliver(other, made)
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before


def test_an_archive_is_known_by_its_weights(
    tmp_path: Path, tiny_archive: Path, tiny_folder: Path
) -> None:
    assert is_of(tiny_archive, tiny_folder)
    (tmp_path / "torn.mar").write_bytes(tiny_archive.read_bytes()[:1000])
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (other / "weights.safetensors").write_bytes(b"other")
    assert not any((is_of(tiny_archive, other), is_of(tmp_path / "torn.mar", tiny_folder)))
    assert not is_of(tmp_path / "missing.mar", tiny_folder)
