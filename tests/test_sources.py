from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from command import run
from PIL import Image

from rampart.assembly import add_guarded, assemble
from rampart.hardening.model import provenance
from rampart.hardening.model.images import Images, hold_out
from rampart.hardening.report import card as report
from rampart.model import Model
from rampart.sources import Source, load_images, sample_of
from rampart.studies import Study, quantize


@pytest.mark.parametrize(
    ("card", "held"),
    [
        ({"data": "mine.npz"}, None),
        ({"data": "a name", "commands": ["rampart train --data mine.npz"]}, None),
        ({"data": "mine.npz"}, "held.npz"),
    ],
)
def test_a_split_to_measure_on_has_no_image_of_training(
    lean_only: Path, card: dict[str, object], held: str | None
) -> None:
    every = {
        name: blobs(count, seed=seed) for name, count, seed in (("mine", 2200, 0), ("held", 400, 1))
    }
    for name, images in every.items():
        file = lean_only.with_name(name)
        np.savez(file, image=images.image.numpy(), label=images.label.numpy())
    report.write_card(lean_only, card)
    data = lean_only.with_name("mine.npz")
    beside = lean_only.with_name(held) if held else None
    sample = sample_of(Model.load(lean_only), Source(data, beside), part="validation")
    seen = sample.images
    trained = hold_out(every["mine"], every["held"] if held else None)[0]
    assert sample.name == f"validation split of {held or 'mine.npz'}"
    assert len(seen) >= 50
    pixels = [{image.tobytes() for image in images.image.numpy()} for images in (seen, trained)]
    assert not pixels[0] & pixels[1]


def test_a_model_that_was_made_with_held_out_images_wants_them_again(lean_only: Path) -> None:
    data = lean_only.with_name("train.npz")
    images = blobs(2200)
    np.savez(data, image=images.image.numpy(), label=images.label.numpy())
    card = report.read_card(lean_only)
    made = {"commands": [f"rampart calibrate bare --data {data} --held held.npz"]}
    report.write_card(lean_only, card | made)
    wants = "was made with --held held.npz: pass it here too"
    with pytest.raises(ValueError, match=wants):
        sample_of(Model.load(lean_only), Source(data), part="validation")
    for command in ("ablate", "alarms", "quantize"):
        with pytest.raises(ValueError, match=wants):
            run(command, lean_only, "--data", data)


def test_a_folder_of_held_out_pictures_has_names_of_its_own(tmp_path: Path) -> None:
    for part, count in (("train", 60), ("held", 210)):
        for i, pixels in enumerate(blobs(count, seed=len(part)).image.numpy()):
            (tmp_path / part / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f"class{i % 2}" / f"{i:03}.png")
    images, held = Source(tmp_path / "train", tmp_path / "held").read(32)
    assert (len(images), len(held)) == (60, 210)
    with pytest.raises(ValueError, match="training would use its images"):
        Source(tmp_path, tmp_path / "held").read(32)


def test_a_file_of_training_images_is_known_by_its_pixels_whatever_its_name(
    lean_only: Path,
) -> None:
    train, other = blobs(300), blobs(200, seed=1)
    provenance.write(lean_only, provenance.fingerprints(train.image))
    model, files = Model.load(lean_only), {"renamed": train, "other": other}
    for name, images in files.items():
        file = lean_only.with_name(f"{name}.npz")
        np.savez(file, image=images.image.numpy(), label=images.label.numpy())
    renamed, unseen = (Source(lean_only.with_name(f"{name}.npz")) for name in files)
    assert "was trained on 300 of these 300 images" in sample_of(model, renamed).warning
    assert sample_of(model, unseen).warning == ""
    assert sample_of(model, unseen).summary[0] == "other.npz: 200 images, 10 classes, 32x32 pixels"
    with pytest.raises(ValueError, match="was trained on 300 of these 300 images"):
        sample_of(model, renamed, part="validation")
    held = Source(lean_only.with_name("mine.npz"), renamed.data)
    np.savez(
        held.data, image=blobs(50, seed=2).image.numpy(), label=blobs(50, seed=2).label.numpy()
    )
    with pytest.raises(ValueError, match="was trained on"):
        sample_of(model, held, part="validation")


def save(file: Path, labels: list[int], **more: object) -> Path:
    """An .npz of as many random images."""
    image = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    np.savez(file, image=image, label=np.array(labels), **more)
    return file


@pytest.mark.parametrize(
    ("train", "held", "more", "message"),
    [
        ([0] * 60, [0] * 210, {}, r"has one class, '0': pass two or more classes"),
        ([1, 2, 3] * 20, [1, 2, 3] * 70, {}, r"has no image of class 0: number classes from 0"),
        ([0, 5, 9] * 20, [0, 5, 9] * 70, {}, "has no image of the classes 1, 2, 3, 4, 6, 7, 8: "),
        ([0, 1] * 30, [0, 1] * 105, {"classes": ["a", "b", "c"]}, "has no image of class c"),
    ],
)
def test_labels_are_judged_before_any_training(
    tmp_path: Path, train: list[int], held: list[int], more: dict[str, object], message: str
) -> None:
    files = (
        save(tmp_path / "train.npz", train, **more),
        save(tmp_path / "held.npz", held, **more),
    )
    with pytest.raises(ValueError, match=rf"train\.npz {message}"):
        Source(*files).read(32)


