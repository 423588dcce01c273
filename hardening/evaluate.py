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
from hardening.attacks import Loss, Threat, pgd20
from hardening.calibrate import detection_margin
from hardening.data import Images, batches, to_float, to_uint8
from hardening.models import Classifier
from hardening.pipeline import DefendedClassifier
from hardening.report import Metric

BATCH = 128
# How an attacker weighs the detectors: not at all; as a penalty beside the cross-entropy; or as the
# only aim while an image is wrong but flagged (selective gradients, Bryniarski et al. 2022).
JOINT = ("ignore", "penalty", "selective")
# Added to the loss of an image that wins, so that the best step kept is one that wins; constant, so
# it leaves the gradient alone.
WIN = 1e4


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


def survivors(parts: list[Tensor]) -> Tensor:
    """From batches that alternate float and 8-bit, the images (N,) that survive both."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return torch.cat([first & second for first, second in pairs])


def classifier_rungs(classifier: Classifier, images: Images, threat: Threat) -> Iterator[Metric]:
    """Clean accuracy and PGD-20 of the classifier alone."""
    n = len(images)
    with torch.no_grad():
        right = torch.cat([classifier(x).argmax(1) == y for x, y in batches(images, BATCH)])
    yield Metric("classifier", "-", "clean", float(right.double().mean()), n)
    survived = []

    def loss_of(label: Tensor) -> Loss:
        def loss(x: Tensor) -> Tensor:
            logits: Tensor = classifier(x)
            wrong = logits.argmax(1) != label
            values: Tensor = F.cross_entropy(logits, label, reduction="none")
            return values + WIN * wrong

        return loss

    for x, label in attacked(images, loss_of, threat, title="classifier, PGD-20"):
        with torch.no_grad():
            survived.append(classifier(x).argmax(1) == label)
    robust = float((right & survivors(survived)).double().mean())
    yield Metric("classifier", "-", "pgd20", robust, n, threat)


def decide(
    pipeline: DefendedClassifier, x: Tensor, calibration: Calibration, rate: float
) -> tuple[Tensor, Tensor]:
    """Predicted label (N,) and whether it is accepted (N,), as the endpoint would answer."""
    with torch.no_grad():
        out = pipeline.defend(x)
    p = p_values(out.scores.double().cpu().numpy(), calibration)
    return out.logits.argmax(1), torch.from_numpy(p >= rate).to(x.device)


def joint_loss(
    pipeline: DefendedClassifier, calibration: Calibration, rate: float, aim: str
) -> Callable[[Tensor], Loss]:
    """Be wrong *and* stay accepted, with gradients through purifier, classifier and detectors.

    `aim` is one of JOINT. Under "ignore" an image wins by being wrong, else by both.
    """

    def loss_of(label: Tensor) -> Loss:
        def loss(x: Tensor) -> Tensor:
            out = pipeline.defend(x)
            entropy = F.cross_entropy(out.logits, label, reduction="none")
            wrong = out.logits.argmax(1) != label
            if aim == "ignore":
                return entropy + WIN * wrong
            margin = detection_margin(out.scores, calibration, rate)
            wins = WIN * (wrong & (margin <= 0))
            if aim == "penalty":
                return entropy - F.relu(margin) + wins
            return torch.where(wrong & (margin > 0), -margin, entropy) + wins

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
    the clean image or any aim of the joint attack gets a wrong label past the detectors.
    """
    variant, n = calibration.variant, len(images)
    decided = [decide(pipeline, x, calibration, rate) for x, _ in batches(images, BATCH)]
    guess, accepted = (torch.cat(part) for part in zip(*decided, strict=True))
    right = guess == images.label
    yield Metric("pipeline", variant, "clean", float(right.double().mean()), n)
    yield Metric("pipeline", variant, "clean_rejection", float((~accepted).double().mean()), n)
    safe = right | ~accepted
    for aim in JOINT:
        loss_of = joint_loss(pipeline, calibration, rate, aim)
        kept, held = [], []
        for x, label in attacked(images, loss_of, threat, title=f"{variant}, PGD-20, {aim}"):
            guess, accepted = decide(pipeline, x, calibration, rate)
            kept.append(guess == label)
            held.append((guess == label) | ~accepted)
        if aim == "ignore":
            robust = float((right & survivors(kept)).double().mean())
            yield Metric("pipeline", variant, "pgd20", robust, n, threat)
        safe &= survivors(held)
    robust = float(safe.double().mean())
    name = f"robust_with_rejection@{100 * rate:g}%"
    yield Metric("pipeline", variant, name, robust, n, threat)
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

    The best of all aims is kept: a changed label first, then one that is also accepted.
    """
    x = to_float(image)
    label, _ = decide(pipeline, x, calibration, rate)
    best, best_rank = image, torch.full_like(label, -1)
    for aim in JOINT:
        generator = torch.Generator(x.device).manual_seed(0)
        loss = joint_loss(pipeline, calibration, rate, aim)(label)
        pixels = to_uint8(pgd20(loss, x, threat, generator=generator))
        if threat.norm == "Linf":  # rounding must not leave the ball where eps lies between levels
            whole = int(threat.eps * 255 + 1e-6)
            pixels = (image + (pixels.int() - image).clamp(-whole, whole)).byte()
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
