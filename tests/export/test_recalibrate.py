import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rampart.export.archive import archive
from rampart.export.recalibrate import recalibrate
from rampart.export.verification import verify as whole_archive
from rampart.handlers.contents import verify
from rampart.handlers.engine import Engine
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.judge.metrics import Metric
from rampart.hardening.model.card import Subject
from rampart.hardening.model.images import Images
from rampart.hardening.report import card as report


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory, tiny_images: Images) -> Path:
    """What clients send here: noisier than what the archive was calibrated on."""
    folder = tmp_path_factory.mktemp("traffic")
    generator = np.random.default_rng(0)
    for number, image in enumerate(tiny_images.image[:150].numpy()):
        noisy = image + generator.normal(0, 4, image.shape)
        home = folder / f"day{number % 3}"
        home.mkdir(exist_ok=True)
        picture = Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
        picture.save(home / f"{number}.png")
    (folder / "day0" / "cut.png").write_bytes((folder / "day0" / "0.png").read_bytes()[:200])
    return folder


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as mar:
        return {name: mar.read(name) for name in mar.namelist()}


def flag_rate(archive: Path, folder: Path, image: np.ndarray, rate: float) -> float:
    with zipfile.ZipFile(archive) as mar:
        mar.extractall(folder)
    verify(folder)
    scores = Engine(folder / "graph.onnx").run(image).scores
    return float((p_values(scores, Calibration.load(folder / "calibration.json")) < rate).mean())


def test_the_new_archive_keeps_its_promise_on_traffic_it_has_not_seen(
    tiny_archive: Path, traffic: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new.mar"
    seen = tmp_path / "seen"
    shutil.copytree(traffic / "day0", seen / "day0")
    shutil.copytree(traffic / "day1", seen / "day1")
    made = recalibrate(tiny_archive, seen, out, command="rampart calibrate")
    unseen = np.stack([np.asarray(Image.open(file)) for file in (traffic / "day2").glob("*.png")])
    assert flag_rate(tiny_archive, tmp_path / "old", unseen, 0.05) > 0.5
    # 50 pictures against 100 ranks: at most 16% in 99.9% of cases (beta-binomial).
    assert flag_rate(out, tmp_path / "new", unseen, 0.05) <= 0.16
    assert made.images == 100
    assert made.drift > 0.5 > made.chance
    assert made.flagged > 0.5
    assert made.rate == 0.01
    assert made.spread[0] < 0.01 < made.spread[1]


def test_only_calibration_card_and_hashes_differ(
    tiny_archive: Path, traffic: Path, tmp_path: Path
) -> None:
    recalibrate(tiny_archive, traffic, tmp_path / "new.mar", command="rampart calibrate x")
    old, new = contents(tiny_archive), contents(tmp_path / "new.mar")
    old = {name: data for name, data in old.items() if not name.endswith("/")}
    assert list(old) == list(new)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"calibration.json", "card.json", "sha256.json"}
    assert set(json.loads(new["sha256.json"])) == set(new) - {"sha256.json"}
    assert len(list(whole_archive(tmp_path / "new.mar"))) == 2
    card = json.loads(new["card.json"])
    assert card["calibration_images"] == 150
    assert card["commands"][-1] == "rampart calibrate x"
    assert card["sha256"]["calibration.json"] == json.loads(new["sha256.json"])["calibration.json"]
    before, after = (json.loads(files["calibration.json"]) for files in (old, new))
    assert after["knots"] == before["knots"]
    assert after["data"] == f"150 pictures of {traffic.name}"


def test_figures_that_the_old_thresholds_made_leave_the_card(
    tiny_shipped: Path, traffic: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_shipped, tmp_path / "tiny")
    figures = [Metric(Subject(who), "clean", 0.5, 10) for who in ("classifier", "pipeline")]
    rows = [report.row(figure, data="d", command="c") for figure in figures]
    card = {"metrics": rows, "ablation": {}, "outside": {}, "checks": [], "false_alarms": {}}
    card["test_ablation"] = {}
    report.write_card(folder, card | {"model": "tiny"})
    archive(folder, tmp_path / "old.mar", variant="lean")
    recalibrate(tmp_path / "old.mar", traffic, tmp_path / "new.mar", command="")
    card = json.loads(contents(tmp_path / "new.mar")["card.json"])
    assert [row["subject"] for row in card["metrics"]] == ["classifier"]
    assert not {"ablation", "test_ablation", "outside", "checks", "false_alarms"} & set(card)
    assert card["model"] == "tiny"


