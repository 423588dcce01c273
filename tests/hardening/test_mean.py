"""The mean of networks' weights."""

from pathlib import Path

import pytest
import torch
from blobs import blobs

from rampart.hardening.model import checkpoint, provenance
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.files import read_config
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.train import provenance as notes
from rampart.hardening.train.mean import average

SMALL = ClassifierConfig("resnet10", 3, 0.125, 32)


def written(
    file: Path, seed: int, net: ClassifierConfig = SMALL, images: Images | None = None
) -> Path:
    torch.manual_seed(seed)
    classifier = Classifier(net)
    classifier(torch.rand(8, 3, 32, 32))  # batch statistics of its own
    recipe = f"Recipe(seed={seed}, augment=('crop',))"
    content = {"classifier": net._asdict(), "training": recipe, "history": [[seed]]}
    if images is not None:
        content |= {"images": notes.note(file.parent, images, blobs(5, seed=9))}
    checkpoint.save(file, classifier, content | {"commands": [f"train {seed}", "begin"]})
    return file


def test_every_weight_and_every_batch_statistic_is_the_mean(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    out = tmp_path / "mean.safetensors"
    average(files, out, command="average")
    states = [load_classifier(file).state_dict() for file in files]
    for name, value in load_classifier(out).state_dict().items():
        every = torch.stack([state[name] for state in states])
        if value.is_floating_point():
            assert torch.allclose(value, every.mean(0), atol=1e-6), name
        else:
            assert torch.equal(value, states[0][name]), name
    assert any(name.endswith("running_var") for name in states[0])


def test_the_mean_says_how_each_network_was_made(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{seed}.safetensors", seed) for seed in range(2)]
    average(files, tmp_path / "mean.safetensors", command="average 0 1")
    content = read_config(tmp_path / "mean.safetensors")
    recipes = ("Recipe(seed=0, augment=('crop',))", "Recipe(seed=1, augment=('crop',))")
    assert content["training"] == f"mean of 2: {'; '.join(recipes)}"
    assert content["commands"] == ["train 0", "begin", "train 1", "average 0 1"]
    assert content["history"] == [[0]]


def test_networks_that_differ_in_more_than_weights_have_no_mean(tmp_path: Path) -> None:
    wide = written(tmp_path / "wide.safetensors", 1, SMALL._replace(width=0.25))
    files = [written(tmp_path / "0.safetensors", 0), wide]
    with pytest.raises(ValueError, match=r"wide\.safetensors holds another network than .*0\."):
        average(files, tmp_path / "mean.safetensors", command="average")
    with pytest.raises(ValueError, match="name two files or more"):
        average(files[:1], tmp_path / "mean.safetensors", command="average")
    assert not (tmp_path / "mean.safetensors").exists()


def test_the_images_that_any_network_was_trained_on_stand_beside_the_mean(tmp_path: Path) -> None:
    both = [blobs(20, seed=seed) for seed in range(2)]
    files = [
        written(tmp_path / str(i) / "c.safetensors", i, images=images)
        for i, images in enumerate(both)
    ]
    average(files, tmp_path / "mean" / "c.safetensors", command="average")
    for images in both:
        with pytest.raises(ValueError, match="mean was trained on 20 of these 20 images"):
            provenance.check_unseen(tmp_path / "mean", images)
    assert "images" not in read_config(tmp_path / "mean" / "c.safetensors")
    average([files[0]] * 2, tmp_path / "same" / "c.safetensors", command="average")
    noted = read_config(tmp_path / "same" / "c.safetensors")["images"]
    assert noted == read_config(files[0])["images"]


def test_networks_of_images_that_differ_and_are_listed_nowhere_have_no_mean(tmp_path: Path) -> None:
    files = [
        written(tmp_path / str(i) / "c.safetensors", i, images=blobs(20, seed=i)) for i in range(2)
    ]
    (tmp_path / "1" / provenance.FILE).unlink()
    with pytest.raises(ValueError, match=r"1/c\.safetensors was trained on other images"):
        average(files, tmp_path / "mean" / "c.safetensors", command="average")
    assert not (tmp_path / "mean").exists()
    average([files[0], written(tmp_path / "a.safetensors", 3)], tmp_path / "b", command="average")
