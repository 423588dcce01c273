import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from PIL import Image

from rampart.hardening.model.images import SPLITS, Images, batches, split
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.train import cifar10, data, decoding, digits


def save_npz(path: Path, count: int) -> Images:
    images = blobs(count)
    np.savez(path, image=images.image.numpy(), label=images.label.numpy())
    return images


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that ends amid the file, in place of CIFAR-10's."""

    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(cifar10.torchvision.datasets.CIFAR10, "url", url)
        yield url
        server.shutdown()


@pytest.mark.parametrize("there", [False, True])
def test_a_download_that_fails_says_what_to_fetch_by_hand_and_leaves_nothing(
    tmp_path: Path, cut_off: str, there: bool
) -> None:
    home = tmp_path / "cifar10"
    if there:
        home.mkdir()
    with pytest.raises(OSError, match=r"get http.*gz by hand, put it into .*cifar10, and run") as e:
        cifar10.download(home)
    assert "c58f30108f718f92721af3b95e74349a" in str(e.value)
    assert list(tmp_path.rglob("*")) == ([home] if there else [])


def test_without_a_network_a_file_that_was_put_there_by_hand_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10.torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:1/c.tar.gz")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut")
    with pytest.raises(OSError, match=r"cannot be fetched .*refused"):
        cifar10.download(tmp_path)
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"cut"
    assert len(list(tmp_path.iterdir())) == 1


def test_batches_that_are_not_whole_are_told_with_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="is incomplete: remove it, and fetch it again"):
        data.load(tmp_path)


def test_an_npz_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = save_npz(tmp_path / "a.npz", 12)
    loaded = data.load(tmp_path / "a.npz")
    assert torch.equal(loaded.image, saved.image)
    assert torch.equal(loaded.label, saved.label)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 8, 8, 3), np.uint8)}, "lacks"),
        ({"image": np.zeros((2, 8, 8, 3)), "label": np.zeros(2)}, "must be uint8"),
        ({"image": np.zeros((2, 8, 8, 3), np.uint8), "label": np.zeros(3)}, "2 images"),
        (
            {"image": np.zeros((1, 8, 8, 3), np.uint8), "label": [2], "classes": ["a", "b"]},
            "outside the 2 classes",
        ),
    ],
)
def test_a_wrong_npz_names_the_file_and_the_fault(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        data.load(tmp_path / "bad.npz")


def test_a_cut_npz_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "cut.npz"
    np.savez(file, image=np.zeros((9, 8, 8, 3), np.uint8), label=np.zeros(9))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"cut\.npz is truncated or damaged .*: copy or save it again"
    ):
        data.load(file)


def test_missing_data_names_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rampart download"):
        data.load(tmp_path / "nowhere")


def test_an_image_folder_is_read_by_class_and_brought_to_size(tmp_path: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 20), colour).save(tmp_path / name / "one.png")
    images = data.load(tmp_path, size=16)
    assert images.classes == ("blue", "red")
    assert images.image.shape == (2, 16, 16, 3)
    assert images.image[1, 8, 8].tolist() == [255, 0, 0]
    assert images.paths[1] == f"{tmp_path.name}/red/one.png"


def test_a_broken_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"broken\.png"):
        data.load(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "endless", "nothing", "huge"])
def test_what_is_no_plain_picture_file_is_named_and_not_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a" / "deep" / "x.jpg"
    file.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "huge":
        with file.open("wb") as stream:
            stream.truncate(300_000_000)
    else:
        file.symlink_to("/dev/zero" if kind == "endless" else "nowhere")
    with pytest.raises(ValueError, match=r"deep/x\.jpg.*: remove it"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match=r"deep/x\.jpg"):
        decoding.read_picture(file, 32)


