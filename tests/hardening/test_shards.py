"""Tar shards in WebDataset's layout as images to train and measure on."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from command import run
from in_torch import InTorch
from PIL import Image

from rampart import inputs
from rampart.hardening.model import checkpoint
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.images import Images
from rampart.hardening.report.card import MEASURED, read_card, write_card
from rampart.hardening.train import data, decoding
from rampart.hardening.train.changes import listing
from rampart.hardening.train.shards import is_sharded, list_samples, shards_of
from rampart.proposal import stored_side
from rampart.sources import Source


def png(image: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.numpy()).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as packed:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    return path


def samples(images: Images, first: int = 0) -> dict[str, bytes]:
    """Each picture and its label, as `webdataset` writes them."""
    return {
        name: content
        for row, label in enumerate(images.label.tolist())
        for name, content in (
            (f"{first + row:05d}.png", png(images.image[row])),
            (f"{first + row:05d}.cls", str(label).encode()),
        )
    }


def sharded(folder: Path, images: Images, *, each: int = 10, names: bool = True) -> Path:
    """`images` in shards of `each`, with the names of their classes."""
    for number, first in enumerate(range(0, len(images), each)):
        part = images[slice(first, first + each)]
        shard(folder / f"train-{number:03d}.tar", samples(part, first))
    if names:
        (folder / "classnames.txt").write_text("\n".join(images.classes) + "\n")
    return folder


def test_shards_are_read_in_order_and_give_the_pixels_labels_and_classes_of_a_folder(
    tmp_path: Path,
) -> None:
    images = blobs(25, size=32)
    path = sharded(tmp_path / "shards", images)
    found = data.load(path)
    assert torch.equal(found.image, images.image) and torch.equal(found.label, images.label)
    assert found.classes == images.classes
    assert found.paths[:2] == ("train-000.tar/00000.png", "train-000.tar/00001.png")
    assert len(data.load(path / "train-002.tar")) == 5
    assert len(data.load(path / "train-00[01].tar")) == 20
    assert len(data.load(path / "train-{000..001}.tar")) == 20
    assert stored_side(path) == 32
    inputs.images(path), inputs.images(path / "train-*.tar")
    _, survey = data.survey(path, size=32)
    assert survey.name == "shards" and survey.lines(32)[0].startswith("shards: 25 images, 10")


def test_the_same_images_are_held_out_of_shards_as_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = blobs(300, size=16)
    path = sharded(tmp_path / "shards", images, each=100)
    expected = images.hold_out()
    monkeypatch.setattr(data, "MEMORY", 0)
    streamed = data.load_training(path, size=16)
    assert isinstance(streamed, data.Folder)
    train, held = streamed.hold_out()
    assert torch.equal(held.images.image, expected[1].images.image)
    own = Images(images.image[40:90], images.label[40:90], images.classes)  # without names
    fewer, _ = streamed.hold_out(own)
    assert len(fewer) == 250 and fewer.unlike(own).all() and not streamed.unlike(own)[40:90].any()
    store = train.stored(tmp_path / "run")
    for _ in range(2):  # decoded, then from the store
        batches = list(data.shuffled(store, 50, seed=0, epoch=1))
        plain = list(data.shuffled(expected[0], 50, seed=0, epoch=1))
        for one, other in zip(batches, plain, strict=True):
            assert torch.equal(one.x, other.x) and torch.equal(one.label, other.label)
    assert len({streamed.digest(), train.digest(), data.load_training(path, size=8).digest()}) == 3
    size = len(png(images.image[0]))
    assert listing([streamed])["train-000.tar/00000.png"].startswith(f"{size} ")


@pytest.mark.parametrize(
    ("ending", "content", "label"),
    [
        ("cls", b" 1\n", "cat"),
        ("cls", b"cat", "cat"),
        ("json", b'{"label": 1}', "cat"),
        ("json", b'{"label": "cat", "width": 3}', "cat"),
        ("json", b'{"cls": 0}', "bird"),
        ("json", b"1", "cat"),
        ("JSON", b'{"label": "1"}', "cat"),
    ],
)
def test_a_label_is_a_number_or_a_name_in_cls_or_json(
    ending: str, content: bytes, label: str, tmp_path: Path
) -> None:
    picture = png(blobs(1).image[0])
    files = {
        f"set/a.{ending}": content,
        "set/b.seg.png": b"",
        "set/b.txt": b"",
        "set/a.png": picture,
    }
    shard(tmp_path / "0.tar", files)
    (tmp_path / "classnames.txt").write_text("bird\ncat\n")
    found, survey = data.survey(tmp_path, size=32)
    assert [found.classes[i] for i in found.label.tolist()] == [label]
    assert survey.left_out == ["1 samples without a picture"]


def test_without_a_list_classes_are_the_names_or_the_numbers_up_to_the_highest(
    tmp_path: Path,
) -> None:
    picture = png(blobs(1).image[0])
    named = shard(
        tmp_path / "a.tar", {"1.png": picture, "1.cls": b"dog", "2.png": picture, "2.cls": b"ant"}
    )
    assert data.load(named).classes == ("ant", "dog")
    assert data.load(named).label.tolist() == [1, 0]
    counted = shard(tmp_path / "b.tar", {"1.png": picture, "1.cls": b"2"})
    assert data.load(counted).classes == ("0", "1", "2")
    mixed = shard(
        tmp_path / "c.tar", {"1.png": picture, "1.cls": b"2", "2.png": picture, "2.cls": b"x"}
    )
    with pytest.raises(ValueError, match=r"some labels are numbers \(2\), others are names \(x\)"):
        data.load(mixed)
    many = shard(tmp_path / "d.tar", {"1.png": picture, "1.cls": b"9999999"})
    with pytest.raises(ValueError, match="a label is 9999999"):
        data.load(many)


def spoiled(folder: Path) -> Path:
    """30 good samples, and six bad ones in two shards."""
    path = sharded(folder, blobs(30), each=30)
    good = png(blobs(1).image[0])
    bad = {
        "a.png": good[:60], "a.cls": b"1",  # cut
        "b.png": good,  # no label
        "c.png": good, "c.cls": b"77",  # no such class
        "d.png": good, "d.cls": b"\xff",
        "e.png": good, "e.jpg": good, "e.cls": b"0",
    }  # fmt: skip
    shard(path / "train-001.tar", bad)
    whole = shard(path / "train-002.tar", samples(blobs(4))).read_bytes()
    (path / "train-002.tar").write_bytes(whole[:1000])  # in the first picture
    return path


NAMED = (
    "train-001.tar: a.png: ", "train-001.tar: b has no label: add b.cls",
    "train-001.tar: c.png has the label 77, none of the 10 classes",
    "train-001.tar: d.cls is not a label as text or JSON",
    "train-001.tar: e has 2 pictures: keep one",
    "train-002.tar is truncated", "train-002.tar: 00000 has no label",
)  # fmt: skip


@pytest.mark.parametrize("memory", [data.MEMORY, 0])
def test_bad_samples_are_named_all_at_once_by_shard_and_member_or_left_out(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MEMORY", memory)
    path = spoiled(tmp_path / "shards")
    with pytest.raises(ValueError, match="7 of 37 pictures cannot be read") as caught:
        data.survey(path, size=32, stream=True)
    assert all(f"{path}/{name}" in str(caught.value) for name in NAMED)
    found, survey = data.survey(path, size=32, stream=True, skip_bad=True)
    assert len(found) == 30 and survey.left_out == ["7 that cannot be read"]


def test_what_is_no_shard_to_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    picture = png(blobs(1).image[0])
    plain = shard(tmp_path / "plain" / "x.tar", {"cat/1.png": picture, "dog/2.png": picture})
    with pytest.raises(
        ValueError, match=r"no labelled picture.*Unpack a tar that holds class folders"
    ):
        data.load(plain)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.tar\.gz is compressed.*unpack it to a plain \.tar"):
        data.load(packed)
    (tmp_path / "false.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"false\.tar is not a tar file"):
        data.load(tmp_path / "false.tar")
    for name in ("missing-*.tar", "missing.tar", "plain/{0..1}.tar"):
        with pytest.raises(FileNotFoundError, match="no shard at"):
            inputs.images(tmp_path / name)
    both = sharded(tmp_path / "both", blobs(20))
    shard(both / "val-000.tar", samples(blobs(4)))
    with pytest.raises(ValueError, match=r"several splits \(train, val\): pass those of one, as '"):
        data.load(both)


def test_class_folders_beside_a_shard_are_read_as_folders(tmp_path: Path) -> None:
    shard(tmp_path / "cat.tar", samples(blobs(2)))
    assert is_sharded(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(png(blobs(1).image[0]))
    assert not is_sharded(tmp_path)
    assert len(data.load(tmp_path)) == 1


def test_held_out_shards_are_not_among_those_of_training(tmp_path: Path) -> None:
    path = sharded(tmp_path / "shards", blobs(400, size=16), each=100)
    with pytest.raises(ValueError, match="training would use its images"):
        Source(path, path / "train-003.tar").read(16)
    with pytest.raises(ValueError, match="training would use its images"):
        Source(path / "train-*.tar", path / "train-00[3].tar").read(16)
    train, held = Source(path / "train-00[012].tar", path / "train-003.tar").read(16)
    assert len(held) == 100 and len(train) == 300


def test_a_shard_that_is_cut_while_training_is_named_with_the_member(tmp_path: Path) -> None:
    path = sharded(tmp_path / "shards", blobs(4), names=False)
    found = list_samples(shards_of(path))
    file = path / "train-000.tar"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"train-000\.tar: 00003\.png: "):
        decoding.read_picture(found.members[3], 32)


def test_labels_in_json_that_are_none_are_named(tmp_path: Path) -> None:
    picture = png(blobs(1).image[0])
    for number, content in enumerate(({}, {"label": True}, {"label": -1}, {"label": [1]}, "")):
        file = shard(
            tmp_path / f"{number}.tar",
            {"a.png": picture, "a.json": json.dumps(content).encode()},
        )
        with pytest.raises(ValueError, match=r"a\.json holds no label: expected the number"):
            data.load(file)


# Trains an epoch on each of some folders of shards; prints the most memory of its own that each
# took, in kB. What lies in files, as the store does, the system takes back where it needs room.
# What malloc keeps of freed memory is no picture's: it grows with the steps, so it goes back first.
TRAINING = """
import ctypes, sys, threading, time
from pathlib import Path
import torch
import rampart as rp
from rampart.hardening.train import data

