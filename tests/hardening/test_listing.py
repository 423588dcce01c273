"""Folders as people have them: what is a class, what is left out, and what is told of it."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rampart.hardening.train import data, decoding
from rampart.hardening.train.survey import Survey


def picture(file: Path, size: tuple[int, int] = (32, 32), **options: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(file, **options)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two classes of two pictures."""
    for name in ("cat/0.png", "cat/1.jpg", "dog/0.png", "dog/1.webp"):
        picture(tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name",
    [
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/__MACOSX/0.png",
        "cat/._0.png",
        "cat/.hidden.png",
        ".Trash/0.png",
        "__MACOSX/cat/._0.png",
        "cat/@eaDir/0.png",
    ],
)
def test_what_systems_and_notebooks_leave_behind_is_left_out_and_told(
    home: Path, name: str
) -> None:
    picture(home / name)
    images, report = data.survey(home, size=32)
    assert images.classes == ("cat", "dog") and len(images) == 4
    assert list(report.left_out) == ["1 hidden"]


def test_files_of_other_kinds_are_told_by_their_ending(home: Path) -> None:
    for name in ("cat/a.bmp", "cat/b.BMP", "dog/deep/a.gif"):
        picture(home / name)
    (home / "cat" / "notes.txt").write_text("mine")
    (home / "cat" / "Makefile").write_text("all:")
    (home / "bird").mkdir()
    picture(home / "loose.png")
    (home / "labels.csv").write_text("")
    images, report = data.survey(home, size=32)
    assert images.classes == ("cat", "dog") and len(images) == 4
    told = dict(reversed(line.split(" ", 1)) for line in report.left_out)
    assert told == {
        "named .bmp": "2",
        "named .gif": "1",
        "named .txt": "1",
        "without an ending": "1",
        "in no class folder": "1",
        "without pictures (bird)": "1",
    }


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPG"])
def test_a_jpeg_is_taken_under_each_of_its_endings(home: Path, ending: str) -> None:
    picture(home / f"cat/x{ending}", format="JPEG")
    assert len(data.load(home)) == 5


def test_a_class_of_pictures_in_another_format_alone_stops_the_run(home: Path) -> None:
    picture(home / "owl" / "x.bmp")
    with pytest.raises(ValueError, match=r"owl has only pictures in \.bmp: save them as PNG"):
        data.load(home)