@pytest.mark.parametrize("name", ["/etc/passwd", "../../up.txt", "a/../../up.txt", "labels.json"])
def test_files_that_lead_out_of_an_archive_are_refused(
    tiny_archive: Path, traffic: Path, tmp_path: Path, name: str
) -> None:
    forged = shutil.copy(tiny_archive, tmp_path / "forged.mar")
    with warnings.catch_warnings(), zipfile.ZipFile(forged, "a") as mar:
        warnings.simplefilter("ignore")  # zipfile warns of a name that is there already
        mar.writestr(name, "x")
    with pytest.raises(ValueError, match="do not trust it"):
        recalibrate(Path(forged), traffic, tmp_path / "new.mar", command="")
    assert [file.name for file in tmp_path.iterdir()] == ["forged.mar"]


def test_pictures_that_the_endpoint_refuses_are_named(
    tiny_archive: Path, traffic: Path, tmp_path: Path
) -> None:
    made = recalibrate(tiny_archive, traffic, tmp_path / "new.mar", command="")
    assert len(made.refused) == 1
    assert made.refused[0].startswith("day0/cut.png: ")


def test_what_is_no_file_is_named_and_not_waited_for(
    tiny_archive: Path, traffic: Path, tmp_path: Path
) -> None:
    seen = shutil.copytree(traffic, tmp_path / "seen")
    os.mkfifo(seen / "a.png")
    (seen / "b\x1b.png").symlink_to("/dev/zero")
    (seen / "c.png").symlink_to(seen / "day1" / "1.png")
    (seen / "d.png").symlink_to("nowhere")
    (seen / "e.png").mkdir()
    (seen / "e.png" / "round").symlink_to(seen)
    made = recalibrate(tiny_archive, seen, tmp_path / "new.mar", command="")
    assert made.images == 151
    assert [line for line in made.refused if not line.startswith("day0/cut.png: ")] == [
        "a.png is not a regular file: remove it",
        r"b\x1b.png is not a regular file: remove it",
        "d.png: No such file or directory",
    ]


def test_too_few_pictures_are_refused_and_nothing_is_written(
    tiny_archive: Path, traffic: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds 50 usable pictures: .*at least 100"):
        recalibrate(tiny_archive, traffic / "day1", tmp_path / "new.mar", command="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["same", "new.zip"])
def test_the_new_archive_has_a_name_of_its_own(
    tiny_archive: Path, traffic: Path, tmp_path: Path, name: str
) -> None:
    out = tiny_archive if name == "same" else tmp_path / name
    before = tiny_archive.read_bytes()
    with pytest.raises(ValueError, match=r"pass a new file that ends in \.mar"):
        recalibrate(tiny_archive, traffic, out, command="")
    assert tiny_archive.read_bytes() == before


def test_an_archive_that_was_tampered_with_is_refused(
    tiny_archive: Path, traffic: Path, tmp_path: Path
) -> None:
    forged = tmp_path / "forged.mar"
    with zipfile.ZipFile(forged, "w") as mar:
        for name, data in contents(tiny_archive).items():
            mar.writestr(name, data + b" " if name == "labels.json" else data)
    with pytest.raises(ValueError, match=r"forged\.mar: labels\.json is not the file"):
        recalibrate(forged, traffic, tmp_path / "new.mar", command="")
    (tmp_path / "text.mar").write_text("no archive")
    with pytest.raises(ValueError, match="not a TorchServe archive"):
        recalibrate(tmp_path / "text.mar", traffic, tmp_path / "new.mar", command="")
    with pytest.raises(FileNotFoundError, match="rampart archive"):
        recalibrate(tmp_path / "none.mar", traffic, tmp_path / "new.mar", command="")
