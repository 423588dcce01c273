"""Networks that find objects: their contract with training, attack, export and files."""

import copy
from collections.abc import Callable
from pathlib import Path

import owned
import pytest
import torch
from torchvision.models.detection.ssd import SSD

from rampart.hardening.model import checkpoint, registry
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.objects.boxes import Candidates, Dense, Truth, strongest, suppressed
from rampart.hardening.objects.detector import (
    ObjectConfig,
    ObjectDetector,
    load,
    of_factory,
    on_classifier,
    save,
)

SMALL = ClassifierConfig("resnet10", 10, 0.125)
LARGE = ClassifierConfig("resnet50", 10, 0.125, 224)
VGG = ClassifierConfig("vgg11_bn", 10, 0.125)
CLASSES = ("disc", "square")
OWN = ("ssd", "retinanet", "faster_rcnn")
for name in (*OWN, "Whole", "classifier"):
    registry.import_factory(f"owned:{name}")
CONFIGS = {
    "ssdlite": ObjectConfig("ssdlite", CLASSES, 128),
    "ssd": ObjectConfig("ssd", CLASSES, 128, SMALL),
    "ssd on bottlenecks": ObjectConfig("ssd", CLASSES, 128, LARGE),
    "fasterrcnn": ObjectConfig("fasterrcnn", CLASSES, 128, SMALL),
    "ssd on VGG": ObjectConfig("ssd", CLASSES, 128, VGG),
    "fasterrcnn on VGG": ObjectConfig("fasterrcnn", CLASSES, 128, VGG._replace(arch="vgg11")),
    **{f"own {name}": ObjectConfig(f"owned:{name}", CLASSES, 128) for name in OWN},
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


def test_an_attack_finds_the_same_losses_at_the_same_place(detector: ObjectDetector) -> None:
    x = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        first, again = (detector.image_losses(x, [SCENE, EMPTY]) for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_training_draws_proposals_of_a_faster_rcnn_at_random() -> None:
    torch.manual_seed(0)
    net = ObjectDetector(CONFIGS["fasterrcnn"])
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        drawn = [net.train().image_losses(x, [SCENE])["objectness"] for _ in range(4)]
    assert len({float(value) for value in drawn}) == 4


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
        (ObjectConfig("ssd", CLASSES), "stands on a ResNet or VGG"),
        (ObjectConfig("owned:ssd", ("disc",)), "tells 3 classes, with background, but .* show 1"),
        (ObjectConfig("owned:classifier", CLASSES), "makes a Linear: return torchvision's SSD"),
        (ObjectConfig("owned:unheard_of", CLASSES), "name its factory again"),
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


@pytest.mark.parametrize("name", ["fasterrcnn", "own faster_rcnn"])
def test_proposals_are_pooled_as_torchvision_pools_them(name: str) -> None:
    torch.manual_seed(0)
    net = ObjectDetector(CONFIGS[name]).eval().net
    with torch.no_grad():
        maps = net.maps(torch.rand(3, 3, 128, 128))
        proposals = net.proposals(maps)
        expected = net.roi_heads.box_roi_pool(maps, list(proposals), [(128, 128)] * 3)
        torch.testing.assert_close(net.pooled(maps, proposals), expected)
    sides = (proposals[..., 2:] - proposals[..., :2]).prod(2).sqrt()
    assert sides.min() < owned.NEXT_MAP < sides.max()


@pytest.mark.parametrize("make", [owned.ssd, owned.retinanet])
def test_your_own_network_finds_what_it_found_before(make: Callable[[int], SSD]) -> None:
    torch.manual_seed(3)
    theirs = make(2).eval()  # of one class and background, for RetinaNet asks for each class alone
    with torch.no_grad():
        for weight in theirs.head.parameters():
            weight.copy_(torch.randn_like(weight) / 20)
    registry.register("owned:again", lambda: copy.deepcopy(theirs))
    ours, x = of_factory("owned:again", ("disc",), 128).eval(), torch.rand(2, 3, 128, 128)
    assert ours.config.mean == tuple(theirs.transform.image_mean)
    with torch.no_grad():
        for mine, other in zip(ours(x), theirs(list(x)), strict=True):
            assert len(mine.boxes) >= 20 and len(other["boxes"]) >= 20
            torch.testing.assert_close(mine.boxes[:20], other["boxes"][:20], rtol=0, atol=1e-3)
            torch.testing.assert_close(mine.scores[:20], other["scores"][:20])
            assert (mine.labels[:20] + 1 == other["labels"][:20]).all()


def test_a_module_of_yours_with_the_four_names_is_taken_as_it_is() -> None:
    net, x = of_factory("owned:Whole", CLASSES, 128).eval(), torch.rand(2, 3, 128, 128)
    assert net.config.mean == (0, 0, 0) and net.config.std == (1, 1, 1)
    with torch.no_grad():
        (found, _) = net(x)
        assert found.boxes[0].tolist() == [0, 0, 128, 128]
        share = net.net.head(x.mean((2, 3))).softmax(1)[0, 1:].amax()
        torch.testing.assert_close(found.scores[0], share)
        assert net.image_losses(x, [SCENE, EMPTY])["classification"].shape == (2,)


@pytest.mark.parametrize("arch", ["ssd", "fasterrcnn"])
def test_a_detector_on_a_vgg_begins_with_its_layers(arch: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier(VGG).eval()
    net, x = on_classifier(arch, classifier, CLASSES, 128).eval(), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        fourth, fifth = net.net.backbone.body(x).values()
        expected = classifier.backbone.features[:21](x)  # all before the fourth pooling
    assert fourth.shape[2] == 128 // 8 and fifth.shape[2] == 128 // 16
    torch.testing.assert_close(fourth, expected)
