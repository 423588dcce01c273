"""Boxes and classes from every cell of several feature maps, as torchvision defines it.

Sources: SSD, Liu et al. 2016; SSDLite, Sandler et al. 2018 (section 6.2); the pyramid of features,
Lin et al. 2017a; RetinaNet, Lin et al. 2017b.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou

from rampart.hardening.objects.boxes import Dense, Truth

RATIOS = (2, 3)  # of the sides of an anchor, beside squares


class SingleStage(nn.Module):
    """An SSD or RetinaNet without its resizing: x (N, 3, S, S), normalized, to what anchors say."""

    loss_names = ("classification", "localization")

    def __init__(self, whole: SSD | RetinaNet, size: int) -> None:
        super().__init__()
        self.backbone, self.head, self.size = whole.backbone, whole.head, size
        self.iou: float = whole.nms_thresh
        self._whole = [whole]  # beside the parts that have weights, what computes their losses
        self.register_buffer("anchors", anchors(whole, size), persistent=False)
        self.anchors: Tensor

    def raw(self, x: Tensor) -> dict[str, Tensor]:
        """`cls_logits` (N, A, K + 1) and `bbox_regression` (N, A, 4), in float32."""
        outputs = self.head(list(self.backbone(x).values()))
        return {name: value.float() for name, value in outputs.items()}

    def dense(self, x: Tensor) -> Dense:
        """Boxes, within the picture, and logits of all anchors."""
        outputs = self.raw(x)
        codes = outputs["bbox_regression"]
        every = self.anchors.expand(codes.shape[0], -1, -1).reshape(-1, 4)
        boxes = self._whole[0].box_coder.decode_single(codes.reshape(-1, 4), every)
        boxes = boxes.clamp(0, self.size).reshape(codes.shape)
        return Dense(boxes[:, :, None], self.against_background(outputs["cls_logits"]))

    def against_background(self, logits: Tensor) -> Tensor:
        """Logits (N, A, K + 1) as softmax takes them: RetinaNet has each class alone."""
        if isinstance(self._whole[0], SSD):
            return logits
        return torch.cat([torch.zeros_like(logits[:, :, :1]), logits[:, :, 1:]], dim=2)

    def losses(self, x: Tensor, truth: Sequence[Truth]) -> list[dict[str, Tensor]]:
        """The losses of each image."""
        outputs = self.raw(x)
        each = []
        for row, (boxes, labels) in enumerate(truth):
            own = {name: value[row : row + 1] for name, value in outputs.items()}
            target = {"boxes": boxes, "labels": labels + 1}
            whole = self._whole[0]
            if isinstance(whole, RetinaNet):
                out = whole.compute_loss([target], own, [self.anchors])
            elif len(boxes):
                matched = whole.proposal_matcher(box_iou(boxes, self.anchors))
                out = whole.compute_loss([target], own, [self.anchors], [matched])
            else:
                out = {"bbox_regression": codes_of_none(own), "classification": nothing(own)}
            each.append(
                {"classification": out["classification"], "localization": out["bbox_regression"]}
            )
        return each


def codes_of_none(outputs: dict[str, Tensor]) -> Tensor:
    """The loss of where boxes are, in a picture without any."""
    return outputs["bbox_regression"].sum() * 0


def nothing(outputs: dict[str, Tensor], *, hardest: int = 3) -> Tensor:
    """The cross-entropy of a picture without objects, of which SSD would learn nothing: that of
    the few anchors that are the surest of one.
    """
    background = outputs["cls_logits"][0].log_softmax(1)[:, 0]
    return -background.topk(hardest, largest=False).values.sum()


def anchors(whole: SSD | RetinaNet, size: int) -> Tensor:
    """The anchors (A, 4) of a square picture, in pixels."""
    x = torch.zeros(1, 3, size, size)
    training = whole.training
    whole.eval()
    with torch.no_grad():
        maps = list(whole.backbone(x).values())
        (boxes,) = whole.anchor_generator(ImageList(x, [(size, size)]), maps)
    whole.train(training)
    result: Tensor = boxes
    return result


def ssdlite(classes: int, size: int, scales: Sequence[float]) -> SingleStage:
    """SSDLite on MobileNetV3, for pictures of other sizes than its 320 pixels too."""
    whole = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes + 1
    )
    generator = DefaultBoxGenerator([list(RATIOS)] * 6, scales=list(scales))
    return SingleStage(with_head(whole.backbone, whole.head, generator, classes, size), size)


def ssd_on(
    pyramid: nn.Module, channels: int, classes: int, size: int, scales: Sequence[float]
) -> SingleStage:
    """SSD's heads on the maps, of `channels` each, of a pyramid of features."""
    pyramid.out_channels = [channels] * (len(scales) - 1)  # type: ignore[assignment]
    generator = DefaultBoxGenerator([[2]] * (len(scales) - 1), scales=list(scales))
    return SingleStage(with_head(pyramid, None, generator, classes, size), size)


def with_head(
    backbone: nn.Module,
    head: nn.Module | None,
    generator: DefaultBoxGenerator,
    classes: int,
    size: int,
) -> SSD:
    """An SSD of these parts."""
    return SSD(backbone, generator, (size, size), classes + 1, head=head)
