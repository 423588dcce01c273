"""The sections that look at images: a map of features, pictures, classes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor

from rampart.hardening.attack.victims import batched
from rampart.hardening.judge.evaluate import Evaluation, Record
from rampart.hardening.model.arrays import Floats
from rampart.hardening.model.detectors import PROBED
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float
from rampart.hardening.report import plots
from rampart.hardening.report.elements import (
    JOINT,
    STATIC,
    Drawing,
    Section,
    attacked,
    counted,
    record_of,
    under,
)
from rampart.hardening.report.plots import Curve, Shares

EMBEDDED, SHOWN = 200, 6  # images in the map of features, and in the gallery
MOST_CLASSES = 25
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # in radii of consistency


class Pictures(NamedTuple):
    """What the grid shows; `source` says where the images come from and how they were chosen."""

    clean: Tensor  # uint8 (M, H, W, 3)
    attacked: Tensor  # uint8 (M, H, W, 3)
    truth: Sequence[str]  # (M,)
    source: str


def gallery(evaluation: Evaluation, pipeline: DefendedClassifier | None) -> Pictures | None:
    """Evaluated images for the grid, evenly spaced, or None; they may not leave this machine."""
    pixels = attacked(evaluation, pipeline)
    if pixels is None:
        return None
    count = len(evaluation.images)
    chosen = torch.arange(min(SHOWN, count)) * count // min(SHOWN, count)
    few = evaluation.images[chosen]
    source = f"{len(few)} of the {count} evaluated images, evenly spaced and not picked."
    truth = [few.classes[index] for index in few.label.tolist()]
    return Pictures(few.image, pixels[chosen], truth, source)


def features(
    evaluation: Evaluation | None, pipeline: DefendedClassifier | None
) -> Iterator[Section]:
    """A t-SNE map (van der Maaten and Hinton 2008) of what the classifier makes of each image."""
    pixels = attacked(evaluation, pipeline)
    if not (pipeline and evaluation and pixels is not None) or len(evaluation.images) < 4:
        return
    count = min(EMBEDDED, len(pixels))
    few = torch.arange(count) * len(pixels) // count
    parts = embedded(pipeline, evaluation.images.image[few], pixels[few])
    points = np.concatenate(list(parts.values()))
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(perplexity=perplexity, random_state=0).fit_transform(points).astype(float)
    split = zip(parts, np.split(flat, len(parts)), strict=True)
    source = plots.scatter([Curve(name, *part.T) for name, part in split])
    words = [
        f"{count} images as the classifier's last features, brought to a plane by t-SNE (perplexity"
        f" {perplexity:.3g}, fixed seed). Near points are alike; distances between groups and the"
        " axes mean nothing."
    ]
    sets = ", ".join(parts)
    alt = f"Scatter plot of {len(points)} points in {len(parts)} sets: {sets}."
    yield Section("Features", words, [Drawing(source, alt, f"t-SNE of {sets} images.")])


def embedded(
    pipeline: DefendedClassifier, clean: Tensor, pixels: Tensor
) -> dict[str, NDArray[np.float32]]:
    """Features (N, F) of clean and attacked images uint8 (N, H, W, 3), and of these purified."""
    views = {"clean": to_float(clean), "attacked": to_float(pixels)}
    if pipeline.purifier is not None:
        views["purified"] = batched(pipeline.purifier, views["attacked"])
    embed = pipeline.classifier.embed
    return {name: batched(embed, view).cpu().numpy() for name, view in views.items()}


def small_step(
    evaluation: Evaluation | None, pipeline: DefendedClassifier | None
) -> Iterator[Section]:
    """How far the label of an image leads along the step of consistency, clean beside attacked."""
    if not (evaluation and pipeline and PROBED in pipeline.detectors.needs):
        return
    found = {name: under(evaluation, pipeline, name) for name in (STATIC, JOINT)}
    sets = {"clean": evaluation.images.image} | found
    every, words = [], []
    for name, image in sets.items():
        leads = None if image is None else leads_of(pipeline, image, evaluation, name == "clean")
        if leads is not None and leads.size:
            low, middle, high = np.quantile(leads, (0.25, 0.5, 0.75), axis=1)
            every.append(Shares(name, np.array(STEPS), middle, low, high))
            after = middle[STEPS.index(1)]
            words.append(f"{plots.title(name)} {middle[0]:.1f} before it, {after:.1f} after it")
    x_label, y_label = "size of the step, in radii", "lead of the label, in logits"
    caption = f"Median lead of the label, with quartiles: {'; '.join(words)}."
    alt = f"Lines over the size of the step. {caption}"
    text = [
        "The detector consistency takes one small step against the label of an image, and looks at"
        " how far the label still leads. Of clean images those are shown whose label is right, of"
        " attacked ones those whose label is wrong. An attack that only just crosses a border falls"
        " below zero with the step; one that knows the detector goes further in."
    ]
    source = plots.along(every, x_label=x_label, y_label=y_label)
    yield Section("A small step", text, [Drawing(source, alt, caption)])


def leads_of(
    pipeline: DefendedClassifier, image: Tensor, evaluation: Evaluation, right: bool
) -> Floats:
    """The lead of the label (S, M) at each of STEPS, of the images uint8 (N, H, W, 3) whose label
    is `right`, or else wrong.
    """
    x = to_float(image)
    label = batched(pipeline.label_logits, x).argmax(1)
    chosen = ((label == evaluation.images.label) == right).nonzero().squeeze(1)
    leads = [
        [pipeline.margin_after_step(x[rows], label[rows], share).detach() for share in STEPS]
        for rows in torch.split(chosen, 128)
    ]
    return torch.cat([torch.stack(part) for part in leads], dim=1).cpu().numpy()


def grid(
    evaluation: Evaluation | None, pipeline: DefendedClassifier | None, pictures: Pictures | None
) -> Iterator[Section]:
    """Pictures as sent, attacked and purified, each with the verdict on it."""
    record = record_of(evaluation, pipeline)
    if evaluation is None or pictures is None or record is None:
        return
    names = evaluation.images.classes
    device = evaluation.images.image.device
    clean, pixels = pictures.clean.to(device), pictures.attacked.to(device)
    change = pixels.int() - clean.int()
    largest = [f"at most {levels}/255" for levels in change.abs().flatten(1).amax(1).tolist()]
    columns = [
        ("clean", clean, verdicts(record, clean, names)),
        ("attacked", pixels, verdicts(record, pixels, names)),
        ("difference x10", (128 + 10 * change).clamp(0, 255).byte(), largest),
    ]
    if pipeline is not None and pipeline.purifier is not None:
        with torch.no_grad():
            purified = pipeline(pixels).purified
        columns.append(("purified", purified, ["what the classifier sees"] * len(pixels)))
    rows = []
    for i, truth in enumerate(pictures.truth):
        words = [f"{title}: {captions[i]}" for title, _, captions in columns]
        sources = [plots.png(image[i].cpu().numpy()) for _, image, _ in columns]
        alts = [f"{truth}, {text}" for text in words]
        words[0] = f"{truth}, {words[0]}"
        rows.append([Drawing(*parts) for parts in zip(sources, alts, words, strict=True)])
    yield Section("Pictures", [pictures.source], grid=rows)


def verdicts(record: Record, image: Tensor, names: tuple[str, ...]) -> list[str]:
    """What a victim says of each image uint8 (N, H, W, 3)."""
    with torch.no_grad():
        logits = record.victim.label_look(to_float(image)).logits
    confidence, index = logits.softmax(1).max(1)
    labels = [
        f"{names[i]} {share:.0%}"
        for i, share in zip(index.tolist(), confidence.tolist(), strict=True)
    ]
    if not record.victim.rejects:
        return labels
    accepted = record.victim.deployed(image).accepted
    decision = {True: "accepted", False: "rejected"}
    return [f"{label}, {decision[bool(a)]}" for label, a in zip(labels, accepted, strict=True)]


def classes(
    evaluation: Evaluation | None, pipeline: DefendedClassifier | None
) -> Iterator[Section]:
    """Which classes fall."""
    record = record_of(evaluation, pipeline)
    if evaluation is None or record is None or not record.under:
        return
    label = evaluation.images.label.cpu().numpy()
    worst = record.worst("right")
    present = sorted(np.unique(label).tolist(), key=lambda index: worst[label == index].mean())
    shown = present[:MOST_CLASSES]
    names = [evaluation.images.classes[index] for index in shown]
    every = [
        counted(name, range(len(shown)), [held[label == index] for index in shown])
        for name, held in (("clean", record.clean.right), (evaluation.worst, worst))
    ]
    shares = zip(names, every[0].value, every[1].value, strict=True)
    alt = " ".join(
        f"{name}: {one:.0%} clean, {two:.0%} {evaluation.worst}." for name, one, two in shares
    )
    caption = f"{record.victim.subject.title}: label right by class, with 95% intervals."
    drawing = Drawing(plots.dots(names, every, x_label="label right"), f"Dot plot. {alt}", caption)
    attack = record.everything().effort
    fewest = min(int((label == index).sum()) for index in shown)
    words = [
        f"{len(shown)} of {len(present)} classes, the weakest first; the smallest has {fewest}"
        f" images. {attack[0].upper()}{attack[1:]}."
    ]
    yield Section("Classes", words, [drawing])
