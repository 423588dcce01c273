"""The defended classifier: one function of pixels, in training, in ONNX and under attack."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.detectors import (
    FULL,
    GUARDED,
    LEAN,
    PROBED,
    RECTIFIED,
    SQUEEZED,
    Detectors,
    Views,
    margin,
    squeezed,
    step_against,
)
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.purifier import Purifier, build, described

Variant = Literal["full", "guarded", "lean"]
# The detectors of a variant where a file of weights does not name them.
EARLIER: dict[Variant, tuple[str, ...]] = {
    "full": FULL,
    "guarded": GUARDED,
    "lean": ("confidence", "energy"),
}


RADIUS = "detectors.consistency.radius"


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

    def margin_after_step(
        self, x: Tensor, label: Tensor, share: float = 1.0, steps: int = 1
    ) -> Tensor:
        """What `consistency`, if it is a part, would see (N,) of a `label` (N,)."""
        ...


class DefendedClassifier(nn.Module):
    """Purifier, if any, classifier and detectors as one module without branches or randomness."""

    def __init__(
        self, classifier: Classifier, purifier: Purifier | None, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.classifier, self.purifier = classifier, purifier
        self.variants: dict[Variant, tuple[str, ...]] = {
            "full": FULL,
            "guarded": GUARDED,
            "lean": LEAN,
        }
        self.detectors = Detectors(names, classifier.config.classes, classifier.feature_size)

    @property
    def variant(self) -> Variant:
        """Which variant it is, by its parts."""
        if self.purifier is not None:
            return "full"
        return "guarded" if PROBED in self.detectors.needs else "lean"

    def defend(self, x: Tensor) -> Outputs:
        """The float entry, for attacks: x (N, 3, H, W) in [0, 1]."""
        n = x.shape[0]
        purified = x if self.purifier is None else self.purifier(x)
        views: list[Tensor] = [x] if self.purifier is None else [x, purified]
        own = len(views)
        if SQUEEZED in self.detectors.needs:
            views.extend(squeezed(x))
        embedded = self.classifier.embed(torch.cat(views) if len(views) > 1 else x)
        logits = self.classifier.head(embedded)
        # Slices keep the exported batch dynamic; chunk() would freeze it.
        parts = [slice(i * n, (i + 1) * n) for i in range(len(views))]
        each = [logits[part] for part in parts] if len(views) > 1 else [logits]
        features, raw_logits = embedded[:n], each[0]
        rectified = self.classifier.rectified_confidence(features, raw_logits)
        clues = Views(
            x, purified, raw_logits, each[own - 1], features, rectified, tuple(each[own:])
        )
        if PROBED in self.detectors.needs:
            near = step_against(self.classifier, x, self.detectors.get_buffer("consistency.radius"))
            clues = clues._replace(probed_logits=self.classifier(near))
        return Outputs(each[own - 1], raw_logits, self.detectors(clues), purified)

    def label_logits(self, x: Tensor) -> Tensor:
        """The `logits` of `defend` and nothing else, at half the cost: (N, K) of x (N, 3, H, W)."""
        logits: Tensor = self.classifier(x if self.purifier is None else self.purifier(x))
        return logits

    def margin_after_step(
        self, x: Tensor, label: Tensor, share: float = 1.0, steps: int = 1
    ) -> Tensor:
        """What `consistency` would see (N,) if x (N, 3, H, W) had this `label` (N,), at a `share`
        of its radius and in so many `steps`: for attackers, who want it large for a wrong label.
        """
        radius = share / steps * self.detectors.get_buffer("consistency.radius")
        near = x
        for _ in range(steps):
            near = step_against(self.classifier, near, radius, label)
        # Where the step leaves [0, 1] its true gradient is zero, as often in dark pictures. A
        # larger change of the same pixel does matter, so the gradient passes (BPDA).
        near = x + (near - x).detach()
        return margin(self.classifier(near), label)

    def forward(self, image: Tensor) -> Outputs:
        """The entry that is exported: image uint8 (N, H, W, 3)."""
        out = self.defend(to_float(image))
        # TensorRT takes 8-bit values at the graph's border alone: the cast comes last, as it came
        # first in `to_float`.
        pixels = (out.purified * 255).round().permute(0, 2, 3, 1)
        return out._replace(purified=pixels.to(torch.uint8))


def save(path: Path, pipeline: DefendedClassifier, classes: tuple[str, ...]) -> None:
    """Write all it takes to rebuild either variant; without a purifier, `lean` alone."""
    config: dict[str, Any] = {"classifier": pipeline.classifier.config._asdict()}
    config["classes"] = list(classes)
    config["variants"] = {name: list(parts) for name, parts in pipeline.variants.items()}
    if pipeline.purifier is not None:
        config |= {"purifier": described(pipeline.purifier)}
    checkpoint.save(path, pipeline, config)


def load(path: Path, variant: Variant = "full") -> tuple[DefendedClassifier, tuple[str, ...]]:
    """The frozen pipeline of `path`, and its classes; ValueError for `full` without a purifier."""
    whole, classes = load_whole(path, variant)
    if variant == "full" and whole.purifier is None:
        raise ValueError(f"{path} has no purifier: its only variant is lean (--variant lean)")
    return as_variant(whole, variant), classes


def load_whole(path: Path, *variants: Variant) -> tuple[DefendedClassifier, tuple[str, ...]]:
    """All parts of `path`, frozen, and its classes. ValueError where `variants` lack a part."""
    config, state = checkpoint.read(path)
    if "classes" not in config:
        raise ValueError(f"{path} holds no defended model: `rampart calibrate` makes one")
    classifier = Classifier(classifier_config(config))
    purifier = build(config["purifier"]) if "purifier" in config else None
    names = EARLIER | {v: tuple(parts) for v, parts in config.get("variants", {}).items()}
    looks = dict.fromkeys(name for v in variants or names for name in names[v])
    whole = DefendedClassifier(classifier, purifier, tuple(looks))
    whole.variants = names
    restore(whole, state, path)
    checkpoint.check_answers(path, whole, config)
    return whole.eval().requires_grad_(False), tuple(config["classes"])


def as_variant(whole: DefendedClassifier, variant: Variant) -> DefendedClassifier:
    """The parts of `whole` that make a variant, with the same weights."""
    names = whole.variants[variant]
    if whole.classifier.rectifier is not None:
        names = (*names, RECTIFIED)
    purifier = whole.purifier if variant == "full" else None
    pipeline = DefendedClassifier(whole.classifier, purifier, names)
    pipeline.variants = whole.variants
    pipeline.detectors.take(whole.detectors)
    return pipeline.eval().requires_grad_(False)


def restore(pipeline: DefendedClassifier, state: dict[str, Tensor], path: Path) -> None:
    """Load a pipeline's weights; ValueError where more than unused detectors differ."""
    # Of files that are older than consistency its usual radius stands.
    usual = {key: value for key, value in pipeline.state_dict().items() if key == RADIUS}
    keys = pipeline.load_state_dict(usual | state, strict=False)
    strange = [
        key
        for key in (*keys.missing_keys, *keys.unexpected_keys)
        if not key.startswith("detectors.") or pipeline.detectors.needed(key.split(".", 1)[1])
    ]
    if strange:
        raise ValueError(f"{path} does not match this pipeline: see {', '.join(strange[:3])}")
    # The file is older than these detectors.
    pipeline.detectors.leave_out([key.removeprefix("detectors.") for key in keys.missing_keys])


