import copy
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rampart.handlers.verdict import p_values
from rampart.hardening.judge import alarms
from rampart.hardening.judge.alarms import Judged
from rampart.hardening.model import calibrate
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.images import Images, split


@pytest.fixture(scope="module")
def full(tiny_folder: Path) -> Judged:
    pipeline, _ = pipelines.load(tiny_folder / "weights.safetensors", "full")
    return Judged(pipeline, calibrate.load_variant(tiny_folder, "full"))


@pytest.mark.parametrize("name", alarms.WAYS)
def test_every_way_gives_the_endpoint_the_same_scene(name: str) -> None:
    few = alarms.photographs(32)[::50]
    arrived = alarms.sent(few, alarms.WAYS[name])
    assert arrived.shape == few.shape
    assert arrived.dtype == torch.uint8
    changed = (arrived.int() - few.int()).abs().float()
    assert changed.mean() < 32
    assert (changed.max() == 0) == (name == alarms.AS_RANKED)
    assert torch.equal(arrived, alarms.sent(few, alarms.WAYS[name]))


def test_jpeg_loses_more_at_lower_quality(tiny_images: Images) -> None:
    few = tiny_images.image[:4]
    lost = [
        (alarms.sent(few, alarms.WAYS[f"JPEG, quality {q}"]).int() - few.int()).abs().float().mean()
        for q in (95, 75, 50)
    ]
    assert lost == sorted(lost)
    assert lost[0] < lost[2]


def test_an_enlarged_picture_and_a_screenshot_are_larger_than_the_model_takes(
    tiny_images: Images,
) -> None:
    picture = Image.fromarray(tiny_images.image[0].numpy())
    for way, side in ((alarms.enlarged, 224), (alarms.WAYS["screenshot"], 80)):
        with Image.open(BytesIO(way(picture))) as file:
            assert file.size == (side, side)


def test_photographs_are_many_different_pictures() -> None:
    pictures = alarms.photographs(32)
    assert pictures.shape == (len(alarms.PHOTOGRAPHS) * alarms.CROPS, 32, 32, 3)
    assert len({picture.numpy().tobytes() for picture in pictures}) > 190
    assert torch.equal(pictures, alarms.photographs(32))


def test_other_pictures_than_those_ranked_are_flagged_more_often(
    full: Judged, tiny_images: Images
) -> None:
    ranked = split(tiny_images, "calibration")
    rows = {row["way"]: row for row in alarms.false_alarms([full], ranked, rate=0.1)}
    *ways, crops = rows
    assert ways == list(alarms.WAYS)
    same = rows[alarms.AS_RANKED]
    assert same["value"] <= 0.1
    assert same["drift"] < 0.02
    assert not same["too_many"]
    # Smooth blobs were ranked, and photographs are rough.
    assert rows[crops]["n"] == 200
    assert rows[crops]["too_many"]
    assert rows[crops]["drift"] > 0.3
    for row in rows.values():
        assert row["interval"][0] <= row["value"] <= row["interval"][1]


@pytest.mark.parametrize(("flagged", "many"), [((1, 1, 1, 1, 0), True), ((1, 0, 0, 0, 0), False)])
def test_crops_are_too_many_where_two_photographs_are_and_not_for_one_or_all_alone(
    flagged: tuple[int, ...],
    many: bool,
    full: Judged,
    tiny_images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = np.repeat(1.0 - np.array(flagged), alarms.CROPS)
    monkeypatch.setattr(alarms, "p_of", lambda _, image: share if len(image) == 200 else [1.0])
    monkeypatch.setattr(alarms, "WAYS", {})
    (row,) = alarms.false_alarms([full], tiny_images, rate=0.05)
    assert row["too_many"] is many and row["value"] == sum(flagged) / 5


def test_each_class_is_told_how_many_of_its_images_are_flagged(
    full: Judged, tiny_images: Images
) -> None:
    few = split(tiny_images, "validation")
    net = copy.deepcopy(full.pipeline)
    # Untrained, it takes all images for one class: no class shall be more likely than another.
    net.classifier.head.bias -= net(few.image).logits.mean(0)
    judged, out = Judged(net, calibrate.calibrate(net, tiny_images, "full")), net(few.image)
    rows = list(alarms.by_class([judged], few, rate=0.3))
    flagged = p_values(out.scores.numpy(), judged.calibration) < 0.3
    for row in rows:
        index = few.classes.index(row["way"].removeprefix("taken for "))
        own = out.logits.argmax(1).numpy() == index
        assert row["n"] == own.sum()
        assert row["value"] == pytest.approx(flagged[own].mean(), abs=1e-4)
    assert sum(row["n"] for row in rows) == len(few)
    assert len({row["value"] for row in rows}) > 1
    assert not any(row["too_many"] for row in rows)
    # Ranked among another network's scores, they are flagged beyond chance.
    late = list(alarms.by_class([full._replace(pipeline=net)], few, rate=0.01))
    assert any(row["too_many"] for row in late if row["n"] > 5)
    assert not any(row["too_many"] for row in late if round(row["n"] * row["value"]) == 1)


def test_variants_that_take_other_images_for_a_class_stand_in_one_table() -> None:
    row = {"way": "taken for cat", "variant": "full", "value": 0.25, "interval": [0.1, 0.5], "n": 4}
    row |= {"drift": 0.5, "too_many": True}
    lean = row | {"variant": "lean", "n": 5, "too_many": False}
    dog = lean | {"way": "taken for dog"}
    head, body = alarms.table([row, lean, dog])
    assert len(head) == 6
    share = "25.0% (10.0% to 50.0%)"
    assert body[0] == ("taken for cat", "4, 5", f"{share} too many", "0.500", share, "0.500")
    assert body[1] == ("taken for dog", "5", "-", "-", share, "0.500")
    assert alarms.remedies([row, lean, dog]) == [
        "full: taken for cat flags 25.0%: the promise is over all classes together; to reject"
        " few of these, lower the rate"
    ]


def test_rates_that_so_few_images_cannot_rank_are_left_out() -> None:
    points = list(alarms.coverage(np.arange(104.0), splits=5))
    assert [point["alpha"] for point in points] == [0.05, 0.1]


def test_what_flags_too_many_is_named_with_the_remedy() -> None:
    row = {"way": "screenshot", "variant": "full", "value": 0.2, "too_many": True}
    fine = {**row, "way": "PNG", "too_many": False}
    (line,) = alarms.remedies([row, fine])
    assert line.startswith("full: screenshot flags 20.0%: ")
    assert "rampart calibrate --archive" in line


def test_coverage_over_random_splits_is_what_the_theory_says() -> None:
    scores = np.random.default_rng(1).normal(size=1000)
    for point in alarms.coverage(scores, splits=2000):
        assert point["theory"] <= point["alpha"]
        assert point["flagged"] == pytest.approx(point["theory"], rel=0.03)
        np.testing.assert_allclose(point["middle_95%"], point["theory_95%"], atol=0.005)
    assert [point["alpha"] for point in alarms.coverage(scores, splits=1)] == [0.01, 0.05, 0.1]


def test_the_table_has_its_columns_for_each_variant() -> None:
    row = {"way": "PNG", "value": 0.01, "interval": [0.005, 0.02], "n": 10, "drift": 0.002}
    rows = [{**row, "variant": v, "too_many": v == "lean"} for v in ("full", "lean")]
    head, body = alarms.table(rows)
    assert head[2::2] == ("full: flagged", "lean: flagged")
    share = "1.0% (0.5% to 2.0%)"
    assert body == [("PNG", "10", share, "0.002", f"{share} too many", "0.002")]