def test_links_to_pictures_are_read_and_circles_of_folders_are_not_walked(tmp_path: Path) -> None:
    home = tmp_path / "data" / "cat"
    (home / "named.jpg").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "elsewhere.png")
    (home / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (home / "named.jpg" / "circle").symlink_to(home)
    (tmp_path / "data" / "dog").symlink_to(home)
    images = data.load(tmp_path / "data")
    assert images.paths == ("data/cat/link.png", "data/dog/link.png")
    assert images.image[0, 0, 0].tolist() == [255, 0, 0]


def test_an_empty_folder_says_what_layout_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CLASS/NAME"):
        data.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*align should be passed:Warning")
def test_official_cifar10_batches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": cifar10.CLASSES}))
    # torchvision compares the files with the official digests, which these are not.
    cifar = cifar10.torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    assert len(data.load(tmp_path)) == 10
    test = data.load(tmp_path, train=False)
    assert test.label.tolist() == [3, 7]
    # The official rows are channel by channel.
    assert test.image[0, 0, 0].tolist() == [pixels[0, 0], pixels[0, 1024], pixels[0, 2048]]


def test_the_split_is_1500_1000_2670_of_5170_in_order() -> None:
    images = Images(torch.arange(5170)[:, None], torch.arange(5170) % 2, ("a", "b"))
    parts = {name: split(images, name).image for name in SPLITS}
    assert [len(part) for part in parts.values()] == [1500, 1000, 2670]
    assert torch.equal(torch.cat(list(parts.values())), images.image)


@pytest.mark.parametrize(
    "order",
    [range(10), (3, 1, 2, 0, 9, 8, 7, 6, 5, 4), (*range(10), 3)],
    ids=["1", "2", "one more"],
)
def test_each_split_of_images_that_lie_by_class_has_every_class(order: Sequence[int]) -> None:
    label = torch.tensor(order).repeat_interleave(60)[:600]
    label[-1] = order[-1]  # a stray one
    images = Images(torch.arange(600)[:, None], label, tuple("abcdefghij"))
    parts = [split(images, name) for name in SPLITS]
    assert all(set(part.label.tolist()) == set(range(10)) for part in parts)
    assert sorted(torch.cat([part.image for part in parts]).flatten().tolist()) == [*range(600)]
    assert torch.equal(split(images, "tuning").image, parts[1].image)


def test_twins_of_held_out_images_leave_training() -> None:
    names = tuple(f"train/cat/{i}.jpg" for i in range(6))
    pixels = torch.arange(6 * 12, dtype=torch.uint8).view(6, 2, 2, 3)
    train = Images(pixels, torch.arange(6), ("cat",), names)
    kept, held = data.hold_out(train, train[torch.tensor([1, 4])])
    assert kept.label.tolist() == [0, 2, 3, 5]
    assert held.label.tolist() == [1, 4]


def test_held_out_pixels_leave_training_under_any_name() -> None:
    images = blobs(20)
    kept, _ = data.hold_out(images, images[torch.tensor([3, 7])])
    assert torch.equal(kept.label, images.label[[i for i in range(20) if i not in (3, 7)]])


def test_twins_that_cannot_be_found_stop_the_run() -> None:
    images, other = blobs(4), blobs(2, seed=1)
    held = Images(other.image, other.label, other.classes, ("train/a/1.jpg", "train/a/2.jpg"))
    with pytest.raises(ValueError, match=r"train/a/1\.jpg.*none of them"):
        data.hold_out(images, held)


def test_other_classes_in_the_held_out_set_stop_the_run() -> None:
    images = blobs(4)
    with pytest.raises(ValueError, match="classes differ"):
        data.hold_out(images, Images(images.image, images.label, ("a", "b")))


def test_images_of_another_size_than_the_models_are_refused(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", 2)
    with pytest.raises(ValueError, match="32x32 images, but the model takes 64x64"):
        data.load(tmp_path / "a.npz", size=64)


def test_a_folder_of_splits_is_not_taken_for_one_of_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "cat" / "one.png")
    with pytest.raises(ValueError, match="splits, not classes"):
        data.load(tmp_path)


def test_a_few_of_a_sorted_set_are_spread_over_all_of_it() -> None:
    images = Images(torch.arange(100)[:, None], torch.arange(100), ("a",))
    assert data.spread(images, 4).label.tolist() == [0, 25, 50, 75]
    assert len(data.spread(images, None)) == len(data.spread(images, 1000)) == 100


def test_a_tenth_is_held_out_where_nothing_else_is_given() -> None:
    images = Images(torch.arange(95)[:, None], torch.arange(95), ("a",))
    train, held = data.hold_out(images, None)
    assert (len(train), len(held)) == (85, 10)
    assert sorted([*train.label.tolist(), *held.label.tolist()]) == list(range(95))


def test_what_has_the_pixels_of_the_held_out_tenth_is_not_trained_on() -> None:
    images = Images(torch.arange(190)[:, None] // 2, torch.arange(190), ("a",))
    train, held = data.hold_out(images, None)
    assert len(held) == 19 and len(train) < 190 - 19
    assert not {*train.image.flatten().tolist()} & {*held.image.flatten().tolist()}


def test_pixels_survive_the_way_to_float_and_back() -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(image)), image)


