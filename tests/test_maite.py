"""A model under MAITE's own tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blobs import blobs

import rampart as rp
from rampart.maite import ImageClassifier

maite = pytest.importorskip("maite", reason="`pip install maite` brings whose protocols these are")


class Accuracy:
    """A metric as MAITE has it."""

    def __init__(self) -> None:
        self.metadata = {"id": "accuracy"}
        self.reset()

    def reset(self) -> None:
        self.right: list[bool] = []

    def update(self, predicted: Any, truth: Any, *_: Any) -> None:
        pairs = zip(predicted, truth, strict=True)
        self.right += [int(np.argmax(p)) == int(np.argmax(t)) for p, t in pairs]

    def compute(self) -> dict[str, Any]:
        return {"accuracy": float(np.mean(self.right))}


class Pictures:
    """A data set as MAITE has it: pictures (3, H, W), one-hot labels."""

    def __init__(self, images: rp.Images) -> None:
        self.metadata = {"id": "blobs"}
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Any:
        if index >= len(self):
            raise IndexError(index)
        image = self.images.image[index].permute(2, 0, 1)
        return image, np.eye(10)[int(self.images.label[index])], {"id": index}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> rp.Model:
    return rp.Model.load(tiny_folder)


def test_maites_evaluation_has_the_accuracy_of_the_models_verdicts(model: rp.Model) -> None:
    from maite.protocols import image_classification as ic
    from maite.tasks import evaluate

    images = blobs(24, size=model.image_size)
    wrapped: ic.Model = ImageClassifier(model)
    assert isinstance(wrapped, ic.Model)
    found, *_ = evaluate(model=wrapped, metric=Accuracy(), dataset=Pictures(images), batch_size=7)
    verdicts = model.predict(images.image)
    right = [v.index == int(label) for v, label in zip(verdicts, images.label, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert wrapped.metadata["index2label"] == dict(enumerate(model.classes))


def test_floats_and_other_sizes_are_read_as_the_endpoint_reads_pictures(model: rp.Model) -> None:
    wrapped, size = ImageClassifier(model, "lean"), model.image_size
    pixels = blobs(2, size=size).image.permute(0, 3, 1, 2).numpy()
    own = wrapped(pixels)
    np.testing.assert_allclose(wrapped(list(pixels.astype(np.float32) / 255)), own, atol=1e-6)
    assert own[0].shape == (10,) and float(own[0].sum()) == pytest.approx(1)
    large = pixels.repeat(2, 2).repeat(2, 3)
    expected = [v.index for v in model.predict(large.transpose(0, 2, 3, 1), variant="lean")]
    assert [int(row.argmax()) for row in wrapped(large)] == expected
    assert wrapped([]) == []


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((32, 32, 3), np.uint8), r"shape \(32, 32, 3\): pass \(3, H, W\)"),
        (np.full((3, 8, 8), 2.0), "floats in .0, 1."),
        (np.full((3, 8, 8), np.nan), "floats in .0, 1."),
        (np.zeros((3, 8, 8), np.int64), "holds int64"),
    ],
)
def test_what_is_no_picture_is_refused(model: rp.Model, image: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ImageClassifier(model)([image])
