"""Networks that find objects: their contract with training, attack, export and files."""

from pathlib import Path

import pytest
import torch

from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.objects.boxes import Candidates, Dense, Truth, strongest, suppressed
from rampart.hardening.objects.detector import ObjectConfig, ObjectDetector, load, save

SMALL = ClassifierConfig("resnet10", 10, 0.125)
LARGE = ClassifierConfig("resnet50", 10, 0.125, 224)
CLASSES = ("disc", "square")
CONFIGS = {
    "ssdlite": ObjectConfig("ssdlite", CLASSES, 128),
    "ssd": ObjectConfig("ssd", CLASSES, 128, SMALL),
    "ssd on bottlenecks": ObjectConfig("ssd", CLASSES, 128, LARGE),
    "fasterrcnn": ObjectConfig("fasterrcnn", CLASSES, 128, SMALL),
}
SCENE = Truth(torch.tensor([[10.0, 10, 50, 60], [70, 64, 120, 120]]), torch.tensor([0, 1]))
EMPTY = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.fixture(params=CONFIGS)
def detector(request: pytest.FixtureRequest) -> ObjectDetector:
    torch.manual_seed(0)
    return ObjectDetector(CONFIGS[request.param]).eval()


def test_candidates_are_of_one_size_whatever_the_picture(detector: ObjectDetector) -> None:
    with torch.no_grad():
        boxes, scores, labels = detector.candidates(torch.rand(2, 3, 128, 128))
        one = detector.candidates(torch.zeros(1, 3, 128, 128))
    assert boxes.shape[2:] == (4,) and boxes.shape[:2] == scores.shape == labels.shape
    assert one.scores.shape[1] == scores.shape[1] and scores.shape[1] % 2 == 0
    assert labels.unique().tolist() == [0, 1]
    assert scores.min() >= 0 and scores.max() <= 1
    assert boxes.min() >= 0 and boxes.max() <= 128
    assert (boxes[..., 2:] >= boxes[..., :2]).all()


def test_losses_know_pictures_without_objects_and_reach_the_pixels(
    detector: ObjectDetector,
) -> None:
    x = torch.rand(2, 3, 128, 128, requires_grad=True)
    before = [value.clone() for value in detector.state_dict().values()]
    each = detector.image_losses(x, [SCENE, EMPTY])
    assert all(value.shape == (2,) and value.isfinite().all() for value in each.values())
    assert each["classification"].min() > 0 and each["localization"][1] == 0
    total = sum(value.sum() for value in each.values())
    (slope,) = torch.autograd.grad(total, x)
    assert (slope.flatten(1).abs().sum(1) > 0).all()
    # BatchNorm stays in eval mode.
    after = detector.state_dict().values()
    assert all((old == new).all() for old, new in zip(before, after, strict=True))


def test_a_file_brings_the_same_objects_back(tmp_path: Path, detector: ObjectDetector) -> None:
    file = tmp_path / "objects.safetensors"
    save(file, detector, {"training": "none"})
    again, x = load(file), torch.rand(1, 3, 128, 128)
    assert again.config == detector.config
    assert checkpoint.read(file)[0]["task"] == "detect"
    with torch.no_grad():
        (here,), (there,) = detector(x), again(x)
    assert all((one == other).all() for one, other in zip(here, there, strict=True))
    assert len(here.boxes) <= 100


def test_a_classifier_is_no_object_detector(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    checkpoint.save(file, Classifier(SMALL), {"classifier": SMALL._asdict()})
    with pytest.raises(ValueError, match="holds no object detector"):
        load(file)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (ObjectConfig("yolo", CLASSES), "choose one of ssdlite"),
        (ObjectConfig("ssd", CLASSES), "stands on a ResNet"),
        (ObjectConfig("ssd", CLASSES, 250, SMALL), "multiple of 64"),
        (ObjectConfig("ssdlite", ()), "one class or more"),
    ],
)
def test_what_cannot_be_built_is_told(config: ObjectConfig, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ObjectDetector(config)


def test_the_strongest_of_each_class_stand_with_their_own_boxes() -> None:
    logits = torch.tensor([[[0.0, 1, 5], [0, 4, 1], [9, 0, 0]]])
    own = torch.arange(3.0)[None, :, None, None].expand(1, 3, 1, 4)
    boxes, scores, labels = strongest(Dense(own, logits), 2)
    assert labels.tolist() == [[0, 0, 1, 1]]
    assert boxes[0, :, 0].tolist() == [1, 0, 0, 1]
    assert torch.allclose(scores[0, 0], logits.softmax(2)[0, 1, 1])
    each = torch.stack([own[:, :, 0], own[:, :, 0] + 10], 2)  # a box for each class
    assert strongest(Dense(each, logits), 2).boxes[0, :, 0].tolist() == [1, 0, 10, 11]


def test_of_boxes_that_overlap_the_surest_of_each_class_is_left() -> None:
    box, far = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    boxes = torch.tensor([[box, box, box, far]])
    scores, labels = torch.tensor([[0.5, 0.9, 0.4, 0.001]]), torch.tensor([[0, 0, 1, 0]])

    (found,) = suppressed(Candidates(boxes, scores, labels), iou=0.5, most=9)
    assert found.labels.tolist() == [0, 1]
    assert torch.allclose(found.scores, torch.tensor([0.9, 0.4]))


def test_proposals_are_pooled_as_torchvision_pools_them() -> None:
    torch.manual_seed(0)
    net = ObjectDetector(CONFIGS["fasterrcnn"]).eval().net
    with torch.no_grad():
        maps = net.maps(torch.rand(3, 3, 128, 128))
        proposals = net.proposals(maps)
        expected = net.roi_heads.box_roi_pool(maps, list(proposals), [(128, 128)] * 3)
        torch.testing.assert_close(net.pooled(maps, proposals), expected)
