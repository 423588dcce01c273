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
    assert evaluate.share(parts) == pytest.approx(1 / 3)


def test_attacked_images_come_in_float_and_8_bit_pairs_within_eps(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    few = tiny_images[slice(4)]
    loss_of = evaluate.joint_loss(tiny_pipeline, calibration, 0.01, 0.0)
    (x, _), (rounded, _) = evaluate.attacked(few, loss_of, THREAT, title="")
    clean = few.image.permute(0, 3, 1, 2) / 255
    assert float((x - clean).abs().max()) <= THREAT.eps + 1e-6
    assert float((rounded - clean).abs().max()) <= THREAT.eps + 1e-6
    torch.testing.assert_close(rounded * 255, (rounded * 255).round(), atol=1e-4, rtol=0)
    assert float((x - rounded).abs().max()) <= 0.5 / 255 + 1e-6


def test_the_multiplier_moves_the_attack_towards_staying_accepted(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, calibration: Calibration
) -> None:
    few, rate = tiny_images[slice(24)], 0.2
    margins = []
    for multiplier in (0.0, 10.0):
        loss_of = evaluate.joint_loss(tiny_pipeline, calibration, rate, multiplier)
        (x, _), _ = evaluate.attacked(few, loss_of, THREAT, title="")
        with torch.no_grad():
            scores = tiny_pipeline.defend(x).scores
        margin = evaluate.detection_margin(scores, calibration, rate)
        margins.append(float(margin.clamp_min(0).mean()))
    assert margins[1] < 0.5 * margins[0]


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