def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def watch():
    while True:
        ctypes.CDLL(None).malloc_trim(0)
        peak[0] = max(peak[0], own())
        time.sleep(0.02)

peak = [0]
threading.Thread(target=watch, daemon=True).start()
torch.set_num_threads(1)
for number, path in enumerate(sys.argv[1:]):
    peak[0], data.MEMORY = 0, 2**20
    train, held = rp.load_images(path, size=32).hold_out(data.load(Path(path).parent / "held.npz"))
    config = rp.ClassifierConfig("resnet10", 10, width=0.125, image_size=32)
    recipe = rp.Recipe("standard", epochs=1, batch_size=256)
    out = f"{path}-run{number}"
    net = rp.Classifier(config)
    rp.train(net, train, held.validation, recipe, out=out, device="cpu", anyway=True)
    print(f"peak {peak[0]} of {len(train)}")
"""


@pytest.mark.slow
def test_shards_and_a_file_of_the_same_images_give_the_same_calibration_and_figures(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = blobs(420)
    classifier = pipelines.load(tiny_folder / "weights.safetensors", "lean")[0].classifier
    config = {"classifier": classifier.config._asdict()}
    checkpoint.save(tmp_path / "c.safetensors", classifier, config)
    arrays = {"image": images.image, "label": images.label, "classes": images.classes}
    monkeypatch.setattr(data, "MEMORY", 2**20)  # shards stay on disk
    np.savez(tmp_path / "file.npz", **arrays)
    sharded(tmp_path / "shards", images, each=100)
    monkeypatch.setattr("rampart.model.to_engine", InTorch)
    found = []
    for source in (tmp_path / "file.npz", tmp_path / "shards"):
        model = tmp_path / f"by-{source.name}"
        run("calibrate", model, "--data", source, "--classifier", tmp_path / "c.safetensors")
        words = ["--rung", "pgd20", "--limit", 12, "--device", "cpu", "--cache", tmp_path / "found"]
        run("evaluate", model, "--images", source, *words)
        rows = read_card(model, MEASURED)["metrics"]
        figures = [{k: v for k, v in row.items() if k not in ("data", "command")} for row in rows]
        files = [file for file in model.iterdir() if file.suffix in (".npy", ".safetensors")]
        table = json.loads((model / "calibration-lean.json").read_text())
        assert table.pop("data") == f"{source.name}, calibration split"
        found.append((figures, table, {file.name: file.read_bytes() for file in files}))
    assert found[0] == found[1]
    assert {row["n"] for row in found[0][0]} == {12} and found[0][2]
    with pytest.raises(ValueError, match=r"420 images from train-000.tar/00000.png on do not fit"):
        run("evaluate", model, "--images", tmp_path / "shards", "--rung", "pgd20")


# Reads what calibration and evaluation take of folders of shards; prints as TRAINING does.
MEASURING = (
    TRAINING.partition("for number")[0]
    + """