# As Intel's image set and others have them.
SEVERAL = [("seg_train", "seg_test"), ("seg_train", "seg_pred"), ("train_images", "test-set")]


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "val"), *SEVERAL]
)
def test_splits_are_no_classes_however_they_are_spelled(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        picture(tmp_path / name / "cat" / "0.png")
    with pytest.raises(ValueError, match="holds splits, not classes: pass one of them") as told:
        data.load(tmp_path)
    assert str(told.value).endswith(f"such as {tmp_path / names[0]}")  # what to train on


def test_a_class_may_have_the_name_of_a_split(home: Path) -> None:
    for name in ("Test", "seg_train"):
        picture(home / name / "0.png")
    assert data.load(home).classes == ("Test", "cat", "dog", "seg_train")


def photograph(file: Path, quality: int = 95) -> bytes:
    """A JPEG of more than both ends that its structure is told by."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    Image.fromarray(noise).save(file, quality=quality)
    assert file.stat().st_size > 3 * decoding.HEAD
    return file.read_bytes()


def test_a_large_jpeg_is_known_by_its_ends_and_the_middle_is_not_read(home: Path) -> None:
    content = photograph(home / "cat" / "2.jpg")
    with (home / "cat" / "2.jpg").open("r+b") as file:
        file.truncate(200 * 2**20)  # a hole that reading would fill memory with
        file.seek(0, 2)
        file.write(content[-decoding.HEAD :])
    tracemalloc.start()
    _, found = data.find_pictures(home, size=32).examined(keep=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(32, 32), (32, 32), (800, 600), (32, 32), (32, 32)]
    assert peak < 20 * 2**20


@pytest.mark.parametrize("cut", [1, 100_000])
def test_a_large_jpeg_that_is_cut_is_told_without_a_pixel(home: Path, cut: int) -> None:
    content = photograph(home / "cat" / "2.jpg")
    (home / "cat" / "2.jpg").write_bytes(content[:-cut])
    _, found = data.find_pictures(home, size=32).examined(keep=False)
    assert "2.jpg: the image is truncated or corrupt" in str(found[2])


def test_where_decoding_takes_long_what_is_cut_is_told_before_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_ten(home)
    monkeypatch.setattr(data, "SOON", 0)
    with pytest.raises(ValueError, match=r"^8 of 14 pictures cannot be read"):
        data.load(home)
    images, report = data.survey(home, size=32, skip_bad=True)
    assert len(images) == 4 and "10 that cannot be read" in report.left_out


def test_one_folder_too_many_is_named_with_the_one_to_pass(home: Path) -> None:
    with pytest.raises(ValueError, match=r"single folder, data, .*\(cat, dog\): pass .*data$"):
        data.load(home.parent)


def test_pictures_of_a_class_may_lie_in_folders(tmp_path: Path) -> None:
    for name in ("cat/a/0.png", "cat/b/0.png", "dog/a/0.png"):
        picture(tmp_path / name)
    assert data.load(tmp_path).label.tolist() == [0, 0, 1]


def break_ten(home: Path) -> list[str]:
    """Ten pictures that cannot be read, each for a reason of its own."""
    whole = (home / "cat" / "1.jpg").read_bytes()
    png = (home / "cat" / "0.png").read_bytes()
    contents = {
        "empty.png": b"",
        "cut.jpg": whole[:-20],
        "text.jpg": b"<html>not found</html>",
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "pixels.png": png[:50] + b"rampart!" * 4 + png[82:],
        "bmp.jpg": b"BM" + bytes(100),
    }
    for name, content in contents.items():
        (home / "cat" / name).write_bytes(content)
    Image.new("RGBA", (32, 32)).save(home / "cat" / "clear.png")
    Image.new("RGB", (500, 20)).save(home / "cat" / "long.png")
    (home / "dog" / "link.png").symlink_to(home / "nowhere")
    Image.fromarray(np.zeros((4097, 4097), np.uint8)).save(home / "dog" / "huge.png")
    return [*contents, "clear.png", "long.png", "link.png", "huge.png"]


def test_all_bad_pictures_are_listed_at_once(home: Path) -> None:
    names = break_ten(home)
    with pytest.raises(ValueError, match=r"^10 of 14 pictures cannot be read \(train") as error:
        data.load(home)
    told = str(error.value).split(";\n  ")
    assert len(told) == 10
    assert all(sum(f"/{name}: " in line for line in told) == 1 for name in names)
    assert "; remove" not in str(error.value)
    assert "Git LFS pointer" in next(line for line in told if "lfs.png" in line)


def test_bad_pictures_are_left_out_where_that_is_asked_for(home: Path) -> None:
    whole = data.load(home)
    break_ten(home)
    images, report = data.survey(home, size=32, skip_bad=True)
    assert images.paths == whole.paths
    assert (images.whole().image == whole.image).all()
    assert "10 that cannot be read" in report.left_out
    assert report.counts == {"cat": 2, "dog": 2}


def test_a_class_without_a_readable_picture_stops_the_run(home: Path) -> None:
    (home / "owl").mkdir()
    (home / "owl" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="owl has no readable picture"):
        data.load(home, skip_bad=True)


def test_of_a_folder_that_fills_memory_the_structure_is_checked_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = break_ten(home)
    monkeypatch.setattr(data, "MEMORY", 0)
    with pytest.raises(ValueError, match=r"^8 of 14") as error:
        data.survey(home, size=32, stream=True)
    unseen = {"pixels.png", "clear.png"}  # they are known once their pixels are decoded
    assert {name for name in names if f"/{name}: " not in str(error.value)} == unseen
    images, _ = data.survey(home, size=32, stream=True, skip_bad=True)
    assert isinstance(images, data.Folder) and len(images) == 6


def test_a_long_list_of_bad_pictures_ends_with_their_number(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LISTED", 3)
    break_ten(home)
    with pytest.raises(ValueError, match=r"and 7 more$"):
        data.load(home)


def test_the_summary_names_classes_sizes_and_what_was_left_out(home: Path) -> None:
    picture(home / "cat" / "2.png", (640, 480))
    (home / "cat" / "notes.txt").write_text("mine")
    assert data.survey(home, size=32)[1].lines(32) == [
        "data: 5 images, 2 classes, 32x32 to 640x480 pixels",
        "  cat 3, dog 2",
        "  left out: 1 named .txt",
    ]


def test_the_summary_warns_of_small_pictures_and_rare_classes(home: Path) -> None:
    (warning,) = (line for line in data.survey(home, size=64)[1].lines(64) if "warning" in line)
    assert "4 pictures are smaller than the model's 64 pixels per side" in warning
    lines = Survey("x", {"a": 100, "b": 4}).lines(32)
    assert lines[-1] == "  warning: class b has 4 images, but the largest has 100"
    assert "warning" not in str(Survey("x", {"a": 100, "b": 5}).lines(32))


def test_of_many_classes_the_fewest_and_the_most_are_told() -> None:
    counts = {f"c{index}": 10 + index for index in range(100)}
    first, second = Survey("x.npz", counts, [(32, 32)]).lines(32)
    assert first == "x.npz: 5,950 images, 100 classes, 32x32 pixels"
    assert second == "  fewest: c0 10, c1 11, c2 12; most: c97 107, c98 108, c99 109"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, 2_000_000], r"a label is 2000000, .* number classes from 0 without gaps"),
        ([0.5, 1.0], "label holds float64 where classes are numbered"),
        ([float("nan"), 1.0], "label holds float64"),
        (["cat", "dog"], r"label holds <U3 where classes are numbered"),
        ([-1, 0], "a label lies outside the 1 classes"),
    ],
)
def test_labels_that_number_no_classes_are_refused(
    tmp_path: Path, label: list[object], message: str
) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 32, 32, 3), np.uint8), label=np.array(label))
    with pytest.raises(ValueError, match=rf"a\.npz.*{message}"):
        data.load(tmp_path / "a.npz")
