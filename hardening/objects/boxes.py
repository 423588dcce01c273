"""Boxes with their classes: what is true of a picture, and what a network says of it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

FLOOR = 0.01  # candidates with lower scores are none; a server shows far fewer


class Truth(NamedTuple):
    """The objects of one picture; there may be none."""

    boxes: Tensor  # (M, 4) x1, y1, x2, y2 in pixels of the model's input
    labels: Tensor  # (M,) int64, from 0


class Found(NamedTuple):
    """The objects that a network found in one picture, the surest first."""

    boxes: Tensor  # (M, 4)
    scores: Tensor  # (M,)
    labels: Tensor  # (M,) int64, from 0


class Dense(NamedTuple):
    """What a network says of its A anchors or proposals, before any choice among them."""

    boxes: Tensor  # (N, A, R, 4) in pixels; R is 1, or K where each class has a box of its own
    logits: Tensor  # (N, A, K + 1) of background and the K classes


class Candidates(NamedTuple):
    """The C strongest boxes of each picture, however weak, before non-maximum suppression."""

    boxes: Tensor  # (N, C, 4) x1, y1, x2, y2 in pixels of the model's input
    scores: Tensor  # (N, C) in [0, 1]
    labels: Tensor  # (N, C) int64, from 0: no background


def strongest(dense: Dense, count: int) -> Candidates:
    """The `count` anchors that score highest for each class: C = K * min(count, A)."""
    scores = dense.logits.softmax(2)[:, :, 1:].transpose(1, 2)  # (N, K, A)
    top, index = scores.topk(min(count, dense.logits.shape[1]), dim=2)
    classes = scores.shape[1]
    every = dense.boxes.transpose(1, 2)  # (N, R, A, 4)
    # Written so that a graph keeps its batch dynamic.
    boxes = torch.gather(
        every.expand(-1, classes, -1, -1), 2, index[..., None].expand(-1, -1, -1, 4)
    )
    labels = torch.arange(classes, device=top.device)[None, :, None].expand_as(index)
    return Candidates(boxes.flatten(1, 2), top.flatten(1), labels.flatten(1))


def suppressed(candidates: Candidates, *, iou: float, most: int) -> list[Found]:
    """The candidates that are left of those that overlap by more than `iou`, class by class."""
    found = []
    for boxes, scores, labels in zip(*candidates, strict=True):
        sure = scores > FLOOR
        boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
        keep = batched_nms(boxes, scores, labels, iou)[:most]
        found.append(Found(boxes[keep], scores[keep], labels[keep]))
    return found
