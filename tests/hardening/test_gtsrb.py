import zipfile
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rampart.hardening.train import data, gtsrb
from rampart.hardening.train.fetching import fetching


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What torchvision unpacks: 11 tracks of 5 frames of two classes, and three test images."""
    home = tmp_path / "gtsrb"
    for label, shade in ((0, 60), (14, 200)):
        folder = home / "GTSRB" / "Training" / f"{label:05}"
        folder.mkdir(parents=True)
        for track in range(11):
            for frame in range(5):
                image = Image.new("RGB", (40, 50), (shade, track, frame))
                image.save(folder / f"{track:05}_{frame:05}.ppm")
    folder = home / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate((14, 0, 42)):
        Image.new("RGB", (35, 35), (label, 0, 0)).save(folder / f"{number:05}.ppm")
        lines.append(f"{number:05}.ppm;35;35;5;5;30;30;{label}")
    (home / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    return home


def test_every_second_frame_of_a_track_is_taken_and_whole_tracks_are_held_out(
    home: Path, tmp_path: Path
) -> None:
    counts = {part: gtsrb.write(home, part, tmp_path) for part in ("train", "held", "test")}
    assert counts == {"train": 2 * 8 * 3, "held": 2 * 3 * 3, "test": 3}
    parts = {part: data.load_npz(tmp_path / f"{part}.npz") for part in counts}
    tracks = {part: set(images.image[:, 0, 0, 1].tolist()) for part, images in parts.items()}
    assert tracks["held"] == {0, 5, 10} and tracks["train"] == set(range(11)) - tracks["held"]
    assert set(parts["train"].image[:, 0, 0, 2].tolist()) == {0, 2, 4}
    for images in parts.values():
        assert images.image.shape[1:] == (32, 32, 3) and len(images.classes) == 43
        signs = list(zip(images.label.tolist(), images.image[:, 0, 0, 1].tolist(), strict=True))
        if images is not parts["test"]:  # each track in one piece, and classes mixed
            assert len(set(signs)) == len([*groupby(signs)])
            assert len([*groupby(images.label.tolist())]) > 2
    train = parts["train"]
    assert [train.classes[i] for i in sorted(set(train.label.tolist()))] == [
        "speed limit 20",
        "stop",
    ]
    assert set(zip(train.label.tolist(), train.image[:, 0, 0, 0].tolist(), strict=True)) == {
        (0, 60),
        (14, 200),
    }
    assert parts["test"].label.tolist() == parts["test"].image[:, 0, 0, 0].tolist() == [14, 0, 42]


@pytest.mark.parametrize("there", [False, True])
def test_a_download_that_fails_says_what_to_fetch_by_hand_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    folder = tmp_path / "signs"
    if there:  # a file that was put there, which is not whole
        folder.mkdir()
        with zipfile.ZipFile(folder / gtsrb.ARCHIVES[0], "w") as cut:
            cut.writestr("a", "b")
    with pytest.raises(OSError, match=r"cannot be fetched .*GTSRB-Training_fixed\.zip, .*by hand"):
        gtsrb.download(folder)
    left = [file.name for file in tmp_path.rglob("*")]
    assert left == (["signs", gtsrb.ARCHIVES[0]] if there else [])


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_half_way_leaves_nothing_but_what_was_there(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "signs"
    if there:
        folder.mkdir()
        (folder / "mine").write_text("kept")
    failure = pytest.raises(OSError, match=r"It cannot be fetched \(no room\): do so")
    with failure, fetching(folder, "It", "do so") as scratch:
        (scratch / "part").write_text("half")
        if not there:
            (folder / "half").write_text("half")
        raise RuntimeError("no room")
    assert [file.name for file in tmp_path.rglob("*")] == (["signs", "mine"] if there else [])


@pytest.mark.parametrize("part", ["train", "held", "test"])
def test_an_array_file_has_the_labels_of_the_classes(home: Path, tmp_path: Path, part: str) -> None:
    gtsrb.write(home, part, tmp_path)
    with np.load(tmp_path / f"{part}.npz") as file:
        assert file["classes"].tolist() == list(gtsrb.CLASSES)
