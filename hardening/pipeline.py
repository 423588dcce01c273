"""The defended classifier: one function of pixels, in training, in ONNX and under attack."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hardening import checkpoint
from hardening.data import to_float
from hardening.detectors import FULL, LEAN, RECTIFIED, SQUEEZING, Detectors, Views, squeezed
from hardening.models import Classifier, ClassifierConfig
from hardening.purifier import Purifier, PurifierConfig

Variant = Literal["full", "lean"]


class Outputs(NamedTuple):
    """What the pipeline says of a batch; `logits` are of the purified view."""

    logits: Tensor  # (N, K)
    raw_logits: Tensor  # (N, K)
    scores: Tensor  # (N, D)
    purified: Tensor  # (N, 3, H, W) in [0, 1]; uint8 (N, H, W, 3) from the uint8 entry


class Defended(Protocol):
    """What attacks see of a pipeline, both differentiable in x (N, 3, H, W)."""

    def defend(self, x: Tensor) -> Outputs:
        """All of it."""
        ...

    def label_logits(self, x: Tensor) -> Tensor:
        """Its `logits` (N, K) alone."""
        ...


class DefendedClassifier(nn.Module):
    """Purifier, classifier and detectors as one module without branches on data or randomness.

    Without a purifier the purified view is the image itself and there is one classifier pass.
    """

    def __init__(
        self, classifier: Classifier, purifier: Purifier | None, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.classifier, self.purifier = classifier, purifier
        self.detectors = Detectors(names, classifier.config.classes, classifier.feature_size)

    def defend(self, x: Tensor) -> Outputs:
        """The float entry, for attacks: x (N, 3, H, W) in [0, 1]."""
        n = x.shape[0]
        purified = x if self.purifier is None else self.purifier(x)
        views: list[Tensor] = [x] if self.purifier is None else [x, purified]
        own = len(views)
        if SQUEEZING in self.detectors.names:
            views.extend(squeezed(x))
        embedded = self.classifier.embed(torch.cat(views) if len(views) > 1 else x)
        logits = self.classifier.head(embedded)
        # Slices keep the exported batch dynamic; chunk() would freeze it.
        parts = [slice(i * n, (i + 1) * n) for i in range(len(views))]
        each = [logits[part] for part in parts] if len(views) > 1 else [logits]
        features, raw_logits = embedded[:n], each[0]
        rectified = self.classifier.rectified_confidence(features, raw_logits)
        seen = Views(x, purified, raw_logits, each[own - 1], features, rectified, tuple(each[own:]))
        return Outputs(each[own - 1], raw_logits, self.detectors(seen), purified)

    def label_logits(self, x: Tensor) -> Tensor:
        """The `logits` of `defend` and nothing else, at half the cost: (N, K) of x (N, 3, H, W)."""
        logits: Tensor = self.classifier(x if self.purifier is None else self.purifier(x))
        return logits

    def forward(self, image: Tensor) -> Outputs:
        """The entry that is exported: image uint8 (N, H, W, 3)."""
        out = self.defend(to_float(image))
        # TensorRT takes 8-bit values at the graph's border alone: the cast comes last, as it came
        # first in `to_float`.
        pixels = (out.purified * 255).round().permute(0, 2, 3, 1)
        return out._replace(purified=pixels.to(torch.uint8))


def save(path: Path, pipeline: DefendedClassifier, classes: tuple[str, ...]) -> None:
    """Write all it takes to rebuild either variant; without a purifier, `lean` alone."""
    config = {"classifier": pipeline.classifier.config._asdict(), "classes": list(classes)}
    if pipeline.purifier is not None:
        config |= {"purifier": pipeline.purifier.config._asdict()}
    checkpoint.save(path, pipeline, config)


def load(path: Path, variant: Variant = "full") -> tuple[DefendedClassifier, tuple[str, ...]]:
    """Rebuild the pipeline of `path` as `variant`, frozen; returns it with the class names.

    Raises ValueError where `full` is asked of a model that was saved without a purifier.
    """
    config, state = checkpoint.read(path)
    classifier = Classifier(classifier_config(config))
    names = FULL if variant == "full" else LEAN
    if classifier.rectifier is not None:
        names = (*names, RECTIFIED)
    if variant == "full":
        if "purifier" not in config:
            raise ValueError(f"{path} has no purifier: its only variant is lean (--variant lean)")
        purifier = Purifier(PurifierConfig(**config["purifier"]))
        pipeline = DefendedClassifier(classifier, purifier, names)
    else:
        pipeline = DefendedClassifier(classifier, None, names)
        state = {name: t for name, t in state.items() if not name.startswith("purifier.")}
    pipeline.load_state_dict(state)
    return pipeline.eval().requires_grad_(False), tuple(config["classes"])


def classifier_config(config: dict[str, Any]) -> ClassifierConfig:
    """The classifier's part of a checkpoint's config; JSON lists become tuples again."""
    values: dict[str, Any] = dict(config["classifier"])
    values |= {name: tuple(values[name]) for name in ("mean", "std")}
    return ClassifierConfig(**values)


def load_classifier(path: Path, *, auxiliary: bool = False, rectified: bool = False) -> Classifier:
    """The classifier of a file that `rampart train` or `rampart calibrate` wrote, frozen.

    GoogLeNet's `auxiliary` heads, which train alone needs, are left out unless asked for. With
    `rectified` a network that has no head of rectified rejection gets a new one.
    """
    config, state = checkpoint.read(path)
    if "classifier" not in config:
        raise ValueError(f"{path} holds no classifier: pass the file of `rampart train`")
    prefix = "classifier."
    own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    state = own or state
    heads = {name for name in state if name.startswith("backbone.aux")}
    auxiliary = auxiliary and bool(heads)
    known = classifier_config(config)
    known = known._replace(rectified=known.rectified or rectified)
    classifier = Classifier(known, auxiliary=auxiliary)
    kept = {name: t for name, t in state.items() if auxiliary or name not in heads}
    new = {name: t for name, t in classifier.state_dict().items() if name.startswith("rectifier.")}
    classifier.load_state_dict({**new, **kept})
    return classifier.eval().requires_grad_(False)


def load_purifier(path: Path) -> Purifier:
    """The purifier of a file that `rampart purifier` wrote, frozen."""
    config, state = checkpoint.read(path)
    if "purifier" not in config:
        raise ValueError(f"{path} holds no purifier: pass the file of `rampart purifier`")
    purifier = Purifier(PurifierConfig(**config["purifier"]))
    purifier.load_state_dict(state)
    return purifier.eval().requires_grad_(False)
