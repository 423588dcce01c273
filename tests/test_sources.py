from pathlib import Path

import numpy as np
import pytest
from blobs import blobs
from command import run
from PIL import Image

from rampart.hardening.model import provenance
from rampart.hardening.model.images import hold_out
from rampart.hardening.report import card as report
from rampart.model import Model
from rampart.sources import Source, sample_of


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
    seen, name, _ = sample_of(Model.load(lean_only), Source(data, beside), part="validation")
    trained = hold_out(every["mine"], every["held"] if held else None)[0]
    assert name == f"validation split of {held or 'mine.npz'}"
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
    wants = "was made with --held held.npz: pass it here as well"
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
    with pytest.raises(ValueError, match="would be trained on"):
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
    with pytest.raises(ValueError, match="was trained on 300 of these 300 images"):
        sample_of(model, renamed, part="validation")
    held = Source(lean_only.with_name("mine.npz"), renamed.data)
    np.savez(
        held.data, image=blobs(50, seed=2).image.numpy(), label=blobs(50, seed=2).label.numpy()
    )
    with pytest.raises(ValueError, match="was trained on"):
        sample_of(model, held, part="validation")
