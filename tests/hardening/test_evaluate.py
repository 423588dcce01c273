from pathlib import Path

import pytest
import torch

from handlers.verdict import Calibration
from hardening import evaluate
from hardening.attacks import Threat
from hardening.calibrate import load_variant
from hardening.data import Images
from hardening.pipeline import DefendedClassifier

THREAT = Threat("Linf", 8 / 255)


@pytest.fixture(scope="module")
def calibration(tiny_folder: Path) -> Calibration:
    return load_variant(tiny_folder, "full")


def test_an_image_counts_only_if_it_survives_in_float_and_in_8_bits() -> None:
    parts = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    assert evaluate.survivors(parts).tolist() == [True, False, False]


def test_attacked_images_come_in_float_and_8_bit_pairs_within_eps(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    few = tiny_images[slice(4)]
    loss_of = evaluate.joint_loss(tiny_pipeline, calibration, 0.01, "ignore")
    (x, _), (rounded, _) = evaluate.attacked(few, loss_of, THREAT, title="")
    clean = few.image.permute(0, 3, 1, 2) / 255
    assert float((x - clean).abs().max()) <= THREAT.eps + 1e-6
    assert float((rounded - clean).abs().max()) <= THREAT.eps + 1e-6
    torch.testing.assert_close(rounded * 255, (rounded * 255).round(), atol=1e-4, rtol=0)
    assert float((x - rounded).abs().max()) <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("aim", ["penalty", "selective"])
def test_an_aim_at_the_detectors_brings_wrong_images_closer_to_being_accepted(
    aim: str, tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    few, rate = tiny_images[slice(24)], 0.2
    margins = []
    for name in ("ignore", aim):
        loss_of = evaluate.joint_loss(tiny_pipeline, calibration, rate, name)
        (x, _), _ = evaluate.attacked(few, loss_of, THREAT, title="")
        with torch.no_grad():
            scores = tiny_pipeline.defend(x).scores
        margins.append(evaluate.detection_margin(scores, calibration, rate))
    assert (margins[1] < margins[0]).float().mean() > 0.8


def test_a_step_that_wins_is_kept_over_one_with_more_cross_entropy(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    x = tiny_images.image[:64].permute(0, 3, 1, 2) / 255
    guess, accepted = evaluate.decide(tiny_pipeline, x, calibration, 0.5)
    label = guess.clone()
    label[::2] = (label[::2] + 1) % 10
    losses = evaluate.joint_loss(tiny_pipeline, calibration, 0.5, "penalty")(label)(x)
    wins = (guess != label) & accepted
    assert 0 < int(wins.sum()) < int((guess != label).sum())
    assert losses[wins].min() > losses[~wins].max()


def test_the_rungs_agree_with_each_other(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    few = tiny_images[slice(32)]
    rungs = evaluate.pipeline_rungs(tiny_pipeline, calibration, few, THREAT, rate=0.1)
    value = {metric.name: metric.value for metric in rungs}
    assert value["pgd20"] <= value["clean"]
    assert value["accepted_and_wrong"] == pytest.approx(1 - value["robust_with_rejection@10%"])
    assert value["robust_with_rejection@10%"] <= 1
    alone = evaluate.classifier_rungs(tiny_pipeline.classifier, few, THREAT)
    value = {metric.name: metric.value for metric in alone}
    assert value["pgd20"] < value["clean"]


def test_fool_changes_the_label_within_eps(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    image = tiny_images.image[:8]
    attacked = evaluate.fool(tiny_pipeline, calibration, image, THREAT, rate=0.01)
    assert attacked.dtype == torch.uint8
    assert int((attacked.int() - image.int()).abs().max()) <= 8
    with torch.no_grad():
        changed = tiny_pipeline(attacked).logits.argmax(1) != tiny_pipeline(image).logits.argmax(1)
    # An untrained network has no defence: nearly all labels must fall.
    assert changed.float().mean() > 0.7