def classifier_config(config: dict[str, Any]) -> ClassifierConfig:
    """The classifier's part of a checkpoint's config; JSON lists become tuples again."""
    values: dict[str, Any] = dict(config["classifier"])
    values |= {name: tuple(values[name]) for name in ("mean", "std")}
    return ClassifierConfig(**values)


def load_classifier(path: Path, *, auxiliary: bool = False, rectified: bool = False) -> Classifier:
    """The classifier of a file of `rampart train` or `rampart calibrate`, frozen."""
    config, state = checkpoint.read(path)
    if "classifier" not in config:
        raise ValueError(f"{path} holds no classifier: pass the file of `rampart train`")
    prefix = "classifier."
    own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    state = own or state
    heads = {name for name in state if name.startswith("backbone.aux")}
    auxiliary = auxiliary and bool(heads)
    own_config = classifier_config(config)
    own_config = own_config._replace(rectified=own_config.rectified or rectified)
    classifier = Classifier(own_config, auxiliary=auxiliary)
    kept = {name: t for name, t in state.items() if auxiliary or name not in heads}
    new = {name: t for name, t in classifier.state_dict().items() if name.startswith("rectifier.")}
    classifier.load_state_dict({**new, **kept})
    checkpoint.check_answers(path, classifier, config)
    classifier.trained = str(config.get("training", ""))
    return classifier.eval().requires_grad_(False)


def load_purifier(path: Path) -> Purifier:
    """The purifier of a file that `rampart purifier` wrote, frozen."""
    config, state = checkpoint.read(path)
    if "purifier" not in config:
        raise ValueError(f"{path} holds no purifier: pass the file of `rampart purifier`")
    purifier = build(config["purifier"])
    purifier.load_state_dict(state)
    return purifier.eval().requires_grad_(False)