def test_training_batches_are_shuffled_whole_and_follow_from_seed_and_epoch() -> None:
    images = blobs(70)
    runs = [
        list(data.shuffled(images, 32, seed=seed, epoch=epoch))
        for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert [len(batch.x) for batch in runs[0]] == [32, 32]
    x = [torch.cat([batch.x for batch in run]) for run in runs]
    assert torch.equal(x[0], x[1])
    assert not any(torch.equal(x[0], other) for other in x[2:])
    labels = [torch.cat([batch.label for batch in run]) for run in runs]
    assert not any(torch.equal(labels[0], other) for other in labels[2:])


def test_skipped_batches_change_nothing_in_those_that_follow() -> None:
    images = blobs(70)
    whole = list(data.shuffled(images, 16, seed=3, epoch=2))
    rest = list(data.shuffled(images, 16, seed=3, epoch=2, skip=3))
    assert len(rest) == 1
    assert torch.equal(rest[0].x, whole[3].x)
    assert torch.equal(rest[0].noise.uniform(4), whole[3].noise.uniform(4))


def test_without_flips_left_stays_left() -> None:
    ramp = torch.arange(16, dtype=torch.uint8).mul(16).expand(16, 16)
    images = Images(ramp[None, :, :, None].repeat(64, 1, 1, 3), torch.zeros(64).long(), ("a",))

    def rises(*names: str) -> set[bool]:
        (batch,) = data.shuffled(images, 64, seed=0, epoch=0, augmentations=names)
        middle = batch.x[:, 0, 8, 5:11]
        return set((middle.diff() > 0).all(1).tolist())

    assert rises("crop") == {True}
    assert rises("flip", "crop") == {True, False}


def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch() -> None:
    small, large = (
        torch.cat([b.x for b in data.shuffled(blobs(64), size, seed=0, epoch=0)])
        for size in (8, 32)
    )
    assert torch.equal(small, large)


def picture_folder(path: Path, count: int) -> Path:
    for i, pixels in enumerate(blobs(count).image.numpy()):
        (path / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / f"class{i % 2}" / f"{i:03}.png")
    return path


def test_a_folder_that_fills_memory_is_read_while_training_and_gives_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture_folder(tmp_path / "pictures", 40)
    held = data.hold_out(data.load_training(path, size=32), None)
    whole = 40 * 32 * 32 * 3
    monkeypatch.setattr(data.distributed, "beside", lambda: 8)
    monkeypatch.setattr(data, "MEMORY", whole)  # whatever the number of processes
    assert isinstance(data.load_training(path, size=32), Images)
    monkeypatch.setattr(data, "MEMORY", whole - 1)
    streamed = data.load_training(path, size=32)
    assert isinstance(streamed, data.Folder)
    again = data.hold_out(streamed, None)
    assert isinstance(again[0], data.Folder)
    assert torch.equal(again[1].image, held[1].image)
    for one, other in zip(
        data.shuffled(again[0], 12, seed=0, epoch=1),
        data.shuffled(held[0], 12, seed=0, epoch=1),
        strict=True,
    ):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.label, other.label)


def test_pictures_that_were_decoded_once_are_read_from_the_store_by_every_process(
    tmp_path: Path,
) -> None:
    path = picture_folder(tmp_path / "pictures", 40)
    run, rows = tmp_path / "run", torch.split(torch.randperm(40), 7)
    plain = data.find_pictures(path, size=16)
    folder, beside = plain.stored(run), plain.stored(run)
    first = list(folder.read(rows[:3]))  # 21 of them
    (file,) = run.iterdir()
    assert file.stat().st_size == 40 * (16 * 16 * 3 + 1)
    expected = dict(zip(range(40), plain.whole().image, strict=True))
    for picture in plain.files:
        if plain.files.index(picture) in torch.cat(rows[:3]).tolist():
            picture.write_bytes(b"gone bad")
    for pixels in (first, list(beside.read(rows[:3]))):
        for index, (image, label) in zip(rows, pixels, strict=False):
            assert torch.equal(image, torch.stack([expected[row] for row in index.tolist()]))
            assert torch.equal(label, plain.label[index])
    with pytest.raises(ValueError, match="not a JPEG"):
        list(plain.read(rows[:3]))
    assert beside.store and not beside.store.marks.all()
    assert [image.shape[0] for image, _ in beside.read(rows)] == [7, 7, 7, 7, 7, 5]
    assert folder.store and folder.store.marks.all()  # what the other one decoded
    assert folder[torch.arange(3)].store is None  # whose rows are others


