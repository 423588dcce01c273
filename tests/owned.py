"""Object detectors as somebody else has them: torchvision's classes, small, and a module."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.objects.boxes import Dense

SIZE, CHANNELS = 128, 16
NEXT_MAP = 24  # pixels a side from which on proposals are looked at in another map
SQUARE = {"min_size": SIZE, "max_size": SIZE}
LAYERS = {"layer2": "0", "layer3": "1", "layer4": "2"}  # strides 8, 16 and 32


def pyramid() -> BackboneWithFPN:
    """Maps of a small ResNet."""
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig("resnet10", 2, 0.125, 224)).backbone
    return BackboneWithFPN(net, LAYERS, [16, 32, 64], CHANNELS)


def sides() -> AnchorGenerator:
    """Anchors of four maps: the pyramid's three, and one that is pooled."""
    return AnchorGenerator(((16,), (32,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 4)


def ssd(classes: int = 3) -> SSD:
    """SSD on the maps."""
    body = pyramid()
    body.out_channels = [CHANNELS] * 4  # type: ignore[assignment]
    boxes = DefaultBoxGenerator([[2]] * 4, scales=[0.1, 0.3, 0.5, 0.7, 0.9])
    return SSD(body, boxes, (SIZE, SIZE), classes)


def retinanet(classes: int = 3) -> RetinaNet:
    """RetinaNet on the maps."""
    return RetinaNet(pyramid(), classes, anchor_generator=sides(), **SQUARE)


def faster_rcnn(classes: int = 3) -> FasterRCNN:
    """Faster R-CNN that looks at proposals in the map of their size."""
    pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2, canonical_scale=NEXT_MAP)
    return FasterRCNN(pyramid(), classes, rpn_anchor_generator=sides(), box_roi_pool=pool, **SQUARE)


class Whole(nn.Module):
    """One box a picture, the whole of it: the least that fits."""

    iou, loss_names = 0.5, ("classification",)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def dense(self, x: Tensor) -> Dense:
        box = torch.tensor([0.0, 0, SIZE, SIZE]).expand(x.shape[0], 1, 1, 4)
        return Dense(box, self.head(x.mean((2, 3)))[:, None])

    def losses(self, x, truth):
        logits = self.dense(x).logits[:, 0]
        wanted = [one.labels[:1] + 1 if len(one.labels) else torch.tensor([0]) for one in truth]
        each = nn.functional.cross_entropy(logits, torch.cat(wanted), reduction="none")
        return [{"classification": value} for value in each]


def classifier() -> nn.Module:
    """No object detector."""
    return nn.Linear(3, 3)
