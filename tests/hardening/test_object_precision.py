"""Average precision and what people see of boxes."""

import math

import pytest
import torch

from rampart.hardening.objects.boxes import Found, Truth
from rampart.hardening.objects.precision import count, hits, interval, precision, resampled

BOX, FAR, OFF = [10.0, 10, 50, 50], [100.0, 100, 140, 160], [60.0, 60, 90, 90]


def truth(*boxes: list[float], labels: list[int]) -> Truth:
    return Truth(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64))


def found(*boxes: list[float], scores: list[float], labels: list[int]) -> Found:
    return Found(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
    )


REAL = [truth(BOX, FAR, labels=[0, 1]), truth(labels=[]), truth(BOX, labels=[0])]
RIGHT = [
    found(BOX, FAR, scores=[0.9, 0.8], labels=[0, 1]),
    found(scores=[], labels=[]),
    found(BOX, scores=[0.7], labels=[0]),
]


def test_all_found_is_one_and_nothing_found_is_none() -> None:
    best = precision(REAL, RIGHT, 2)
    assert (best.map50, best.ap, best.classes) == (1, 1, (1, 1))
    nothing = [found(scores=[], labels=[])] * 3
    assert precision(REAL, nothing, 2).map50 == 0


def test_a_false_box_costs_what_it_ranks_before() -> None:
    sure = [*RIGHT[:1], found(OFF, scores=[0.95], labels=[0]), RIGHT[2]]
    # Class 0: false, true, true, so the precision is 2/3 at every recall; class 1 is untouched.
    assert precision(REAL, sure, 2).classes == pytest.approx((2 / 3, 1))
    weak = [*RIGHT[:1], found(OFF, scores=[0.1], labels=[0]), RIGHT[2]]
    assert precision(REAL, weak, 2).map50 == 1


def test_wrong_labels_and_loose_boxes_do_not_count() -> None:
    mislabelled = [one._replace(labels=1 - one.labels) for one in RIGHT]
    assert precision(REAL, mislabelled, 2).map50 == 0
    loose = [RIGHT[0], RIGHT[1], found([10, 10, 50, 40], scores=[0.7], labels=[0])]  # IoU 0.75
    figures = precision(REAL, loose, 2)
    assert figures.map50 == 1 and figures.ap < 0.95


def test_a_class_that_no_picture_shows_does_not_count() -> None:
    figures = precision(REAL, RIGHT, 3)
    assert figures.map50 == 1 and math.isnan(figures.classes[2])


def test_the_interval_holds_the_figure_and_is_wide_for_few_pictures() -> None:
    half = [RIGHT[0], RIGHT[1], found(scores=[], labels=[])]
    value = precision(REAL, half, 2).map50
    low, high = interval(REAL, half, 2)
    assert low <= value <= high and high - low > 0.2
    assert interval(REAL, half, 2) == (low, high)


def test_what_is_resampled_for_intervals_is_what_the_library_says() -> None:
    draws = torch.Generator().manual_seed(0)
    real, seen = [], []
    for _ in range(20):
        corner, side = torch.rand(5, 2, generator=draws) * 60, torch.rand(5, 2, generator=draws)
        boxes = torch.cat([corner, corner + 10 + 30 * side], 1)
        labels = torch.randint(3, (5,), generator=draws)
        real.append(Truth(boxes, labels))
        moved = boxes.repeat(2, 1) + torch.randn(10, 4, generator=draws) * 3
        scores = torch.rand(10, generator=draws)
        seen.append(Found(moved, scores, labels.repeat(2)))
    every = [hits(*pair, 3) for pair in zip(real, seen, strict=True)]
    assert resampled(every, 3) == pytest.approx(precision(real, seen, 3).map50, abs=1e-6)
    assert 0.3 < resampled(every, 3) < 0.95


def test_pictures_without_objects_have_no_interval() -> None:
    assert all(math.isnan(bound) for bound in interval(REAL[1:2], RIGHT[1:2], 2))


def test_people_see_sure_boxes_once_for_each_object() -> None:
    twice = found(BOX, BOX, OFF, FAR, scores=[0.9, 0.8, 0.6, 0.4], labels=[0, 0, 1, 1])
    assert count(REAL[0], twice) == (2, 1, 2)
    assert count(REAL[1], twice) == (0, 0, 3)
    assert count(REAL[0], RIGHT[1]) == (2, 0, 0)