def test_a_class_that_is_held_out_whole_is_told_before_any_training(tmp_path: Path) -> None:
    """One image of class 2, which the draw of seed 0 puts into the tenth."""
    file = save(tmp_path / "data.npz", [0, 1] * 1000)
    drawn = hold_out(load_images(file, size=32), None)[1]
    content = dict(np.load(file))
    row = int((content["image"] == drawn.image[0].numpy()).all((1, 2, 3)).argmax())
    content["label"][row] = 2
    np.savez(file, **content)
    with pytest.raises(ValueError, match="too few images of class 2: all of them are held out"):
        Source(file).read(32)


def test_what_is_trained_on_is_summed_up_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (
        save(tmp_path / "train.npz", [0, 1, 1] * 20),
        save(tmp_path / "held.npz", [0, 1] * 105),
    )
    Source(*files).read(32)
    assert capsys.readouterr().out.splitlines() == [
        "train.npz: 60 images, 2 classes, 32x32 pixels",
        "  0 20, 1 40",
        "held.npz: 210 images, 2 classes, 32x32 pixels",
        "  0 105, 1 105",
        "60 training images, 210 held out",
    ]


@pytest.mark.training
def test_a_model_whose_training_left_out_bad_pictures_does_so_when_it_is_sample_of(
    lean_only: Path,
) -> None:
    home = lean_only.with_name("pictures")
    for index, image in enumerate(blobs(2100).image.numpy()):
        file = home / f"{index % 10}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    (home / "3" / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"broken\.png: the body is empty"):
        sample_of(Model.load(lean_only), Source(home), part="validation")
    card = report.read_card(lean_only)
    made = {"commands": [f"rampart train --data {home} --skip-bad --out x"]}
    report.write_card(lean_only, card | made)
    sample = sample_of(Model.load(lean_only), Source(home), part="validation")
    assert len(sample.images) == 60


def test_a_small_set_is_told_at_once_what_it_can_promise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held = Source(save(tmp_path / "few.npz", [0, 1] * 60)).read(32)
    assert (len(train), len(held)) == (60, 60)
    said = capsys.readouterr().out
    assert (
        "60 training images, 60 held out\n  warning: a small set; its promise: at most 5.0%" in said
    )
    assert (
        "for this one of 31 images up to 9.2% with 95% confidence; 200 held-out images allow 1%"
        in said
    )
    Source(save(tmp_path / "more.npz", [0, 1] * 500)).read(32)
    assert "warning" not in capsys.readouterr().out


def test_a_class_without_images_for_calibration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"classes": ["a", "b", "c"]}
    files = (
        save(tmp_path / "train.npz", [0, 1, 2] * 20, **named),
        save(tmp_path / "held.npz", [0, 1] * 105, **named),
    )
    Source(*files).read(32)
    assert "warning: no image of class c is among those for calibration" in capsys.readouterr().out


def written(file: Path, images: Images) -> Source:
    """Images in a file that is all held out."""
    np.savez(file, image=images.image, label=images.label, classes=images.classes)
    return Source(file, file)


def check_forms_refused(folder: Path, source: Source, why: str) -> None:
    """No form is added to a model folder, which stays as it is."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=why):
        add_guarded(folder, source, command="calibrate --guarded")
    with pytest.raises(ValueError, match=why):
        quantize(folder, source, Study(), "fp16")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_no_image_of_training_calibrates_a_further_form(lean_only: Path) -> None:
    images = blobs(600)
    provenance.write(lean_only, provenance.fingerprints(images.image[:5]))
    source = written(lean_only.with_name("held.npz"), images)
    check_forms_refused(lean_only, source, "was trained on 5 of these 600 images")


def test_a_further_form_wants_the_held_out_images_of_the_others_in_their_order(
    lean_only: Path,
) -> None:
    images, net = blobs(600), Model.load(lean_only).classifier
    home = Model.calibrate(net, images).save(lean_only.with_name("made"))
    others = {"other": blobs(600, seed=1), "turned": images[torch.arange(599, -1, -1)]}
    for name, other in others.items():
        source = written(lean_only.with_name(f"{name}.npz"), other)
        check_forms_refused(home, source, f"other held-out images than those of {name}.npz")
    add_guarded(home, written(lean_only.with_name("same.npz"), images), command="calibrate")
    assert Model.load(home).variants == ["lean", "guarded"]


def test_a_part_that_was_trained_on_the_held_out_images_is_not_calibrated_on_them(
    lean_only: Path,
) -> None:
    images = blobs(600)
    source = written(lean_only.with_name("held.npz"), images)
    provenance.write(lean_only, provenance.fingerprints(images.image[:5]))
    made = lean_only.with_name("made")
    with pytest.raises(ValueError, match="was trained on 5 of these 600 images"):
        assemble(made, source, lean_only / "weights.safetensors")
    assert not made.exists()