def test_a_store_makes_room_for_that_of_other_pictures_and_spares_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    folder = data.find_pictures(picture_folder(tmp_path / "pictures", 40), size=16).stored(run)
    assert folder.store
    fewer = data.find_pictures(picture_folder(tmp_path / "fewer", 30), size=16).stored(run)
    assert fewer.store and list(run.iterdir()) == [fewer.store.file]
    full = shutil.disk_usage(tmp_path)._replace(free=30 * 16 * 16 * 3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert fewer.stored(run).store  # which is there
    assert data.find_pictures(tmp_path / "fewer", size=16).stored(tmp_path / "b").store is None


def test_a_picture_that_breaks_while_training_is_named(tmp_path: Path) -> None:
    path = picture_folder(tmp_path / "pictures", 4)
    folder = data.find_pictures(path, size=32)
    (path / "class1" / "003.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"class1/003\.png"):
        list(data.shuffled(folder, 4, seed=0, epoch=0))


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    (batch,) = data.shuffled(blobs(5), 16, seed=0, epoch=0)
    assert len(batch.x) == 5


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    path = picture_folder(tmp_path / "pictures", 4)
    before = data.find_pictures(path, size=32).digest()
    os.utime(path / "class0" / "000.png", (1, 1))  # as a copy on another machine may have it
    assert data.find_pictures(path, size=32).digest() == before
    (path / "class0" / "000.png").write_bytes(b"other")
    assert data.find_pictures(path, size=32).digest() != before


def test_of_a_folder_only_the_chosen_pictures_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, image in enumerate(blobs(6).image.numpy()):
        Image.fromarray(image).save(tmp_path / "a" / f"{number}.png")
    folder = data.find_pictures(tmp_path, size=32)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    few = data.spread(folder, 3)
    assert torch.equal(few.image, blobs(6).image[::2])
    assert [Path(path).name for path in few.paths] == ["0.png", "2.png", "4.png"]


def test_digits_are_three_disjoint_files_that_load(tmp_path: Path) -> None:
    counts = digits.write(tmp_path / "digits")
    assert counts == {"train": 1097, "held": 400, "test": 300}
    parts = [data.load(tmp_path / "digits" / f"{name}.npz") for name in counts]
    for part in parts:
        assert part.image.shape[1:] == (32, 32, 3)
        assert part.classes == tuple("0123456789")
        assert torch.bincount(part.label).min() > 20
        assert part.image.max() == 255
    pixels = [image.tobytes() for part in parts for image in part.image.numpy()]
    assert len(set(pixels)) == 1797


def test_plain_batches_cover_every_image_in_order() -> None:
    images = blobs(70)
    assert torch.equal(torch.cat([y for _, y in batches(images, 32)]), images.label)


def test_the_cifar10_files_hold_the_documented_split(rampart_data: Path) -> None:
    held = data.load(rampart_data / "cifar10-train-lossless.npz")
    assert [len(split(held, name)) for name in SPLITS] == [1500, 1000, 2670]
    assert held.classes == cifar10.CLASSES
    assert len(set(held.paths)) == 5170
    assert len(data.load(rampart_data / "cifar10-test-lossless.npz")) == 617


@pytest.mark.slow
@pytest.mark.training
def test_no_image_is_in_two_splits(rampart_data: Path, tmp_path: Path) -> None:
    test = data.load(rampart_data / "cifar10-test-lossless.npz")
    with tarfile.open(rampart_data / "cifar10-jpeg.tar.xz") as packed:
        for member in packed:  # `extractall` takes twice as long
            if member.isfile() and (member.name.startswith("train/") or member.name in test.paths):
                content, file = packed.extractfile(member), tmp_path / member.name
                assert content is not None
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read())
    every = data.find_pictures(tmp_path / "train", size=32)
    held = data.load(rampart_data / "cifar10-train-lossless.npz")
    train, held = data.hold_out(every, held)
    parts = {name: split(held, name) for name in SPLITS} | {"test": test}
    assert [len(part) for part in parts.values()] == [1500, 1000, 2670, 617]
    # Training images are JPEGs: as files they differ from the others' JPEG twins, and as pixels
    # from the lossless ones.
    hashes = {
        name: {digest((tmp_path / path).read_bytes()) for path in part.paths}
        | {digest(image.tobytes()) for image in part.image.numpy()}
        for name, part in parts.items()
    }
    assert isinstance(train, data.Folder)
    hashes["training"] = {digest(file.read_bytes()) for file in train.files}
    for file in train.files:
        with Image.open(file) as picture:
            hashes["training"].add(digest(picture.convert("RGB").tobytes()))
    for one, two in combinations(hashes, 2):
        assert not hashes[one] & hashes[two], (one, two)


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
