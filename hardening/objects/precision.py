"""Average precision of objects found, by faster-coco-eval, with intervals over pictures.

Sources: average precision at IoU 0.5, Everingham et al. 2010; from 0.5 to 0.95, Lin et al. 2014.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from rampart.hardening.model.arrays import Bools, Floats
from rampart.hardening.objects.boxes import Found, Truth

DRAWS = 1000  # of the bootstrap
SHOWN = 0.5  # score from which a box is shown to people, for recall and false boxes
IOU = 0.5  # from which a box is that of an object


class Precision(NamedTuple):
    """How well objects were found in some pictures."""

    map50: float  # mean over classes, at IoU 0.5
    ap: float  # mean over classes and IoU from 0.5 to 0.95
    classes: tuple[float, ...]  # at IoU 0.5; nan where no picture has the class


def precision(truth: Sequence[Truth], found: Sequence[Found], classes: int) -> Precision:
    """Average precision of what was found in each picture."""
    from faster_coco_eval import COCO, COCOeval_faster  # as classifiers do without

    own, out = annotations(truth), detections(found)
    if not own:
        return Precision(float("nan"), float("nan"), (float("nan"),) * classes)
    if not out:
        return Precision(0.0, 0.0, (0.0,) * classes)
    images = [{"id": number, "width": 1, "height": 1} for number, _ in enumerate(truth, 1)]
    names = [{"id": index, "name": str(index)} for index in range(1, classes + 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO({"images": images, "annotations": own, "categories": names})
        judge = COCOeval_faster(real, real.loadRes(out), "bbox", print_function=lambda *_: None)
        judge.run()
    # (10 IoU, 101 recalls, K, areas, detections); -1 where there is no object of the class
    values: Floats = np.asarray(judge.eval["precision"])[:, :, :, 0, -1]
    values = np.where(values < 0, np.nan, values)
    present = ~np.isnan(values[0]).all(0)
    at50 = [float(values[0, :, k].mean()) if present[k] else float("nan") for k in range(classes)]
    return Precision(float(np.nanmean(at50)), float(values[:, :, present].mean()), tuple(at50))


def interval(truth: Sequence[Truth], found: Sequence[Found], classes: int) -> tuple[float, float]:
    """95% interval of `map50`, by bootstrap over pictures; nan where there is no object."""
    every = [hits(*pair, classes) for pair in zip(truth, found, strict=True)]
    draws = np.random.default_rng(0).integers(0, len(every), (DRAWS, len(every)))
    values = np.array([resampled([every[row] for row in rows], classes) for rows in draws])
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


class Hits(NamedTuple):
    """What was found in one picture, and how many objects each class has in it."""

    scores: Floats  # (M,)
    labels: NDArray[np.int64]  # (M,)
    right: Bools  # (M,) whether it is the first for an object, at IoU 0.5
    objects: NDArray[np.int64]  # (K,)


def hits(truth: Truth, found: Found, classes: int) -> Hits:
    """What was found, and which of it `matched`, as `precision` counts it at IoU 0.5."""
    objects = np.bincount(truth.labels.cpu().numpy(), minlength=classes)
    scores, labels = found.scores.cpu().numpy(), found.labels.cpu().numpy()
    return Hits(scores, labels, matched(truth, found), objects)


def matched(truth: Truth, found: Found) -> Bools:
    """Which boxes (M,) are the first for an object of their class, the surest first."""
    overlap = box_iou(found.boxes, truth.boxes) * (found.labels[:, None] == truth.labels)
    overlap, right = overlap.cpu().numpy(), np.zeros(len(found.scores), dtype=bool)
    for row in found.scores.argsort(descending=True, stable=True).tolist():
        if len(truth.boxes) and overlap[row].max() >= IOU:
            overlap[:, overlap[row].argmax()] = 0
            right[row] = True
    return right


def resampled(every: Sequence[Hits], classes: int) -> float:
    """`map50` over these pictures, from matches that are known, with COCO's 101 recalls."""
    scores, labels, right = (np.concatenate([one[i] for one in every]) for i in range(3))
    objects = np.sum([one.objects for one in every], 0)
    order, values = np.argsort(-scores, kind="stable"), []
    for label in np.flatnonzero(objects):
        own = right[order][labels[order] == label]
        found = own.cumsum()
        share = found / np.arange(1, len(own) + 1)
        share = np.maximum.accumulate(share[::-1])[::-1]  # never falls with fewer boxes
        place = np.searchsorted(found / objects[label], np.linspace(0, 1, 101))
        values.append(np.append(share, 0)[np.minimum(place, len(own))].mean())
    return float(np.mean(values)) if values else float("nan")


def annotations(truth: Sequence[Truth]) -> list[dict[str, Any]]:
    """The objects of all pictures, as COCO has them."""
    every = [
        {"image_id": number, "category_id": label + 1, "bbox": box, "area": box[2] * box[3]}
        for number, one in enumerate(truth, 1)
        for box, label in zip(corner_and_sides(one.boxes), one.labels.tolist(), strict=True)
    ]
    return [item | {"id": number, "iscrowd": 0} for number, item in enumerate(every, 1)]


def detections(found: Sequence[Found]) -> list[dict[str, Any]]:
    """What was found in all pictures, as COCO has it."""
    return [
        {"image_id": number, "category_id": label + 1, "bbox": box, "score": score}
        for number, one in enumerate(found, 1)
        for box, label, score in zip(
            corner_and_sides(one.boxes), one.labels.tolist(), one.scores.tolist(), strict=True
        )
    ]


def corner_and_sides(boxes: torch.Tensor) -> list[list[float]]:
    """Boxes (M, 4) as x, y, width, height."""
    sides: list[list[float]] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    return sides


class Count(NamedTuple):
    """Objects of a picture, those found among what is shown, and boxes shown that are none's."""

    objects: int
    kept: int
    false: int


def count(truth: Truth, found: Found) -> Count:
    """What people see of one picture: boxes that score SHOWN or more, the surest first."""
    sure = found.scores >= SHOWN
    kept = int(matched(truth, Found(*(part[sure] for part in found))).sum())
    return Count(len(truth.boxes), kept, int(sure.sum()) - kept)
