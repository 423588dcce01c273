"""Faster R-CNN: proposals, and a second look at each, as torchvision defines it (Ren et al. 2015).

Its proposals are of a fixed number: the strongest of all levels, with no suppression among them. So
the graph has one shape for all pictures.
"""

import math
import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from rampart.hardening.objects.boxes import Dense, Truth

PROPOSALS = 256  # of a picture
HIDDEN = 256  # of the second look
POOLED = 7  # cells a side that a proposal is looked at by
# An attack that follows a loss must find the same one at the same place.
EVERY = BalancedPositiveNegativeSampler(sys.maxsize, 0.5)
NAMES = {
    "loss_classifier": "classification",
    "loss_box_reg": "localization",
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposals",
}


class TwoStage(nn.Module):
    """A Faster R-CNN without its resizing: x (N, 3, S, S), normalized, to what proposals say."""

    loss_names = tuple(NAMES.values())

    def __init__(self, rcnn: FasterRCNN, size: int) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = rcnn.backbone, rcnn.rpn, rcnn.roi_heads
        self.iou: float = rcnn.roi_heads.nms_thresh
        self.size = size
        self._draws = self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler
        x = torch.zeros(1, 3, size, size)
        with torch.no_grad():
            maps = list(rcnn.eval().backbone(x).values())
            (anchors,) = self.rpn.anchor_generator(ImageList(x, [(size, size)]), maps)
        self.register_buffer("anchors", anchors, persistent=False)
        self.anchors: Tensor

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The pyramid of features, in float32."""
        return {name: value.float() for name, value in self.backbone(x).items()}

    def proposals(self, maps: dict[str, Tensor]) -> Tensor:
        """The strongest proposals (N, P, 4); gradients go through the second look alone."""
        every, codes = concat_box_prediction_layers(*self.rpn.head(list(maps.values())))
        count = next(iter(maps.values())).shape[0]
        objectness = every.reshape(count, -1).detach()  # (N, A)
        index = objectness.topk(min(PROPOSALS, self.anchors.shape[0]), dim=1).indices
        chosen = torch.gather(
            codes.reshape(count, -1, 4).detach(), 1, index[..., None].expand(-1, -1, 4)
        )
        anchors = self.anchors[index].reshape(-1, 4)
        boxes = self.rpn.box_coder.decode_single(chosen.reshape(-1, 4), anchors)
        proposals: Tensor = boxes.clamp(0, self.size).reshape(count, -1, 4)
        return proposals

    def dense(self, x: Tensor) -> Dense:
        """Boxes, one a class, and logits of all proposals."""
        maps = self.maps(x)
        proposals = self.proposals(maps)
        count, number = proposals.shape[:2]
        pooled = self.pooled(maps, proposals)
        logits, codes = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        boxes = self.roi_heads.box_coder.decode_single(codes, proposals.reshape(-1, 4))
        boxes = boxes.clamp(0, self.size).reshape(count, number, -1, 4)[:, :, 1:]
        return Dense(boxes, logits.float().reshape(count, number, -1))

    def pooled(self, maps: dict[str, Tensor], proposals: Tensor) -> Tensor:
        """What each of the proposals (N, P, 4) covers of the map of its size, (N * P, C, 7, 7).

        As `box_roi_pool` does it, but for any batch: a graph cannot go through a list of pictures,
        so each proposal is looked at in every map.
        """
        pool = self.roi_heads.box_roi_pool
        count, number = proposals.shape[:2]
        picture = torch.arange(count, device=proposals.device).to(proposals.dtype)
        rows = picture[:, None, None].expand(-1, number, -1)
        rois = torch.cat([rows, proposals], dim=2).reshape(-1, 5)
        looked_at = [maps[name] for name in pool.featmap_names if name in maps]
        scales = [one.shape[-1] / self.size for one in looked_at]
        every = [
            roi_align(one, rois, pool.output_size, scale, pool.sampling_ratio)
            for one, scale in zip(looked_at, scales, strict=True)
        ]
        out: Tensor = every[0]
        if len(every) > 1:
            coarsest, finest = (round(-math.log2(scale)) for scale in (scales[-1], scales[0]))
            sizes = (pool.canonical_scale, pool.canonical_level)
            level = initLevelMapper(finest, coarsest, *sizes)([proposals.reshape(-1, 4)])
            for number, other in enumerate(every[1:], start=1):
                out = torch.where((level == number)[:, None, None, None], other, out)
        return out

    def losses(self, x: Tensor, truth: Sequence[Truth]) -> list[dict[str, Tensor]]:
        """Faster R-CNN's losses of each image: in training of anchors and proposals drawn at
        random, else of all anchors and of the proposals that are looked at.
        """
        maps, each = self.maps(x), []
        draws = self._draws if self.training else (EVERY, EVERY)
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = draws
        # They say whether losses are computed; that of BatchNorm is another matter.
        self.rpn.training = self.roi_heads.training = True
        shape = (self.size, self.size)
        for row, (boxes, labels) in enumerate(truth):
            own = {name: value[row : row + 1] for name, value in maps.items()}
            target = [{"boxes": boxes, "labels": labels + 1}]
            found, first = self.rpn(ImageList(x[row : row + 1], [shape]), own, target)
            if not self.training:
                found = [*self.proposals(own)]
            _, second = self.roi_heads(own, found, [shape], target)
            each.append({NAMES[name]: value for name, value in (first | second).items()})
        return each


def faster_rcnn_on(
    pyramid: nn.Module, channels: int, classes: int, size: int, scales: Sequence[float]
) -> TwoStage:
    """Faster R-CNN on the maps, of `channels` each, of a pyramid of features."""
    pyramid.out_channels = channels  # type: ignore[assignment]
    sides = tuple(
        (int(low * size), int((low * high) ** 0.5 * size)) for low, high in pairwise(scales)
    )
    rcnn = FasterRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides)),
        rpn_batch_size_per_image=128,
        box_batch_size_per_image=128,
        box_roi_pool=MultiScaleRoIAlign(["0"], POOLED, sampling_ratio=2),
        box_head=TwoMLPHead(channels * POOLED**2, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, classes + 1),
    )
    return TwoStage(rcnn, size)
