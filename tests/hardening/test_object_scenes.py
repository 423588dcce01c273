"""Pictures with boxes: layouts, what is wrong with boxes, parts, batches and augmentation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import CLASSES, annotation, write_coco, write_voc
from PIL import Image

from rampart.handlers.image import View, examine, framed, letterbox, view_of
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.jitter import JITTERS, check_jitters, jitter
from rampart.hardening.objects.places import has_boxes
from rampart.hardening.objects.scenes import Lessons, Scenes, divided


def test_voc_and_coco_tell_the_same_of_the_same_scenes(tmp_path: Path) -> None:
    voc = divided(write_voc(tmp_path / "voc", 12))
    coco = divided(write_coco(tmp_path / "coco", 12))
    assert voc.train.classes == coco.train.classes == CLASSES
    for one, other in zip(
        voc.train.scenes + voc.validation.scenes,
        coco.train.scenes + coco.validation.scenes,
        strict=True,
    ):
        assert one.picture.name == other.picture.name
        assert one.boxes == other.boxes and one.labels == other.labels
    assert has_boxes(tmp_path / "voc") and has_boxes(tmp_path / "coco")
    assert not has_boxes(tmp_path / "voc" / "JPEGImages")


def test_a_folder_that_holds_the_layout_is_taken_as_the_layout(tmp_path: Path) -> None:
    write_voc(tmp_path / "outer" / "VOC2007", 4)
    assert len(divided(tmp_path / "outer").train) == 2


def test_boxes_lie_on_what_was_drawn(tmp_path: Path) -> None:
    data = divided(write_voc(tmp_path, 6)).train
    pixels, truth = data.picture(1)
    for (x1, y1, x2, y2), label in zip(truth.boxes.int().tolist(), truth.labels, strict=True):
        inner = pixels[y1:y2, x1:x2].reshape(-1, 3)
        strongest = 2 if label else 0
        middle = pixels[(y1 + y2) // 2, (x1 + x2) // 2]
        assert middle.argmax() == strongest
        if label:  # a square fills its box, and nothing beyond
            assert (inner == (120, 120, 200)).all()
            assert pixels[y1:y2, min(x2, 95)].min() > 100 or x2 >= 96


def test_letterboxed_scenes_hold_their_objects(tmp_path: Path) -> None:
    boxed = divided(write_voc(tmp_path, 8)).train.boxed(192)
    assert boxed.image.shape[1:] == (192, 192, 3) and boxed.image.dtype == torch.uint8
    for image, truth in zip(boxed.image, boxed.truth, strict=True):
        for box, label in zip(truth.boxes, truth.labels, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).int().tolist()
            assert int(image[y, x].argmax()) == (2 if label else 0)
    place = boxed.places[0]
    assert (place.scale, place.left, place.top) == (2, 0, 16)


def test_a_large_jpeg_is_held_out_as_the_endpoint_sees_it(tmp_path: Path) -> None:
    write_voc(tmp_path, 2)
    file, noise = tmp_path / "JPEGImages" / "s001.jpg", np.random.default_rng(0)
    pixels = noise.integers(0, 256, (720, 960, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, quality=95)
    found = [("disc", 97, 49, 480, 360)]
    (tmp_path / "Annotations" / "s001.xml").write_text(annotation(file.name, 960, 720, found))
    data = divided(tmp_path)
    (scenes,) = (part for part in data.parts().values() if part.scenes[0].picture == file)
    boxed = scenes.boxed(128)
    view = view_of(examine(file.read_bytes(), 128), 128, framed)
    assert isinstance(view, View) and (boxed.image[0].numpy() == view.pixels).all()
    whole, _ = letterbox(scenes.picture(0)[0], 128)
    assert (whole != view.pixels).any()  # the decoder has reduced it
    assert boxed.truth[0].boxes[0].tolist() == pytest.approx([12.8, 22.4, 64, 64])


def test_transparent_pixels_are_told_with_the_file_and_left_out_on_request(tmp_path: Path) -> None:
    write_voc(tmp_path, 3, parts={"train": range(3), "val": range(1)})
    file = tmp_path / "JPEGImages" / "s001.png"
    with Image.open(file) as picture:
        alpha = picture.convert("RGBA")
    alpha.save(file)
    assert not divided(tmp_path).left_out  # opaque all over
    scenes = divided(tmp_path).train
    alpha.putpixel((0, 0), (0, 0, 0, 0))
    alpha.save(file)
    with pytest.raises(ValueError, match=r"s001\.png: the image has transparent pixels"):
        divided(tmp_path)
    assert "s001.png" in divided(tmp_path, skip_bad=True).left_out[0]
    for read in (lambda: scenes.picture(1), lambda: scenes.boxed(128)):
        with pytest.raises(ValueError, match=r"s001\.png: the image has transparent pixels"):
            read()


def test_the_layouts_own_parts_are_kept(tmp_path: Path) -> None:
    parts = {"train": range(5), "val": range(5, 8), "test": range(8, 10), "trainval": range(8)}
    data = divided(write_voc(tmp_path, 10, parts=parts))
    assert data.test is not None
    names = [[scene.picture.stem for scene in part.scenes] for part in data[:3]]
    assert names[1] == ["s005", "s006", "s007"] and names[2] == ["s008", "s009"]
    assert len(names[0]) == 5


def test_parts_by_digest_stay_when_pictures_are_added(tmp_path: Path) -> None:
    few = divided(write_voc(tmp_path / "few", 20))
    assert len(few.validation) == 10 and few.test is None
    many = divided(write_voc(tmp_path / "many", 30))
    held = {scene.picture.name for scene in many.validation.scenes}
    assert held & {scene.picture.name for scene in few.validation.scenes}
    assert not held & {scene.picture.name for scene in many.train.scenes}


def test_all_bad_boxes_are_told_at_once_by_file_and_number(tmp_path: Path) -> None:
    write_voc(tmp_path, 6)
    good = ("disc", 5, 5, 30, 30)
    (tmp_path / "Annotations/s001.xml").write_text(
        annotation("s001.png", 96, 80, [good, ("disc", 9, 9, 9, 30), ("disc", 50, 5, 120, 30)])
    )
    (tmp_path / "Annotations/s002.xml").write_text(
        annotation("s002.png", 640, 480, [("disc", 5, 5, 30, 30)])
    )
    (tmp_path / "JPEGImages/s003.png").unlink()
    (tmp_path / "JPEGImages/s004.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^5 boxes or pictures to put right") as error:
        divided(tmp_path)
    text = str(error.value)
    assert "s001.xml: box 2, disc (8, 8, 9, 30), is empty" in text
    assert "s001.xml: box 3, disc (49, 4, 120, 30), reaches beyond the picture of 96x80" in text
    assert "s002.xml: drawn on a picture of 640x480, but s002.png has 96x80 pixels" in text
    assert "s003.png" in text and "s004.png" in text
    data = divided(tmp_path, skip_bad=True)
    assert len(data.left_out) == 5
    left = {s.picture.stem: s for s in data.train.scenes + data.validation.scenes}
    assert sorted(left) == ["s000", "s001", "s005"]
    assert left["s001"].boxes == [(4, 4, 30, 30)]


def test_a_box_a_pixel_beyond_is_cut_at_the_border(tmp_path: Path) -> None:
    write_voc(tmp_path, 2)
    text = annotation("s001.png", 96, 80, [("disc", 0, 0, 97, 81)])
    (tmp_path / "Annotations/s001.xml").write_text(text)
    data = divided(tmp_path)
    scenes = {scene.picture.stem: scene for scene in data.train.scenes + data.validation.scenes}
    assert scenes["s001"].boxes == [(0, 0, 96, 80)]


def test_a_class_that_a_model_does_not_know_is_told(tmp_path: Path) -> None:
    write_voc(tmp_path, 8)
    with pytest.raises(ValueError, match=r"square .* is of an unknown class"):
        divided(tmp_path, classes=("disc",))
    assert divided(tmp_path, classes=("square", "disc")).train.classes == ("square", "disc")


def test_a_turned_picture_has_boxes_of_the_upright_one(tmp_path: Path) -> None:
    write_voc(tmp_path, 2)
    file = tmp_path / "JPEGImages/s001.png"
    upright = Image.open(file).convert("RGB")
    tags = Image.Exif()
    tags[0x0112] = 6  # turned to the left: its file is 80 wide and 96 high
    upright.transpose(Image.Transpose.ROTATE_90).save(file, exif=tags)
    data = divided(tmp_path)
    row = [s.picture.stem for s in data.train.scenes].index("s001") if len(data.train) else 0
    holder = data.train if data.train.scenes[row].picture.stem == "s001" else data.validation
    assert holder.picture(0)[0].shape == (80, 96, 3)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (
            lambda home: (home / "Annotations/s000.xml").write_text("<annotation>"),
            "not a VOC annotation",
        ),
        (lambda home: (home / "ImageSets/Main/train.txt").write_text("s777\n"), "s777"),
        (lambda home: (home / "ImageSets/Main/test.txt").write_text("s000\n"), "to train on"),
    ],
)
def test_a_broken_layout_is_told_with_its_file(tmp_path: Path, spoil, word: str) -> None:
    write_voc(tmp_path, 2)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=word):
        divided(tmp_path)


def test_a_broken_file_of_coco_is_told(tmp_path: Path) -> None:
    home = write_coco(tmp_path, 4)
    file = home / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [1, 2, 3]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances_train.json is not a COCO file with boxes"):
        divided(home)


def test_no_layout_is_told_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Annotations/NAME.xml beside JPEGImages"):
        divided(tmp_path)
    with pytest.raises(FileNotFoundError, match="layout of VOC or COCO"):
        divided(tmp_path / "none")


def test_a_picture_of_coco_is_the_one_in_the_folder_that_its_name_or_its_part_says(
    tmp_path: Path,
) -> None:
    home = write_coco(tmp_path, 4)
    file = home / "annotations/instances_train.json"
    for folder in ("images/test/left", "images/train/right", "images/train/left"):
        shutil.copytree(home / "train", home / folder)
    shutil.rmtree(home / "train")

    def named(how: str) -> None:
        content = json.loads(file.read_text())
        for number, image in enumerate(content["images"]):
            image["file_name"] = how.format(number)
        file.write_text(json.dumps(content))

    def folders() -> set[Path]:
        return {s.picture.parent for part in divided(home).parts().values() for s in part.scenes}

    named("left/s{:03}.png")
    assert folders() == {home / "images/train/left"}
    named("images/test/left/s{:03}.png")
    assert folders() == {home / "images/test/left"}
    named("s{:03}.png")
    told = r"instances_train.json: s000.png may be .*left.* or .*right.*: say in file_name"
    with pytest.raises(ValueError, match=told):
        divided(home)
    shutil.rmtree(home / "images/train/right")
    assert folders() == {home / "images/train/left"}


def test_beside_boxes_coco_may_have_captions_and_keypoints_and_classes_that_one_part_lacks(
    tmp_path: Path,
) -> None:
    for part in ("train", "test"):
        home = write_coco(tmp_path, 4, part=part)
    other = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    for name in ("captions_train", "person_keypoints_train", "person_keypoints_test"):
        (home / f"annotations/{name}.json").write_text(json.dumps(other))
    file = home / "annotations/instances_test.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 9, "name": "star"}, {"id": 7, "name": CLASSES[0]}]
    content["annotations"] = []
    file.write_text(json.dumps(content))
    data = divided(home)
    assert data.train.classes == (*CLASSES, "star")
    assert data.test is not None and data.test.classes == data.train.classes
    (home / "annotations/instances_train.json").rename(home / "annotations/boxes_train.json")
    file.unlink()
    with pytest.raises(
        ValueError, match=r"has 3 files for its part train \(boxes_train.json, capt"
    ):
        divided(home)


def test_crowds_of_coco_are_no_objects(tmp_path: Path) -> None:
    home = write_coco(tmp_path, 4)
    file = home / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    count = len(content["annotations"])
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    data = divided(home)
    left = sum(len(s.labels) for s in data.train.scenes + data.validation.scenes)
    assert left == count - 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    parts = {"train": range(16), "val": range(2)}
    return divided(write_voc(tmp_path_factory.mktemp("voc"), 16, parts=parts)).train


@pytest.mark.parametrize("name", JITTERS)
def test_objects_stay_in_their_boxes_through_augmentation(drawn: Scenes, name: str) -> None:
    changed = 0
    for row in range(len(drawn)):
        pixels, truth = drawn.picture(row)
        image, moved = jitter(pixels, truth, [name], row)
        changed += image.shape != pixels.shape or not (image == pixels).all()
        height, width = image.shape[:2]
        assert (moved.boxes >= 0).all()
        assert (moved.boxes <= torch.tensor([width, height, width, height])).all()
        for (x1, y1, x2, y2), label in zip(moved.boxes.tolist(), moved.labels, strict=True):
            middle = image[int(y1 + y2) // 2, int(x1 + x2) // 2]
            assert middle.argmax() == (2 if label else 0)
    assert changed


def test_augmentation_takes_pictures_without_objects() -> None:
    empty = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    pixels = np.zeros((40, 60, 3), np.uint8)
    image, truth = jitter(pixels, empty, list(JITTERS), 3)
    assert image.ndim == 3 and truth.boxes.shape == (0, 4)
    with pytest.raises(ValueError, match="choose among flip"):
        check_jitters(["flop"])


def batches(data: Scenes, *, skip: int = 0, epoch: int = 0, passes: int = 1) -> list:
    lessons = Lessons(data, 128, passes, torch.device("cpu"))
    names = ["flip", "crop", "light"]
    return list(lessons.shuffled(4, seed=1, epoch=epoch, skip=skip, augmentations=names))


def test_a_run_that_goes_on_meets_the_batches_it_would_have_met(drawn: Scenes) -> None:
    whole, rest = batches(drawn), batches(drawn, skip=2)
    assert len(whole) == 4 and len(rest) == 2
    for one, other in zip(whole[2:], rest, strict=True):
        assert (one.x == other.x).all()
        assert all((a.boxes == b.boxes).all() for a, b in zip(one.truth, other.truth, strict=True))
    assert not all((a.x == b.x).all() for a, b in zip(whole, batches(drawn, epoch=1), strict=True))


def test_passes_of_one_epoch_differ(drawn: Scenes) -> None:
    every = torch.cat([batch.x for batch in batches(drawn, passes=2)])
    assert len(every) == 32
    assert len({image.numpy().tobytes() for image in every}) > 20


def test_batches_leave_the_draws_of_training_alone(drawn: Scenes) -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    batches(drawn)
    assert torch.rand(1) == first


def test_the_blood_cells_are_read_but_for_two_empty_boxes(
    rampart_data: Path, tmp_path: Path
) -> None:
    import tarfile

    with tarfile.open(rampart_data / "bccd.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    with pytest.raises(ValueError, match="2 boxes or pictures"):
        divided(tmp_path / "BCCD")
    data = divided(tmp_path / "BCCD", skip_bad=True)
    assert data.train.classes == ("Platelets", "RBC", "WBC")
    assert data.test is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [205, 87, 36]