from rampart import studies
from rampart.sources import Source, sample_of

model, held, *paths = sys.argv[1:]
model = rp.Model.load(model)
for path in map(Path, paths):
    peak[0], data.MEMORY = 0, 2**20
    train, apart = Source(path, Path(held)).read(32)
    rp.Model.calibrate(model.classifier, apart)
    few = sample_of(model, Source(path), limit=100).images
    study = studies.Study(device="cpu")
    found = studies.alarms(model, Source(path, Path(held)), study, limit=100, unlike=[path])
    assert f"| {path.name} | {len(train)} |" in found.lines[1], found.lines[1]
    print(f"peak {peak[0]} of {len(train)}")
"""
)


def peaks(code: str, *words: object) -> Sequence[tuple[float, int]]:
    """MB and images of each line that `code` prints."""
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith("peak")]
    return [(int(line[1]) / 1e3, int(line[3])) for line in lines]


CLASSIFIER = {"arch": "resnet10", "classes": 10, "width": 0.125, "image_size": 32}


@pytest.mark.slow
def test_memory_stays_flat_when_ten_times_the_shards_are_calibrated_and_measured_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    few = samples(blobs(256, size=32))
    for name, shards in (("small", 4), ("large", 40)):
        for number in range(shards):
            shard(tmp_path / name / f"{number:03d}.tar", few)
    held = sharded(tmp_path / "held", blobs(400, seed=1), names=False)
    lean = shutil.ignore_patterns("calibration-full.json")
    model = shutil.copytree(tiny_folder, tmp_path / "model", ignore=lean)
    content = {"data": "blobs", "training": {}, "calibration_images": 100, "commands": []}
    write_card(model, {"model": "tiny", "classifier": CLASSIFIER, **content})
    folders = [tmp_path / name for name in ("small", "small", "large")]  # the first warms up
    _, small, large = peaks(MEASURING, model, held, *folders)
    assert (small[1], large[1]) == (1024, 10240)
    assert large[0] - small[0] < 14  # half of what the pixels more take


@pytest.mark.slow
def test_memory_stays_flat_when_an_epoch_is_trained_on_ten_times_the_shards(
    tmp_path: Path,
) -> None:
    few = samples(blobs(256, size=32))
    for name, shards in (("small", 8), ("large", 80)):
        for number in range(shards):
            shard(tmp_path / name / f"{number:03d}.tar", few)
    held = blobs(256, size=32, seed=1)
    parts = {"image": held.image.numpy(), "label": held.label.numpy()}
    np.savez(tmp_path / "held.npz", **parts, classes=[str(i) for i in range(10)])
    folders = [tmp_path / name for name in ("small", "small", "large")]  # the first warms up
    _, small, large = peaks(TRAINING, *folders)
    assert (small[1], large[1]) == (2048, 20480)
    pixels = 18432 * 32 * 32 * 3 / 1e6  # 57 MB more
    assert large[0] - small[0] < pixels / 2


def test_shards_whose_members_swap_labels_are_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MEMORY", 0)  # they stay on disk
    images, digests = blobs(4), []
    for label in ([0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1]):
        one = Images(images.image, torch.tensor(label), ("a", "b"))
        file = shard(tmp_path / "a.tar", samples(one))
        streamed, _ = data.survey(file, size=32, stream=True)
        assert isinstance(streamed, data.Folder)
        digests.append(streamed.digest())
    assert digests[0] == digests[2] != digests[1]
