import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from jsonschema import Draft202012Validator
from PIL import Image

from rampart.hardening.model import checkpoint
from rampart.hardening.model import provenance as known
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.report import card as report
from rampart.hardening.train import data, provenance
from rampart.hardening.train.loop import Recipe, train_classifier

TRAIN, HELD = blobs(40), blobs(30, seed=1)


def test_a_renamed_file_of_training_images_does_not_pass_as_held_out(tmp_path: Path) -> None:
    provenance.note(tmp_path, TRAIN, HELD)
    np.savez(tmp_path / "innocent.npz", image=TRAIN.image[5:9], label=TRAIN.label[5:9])
    images = data.load(tmp_path / "innocent.npz", train=False)
    with pytest.raises(ValueError, match="trained on 4 of these 4 images"):
        known.check_unseen(tmp_path, images)
    known.check_unseen(tmp_path, HELD)


def test_one_training_image_among_many_is_found(tmp_path: Path) -> None:
    provenance.note(tmp_path, TRAIN, HELD)
    image = torch.cat([HELD.image, TRAIN.image[7:8]])
    mixed = Images(image, torch.zeros(31, dtype=torch.int64), HELD.classes)
    found = known.trained_on(tmp_path, mixed)
    assert found is not None
    assert found.tolist() == [False] * 30 + [True]


def test_a_folder_that_says_nothing_convicts_nobody(tmp_path: Path) -> None:
    assert known.trained_on(tmp_path, TRAIN) is None
    known.check_unseen(tmp_path, TRAIN)


def test_pictures_left_on_disk_are_known_by_their_pixels_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, image in enumerate(TRAIN.image[:6]):
        file = tmp_path / "data" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(file)
    monkeypatch.setattr(data, "MEMORY", 0)
    folder = data.load_training(tmp_path / "data", size=32)
    assert isinstance(folder, data.Folder)
    provenance.note(tmp_path / "run", folder, HELD)
    found = known.trained_on(tmp_path / "run", TRAIN)
    assert found is not None
    assert found.tolist() == [True] * 6 + [False] * 34


def test_a_model_knows_the_images_of_all_its_parts_and_of_its_detectors(tmp_path: Path) -> None:
    provenance.note(tmp_path / "run", TRAIN[slice(0, 10)], HELD)
    parts = [tmp_path / "run" / "classifier.safetensors", tmp_path / "elsewhere" / "w.safetensors"]
    where = {"fitted": TRAIN[slice(30, 35)], "held": HELD}
    entry = provenance.collect(tmp_path / "model", parts, TRAIN[slice(10, 20)], **where)
    found = known.trained_on(tmp_path / "model", TRAIN)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [*range(20), *range(30, 35)]
    assert entry["training"]["count"] == 25
    assert entry["held_out"] == known.summary(known.fingerprints(HELD.image))


def test_held_out_images_that_detectors_had_to_be_fitted_on_stay_held_out(tmp_path: Path) -> None:
    where = {"fitted": HELD[slice(0, 5)], "held": HELD}
    provenance.collect(tmp_path, [Path("none/w.safetensors")], TRAIN, **where)
    known.check_unseen(tmp_path, HELD)


@pytest.mark.training
def test_training_notes_its_images_beside_the_weights_and_in_them(tmp_path: Path) -> None:
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125))
    recipe = Recipe("standard", epochs=1, batch_size=20)
    best = train_classifier(net, recipe, tmp_path, (TRAIN, HELD))
    with pytest.raises(ValueError, match="trained on 40 of these 40"):
        known.check_unseen(tmp_path, TRAIN)
    noted = checkpoint.read(best)[0]["images"]
    assert noted["training"] == known.summary(known.fingerprints(TRAIN.image))
    assert noted["held_out"]["count"] == 30


def test_what_a_card_says_of_its_images_obeys_the_schema() -> None:
    schema = json.loads((Path(report.__file__).with_name("card.schema.json")).read_text())
    images = {"$defs": schema["$defs"], **schema["properties"]["images"]}
    entry = provenance.entry(known.fingerprints(TRAIN.image), HELD.image)
    Draft202012Validator(images).validate(entry)
