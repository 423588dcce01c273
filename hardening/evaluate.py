"""How strong is the defence against somebody who knows all of it? First rungs: PGD-20.

    rampart evaluate model_store/NAME --data cifar10-test.npz

Every attack sees everything (gradients through purifier and detectors) and is scored on both its
float result and the same rounded to 8 bits, as a PNG carries it: an image is robust only if it
survives both.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from handlers.verdict import Calibration, p_values
from hardening.attacks import Loss, Threat, cross_entropy, pgd20
from hardening.calibrate import detection_margin
from hardening.data import Images, batches, to_float, to_uint8
from hardening.models import Classifier
from hardening.pipeline import DefendedClassifier
from hardening.report import Metric

BATCH = 128
# What one unit above the detection threshold costs the attacker's loss; 0 ignores the detectors.
MULTIPLIERS = (0.0, 0.1, 1.0)


def attacked(
    images: Images, loss_of: Callable[[Tensor], Loss], threat: Threat, *, title: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x_adv (B, 3, H, W), label (B,)) under PGD-20, and each again rounded to 8 bits."""
    generator = torch.Generator(images.image.device).manual_seed(0)
    total = math.ceil(len(images) / BATCH)
    for x, label in tqdm(batches(images, BATCH), total=total, desc=title, leave=False):
        adversarial = pgd20(loss_of(label), x, threat, generator=generator)
        yield adversarial, label
        yield to_float(to_uint8(adversarial)), label


def share(parts: list[Tensor]) -> float:
    """Mean over all images of (float, 8-bit) pairs in turn, the worse of the two per image."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    worst = torch.cat([first & second for first, second in pairs])
    return float(worst.double().mean())


def classifier_rungs(classifier: Classifier, images: Images, threat: Threat) -> Iterator[Metric]:
    """Clean accuracy and PGD-20 of the classifier alone."""
    n = len(images)
    with torch.no_grad():
        right = [classifier(x).argmax(1) == label for x, label in batches(images, BATCH)]
    yield Metric("classifier", "-", "clean", float(torch.cat(right).double().mean()), n)
    survived = []
    rounds = attacked(
        images, lambda label: cross_entropy(classifier, label), threat, title="classifier, PGD-20"
    )
    for x, label in rounds:
        with torch.no_grad():
            survived.append(classifier(x).argmax(1) == label)
    yield Metric("classifier", "-", "pgd20", share(survived), n, threat)


def decide(
    pipeline: DefendedClassifier, x: Tensor, calibration: Calibration, rate: float
) -> tuple[Tensor, Tensor]:
    """Predicted label (N,) and whether it is accepted (N,), as the endpoint would answer."""
    with torch.no_grad():
        out = pipeline.defend(x)
    p = p_values(out.scores.double().cpu().numpy(), calibration)
    return out.logits.argmax(1), torch.from_numpy(p >= rate).to(x.device)


def joint_loss(
    pipeline: DefendedClassifier, calibration: Calibration, rate: float, multiplier: float
) -> Callable[[Tensor], Loss]:
    """Be wrong *and* stay accepted: cross-entropy less a hinge on the detection margin."""

    def loss_of(label: Tensor) -> Loss:
        def loss(x: Tensor) -> Tensor:
            out = pipeline.defend(x)
            wrong = F.cross_entropy(out.logits, label, reduction="none")
            return wrong - multiplier * F.relu(detection_margin(out.scores, calibration, rate))

        return loss

    return loss_of


def pipeline_rungs(
    pipeline: DefendedClassifier,
    calibration: Calibration,
    images: Images,
    threat: Threat,
    *,
    rate: float,
) -> Iterator[Metric]:
    """Clean accuracy and rejection, then PGD-20 with full gradients through everything.

    `pgd20` is label accuracy when detectors are ignored; `accepted_and_wrong` counts an image when
    any multiplier of the joint attack gets a wrong label past the detectors.
    """
    variant, n = calibration.variant, len(images)
    decided = [decide(pipeline, x, calibration, rate) for x, _ in batches(images, BATCH)]
    label = images.label
    guess, accepted = (torch.cat(part) for part in zip(*decided, strict=True))
    yield Metric("pipeline", variant, "clean", float((guess == label).double().mean()), n)
    yield Metric("pipeline", variant, "clean_rejection", float((~accepted).double().mean()), n)
    safe: list[list[Tensor]] = []
    for multiplier in MULTIPLIERS:
        loss_of = joint_loss(pipeline, calibration, rate, multiplier)
        right, held = [], []
        title = f"{variant}, joint PGD-20, multiplier {multiplier:g}"
        for x, label in attacked(images, loss_of, threat, title=title):
            guess, accepted = decide(pipeline, x, calibration, rate)
            right.append(guess == label)
            held.append((guess == label) | ~accepted)
        safe.append(held)
        if multiplier == 0:
            yield Metric("pipeline", variant, "pgd20", share(right), n, threat)
    worst = [torch.stack(part).all(0) for part in zip(*safe, strict=True)]
    robust = share(worst)
    yield Metric("pipeline", variant, f"robust_with_rejection@{rate:.0%}", robust, n, threat)
    yield Metric("pipeline", variant, "accepted_and_wrong", 1 - robust, n, threat)


def fool(
    pipeline: DefendedClassifier,
    calibration: Calibration,
    image: Tensor,
    threat: Threat,
    *,
    rate: float,
) -> Tensor:
    """Attack each image uint8 (N, H, W, 3) away from its present label; returns 8-bit pixels.

    Of the multipliers the last that changes an image's label wins, then one that also stays
    accepted.
    """
    x = to_float(image)
    label, _ = decide(pipeline, x, calibration, rate)
    best, best_rank = image, torch.full_like(label, -1)
    for multiplier in MULTIPLIERS:
        generator = torch.Generator(x.device).manual_seed(0)
        loss = joint_loss(pipeline, calibration, rate, multiplier)(label)
        pixels = to_uint8(pgd20(loss, x, threat, generator=generator))
        guess, accepted = decide(pipeline, to_float(pixels), calibration, rate)
        rank = 2 * (guess != label).long() + accepted.long()
        best = torch.where((rank >= best_rank).view(-1, 1, 1, 1), pixels, best)
        best_rank = torch.maximum(rank, best_rank)
    return best


def describe(
    pipeline: DefendedClassifier,
    calibration: Calibration,
    image: Tensor,
    classes: tuple[str, ...],
    *,
    rate: float,
) -> str:
    """The verdict on one image uint8 (1, H, W, 3) in a few words."""
    with torch.no_grad():
        out = pipeline(image)
    confidence, index = out.logits.softmax(1)[0].max(0)
    p = float(p_values(out.scores.double().numpy(), calibration)[0])
    decision = "flag" if p < rate else "accept"
    return f"{classes[int(index)]} {float(confidence):.0%}, p = {p:.2g}: {decision}"
