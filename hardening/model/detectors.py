"""Scores of suspicion from two views of one image; higher = more suspicious. Sources: squeezers, Xu
et al. 2018 (section 3); reconstruction distance, Meng and Chen 2017; energy, Liu et al. 2020;
feature distance, Lee et al. 2018 (section 2.1); residual, Wang et al. 2022 ("ViM", section 4);
rectified rejection, Pang et al. 2022.
"""

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.images import Images, batches

# What a detector may need.
PURIFIER = "purifier"  # a purified view that is not the image itself
SQUEEZED = "squeezed"  # two more classifier passes, of squeezed views
PROBED = "probed"  # a gradient and one more pass: the answer after a small step against it
RECTIFIER = "rectifier"  # a classifier with the second head of Pang et al. 2022


class Views(NamedTuple):
    """One batch as the detectors see it; pixels in [0, 1]."""

    x: Tensor  # (N, 3, H, W) as sent
    purified: Tensor  # (N, 3, H, W)
    raw_logits: Tensor  # (N, K) of x
    logits: Tensor  # (N, K) of purified
    features: Tensor  # (N, F) of x
    rectified: Tensor  # (N,) rectified confidence in x
    squeezed_logits: tuple[Tensor, ...] = ()  # (N, K) of each squeezed view of x
    probed_logits: Tensor | None = None  # (N, K) of x after a step against its label


def median3x3(x: Tensor) -> Tensor:
    """Median of each 3x3 neighbourhood of x (N, C, H, W), borders reflected. Exact, from minima and
    maxima alone (Smith 1996, "Implementing median filters in XC4000E FPGAs"): in ONNX Runtime ten
    times as fast as a sort.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    a, b, c = (padded[..., i : i + width] for i in range(3))  # each (N, C, H + 2, W)
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    middle, large = torch.minimum(b, c), torch.maximum(b, c)
    small, middle = torch.minimum(a, middle), torch.maximum(a, middle)

    def rows(values: Tensor) -> tuple[Tensor, ...]:
        return tuple(values[..., i : i + height, :] for i in range(3))  # each (N, C, H, W)

    small = reduce(torch.maximum, rows(small))
    large = reduce(torch.minimum, rows(large))
    return median(small, median(*rows(middle)), large)


def median(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The middle one of three values, element by element."""
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def squeezed(x: Tensor) -> tuple[Tensor, ...]:
    """x (N, 3, H, W) in 5 bits of colour, and its median, for feature squeezing. Rounding passes
    gradients straight through, as attackers do (BPDA, Athalye et al. 2018, section 4.1).
    """
    rounded = (x * 31).round() / 31
    return x + (rounded - x).detach(), median3x3(x)


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """By how much (N,) the logit of each label (N,) is above the largest other of (N, K)."""
    own = torch.arange(logits.shape[1], device=logits.device) == label[:, None]
    others = torch.where(own, torch.full_like(logits, -1e9), logits).amax(1)
    return torch.where(own, logits, torch.zeros_like(logits)).sum(1) - others


def step_against(
    classifier: Classifier, x: Tensor, radius: Tensor, label: Tensor | None = None
) -> Tensor:
    """x (N, 3, H, W) after one signed step of `radius` that lowers the margin of its own label, or
    of `label` (N,).

    The step is a constant of what follows: where a network is linear in pieces, as with ReLU, that
    is its true derivative almost everywhere.
    """
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        logits = classifier(start)
        aim = logits.detach().argmax(1) if label is None else label
        (slope,) = torch.autograd.grad(margin(logits, aim).sum(), start)
    return (x - radius * slope.sign()).clamp(0, 1)


def rms(d: Tensor) -> Tensor:
    """Root mean square of each image of d (N, C, H, W); smooth at zero."""
    return (d.square().mean(dim=(1, 2, 3)) + 1e-12).sqrt()


class Detector(nn.Module):
    """One score of suspicion, for `classes` and the size F of the classifier's features. A subclass
    has a name, what it `needs` beside two classifier passes, `forward`, and `fit` where it learns;
    `register` makes it known to pipelines and to the ablation.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()

    def fit(self, classifier: Classifier, images: Images) -> Self:
        """Learn from clean `images`, which must not be ranked or measured later; returns itself."""
        return self

    def forward(self, views: Views) -> Tensor:
        """Scores (N,)."""
        raise NotImplementedError


class Median(Detector):
    """How much a median filter changes the image."""

    name = "median"

    def forward(self, views: Views) -> Tensor:
        """Root mean square of the change (N,)."""
        return rms(views.x - median3x3(views.x))


class BitDepth(Detector):
    """How much 4 bits of colour change the image."""

    name = "bit_depth"

    def forward(self, views: Views) -> Tensor:
        """Root mean square of the change (N,)."""
        # round() is piecewise constant, so this gradient is the true one: no BPDA needed.
        return rms(views.x - (views.x * 15).round() / 15)


class Reconstruction(Detector):
    """How much the purifier changes the image."""

    name = "reconstruction"
    needs = frozenset({PURIFIER})

    def forward(self, views: Views) -> Tensor:
        """Root mean square of the change (N,)."""
        return rms(views.x - views.purified)


class Disagreement(Detector):
    """How much the purifier changes what the classifier says."""

    name = "disagreement"
    needs = frozenset({PURIFIER})

    def forward(self, views: Views) -> Tensor:
        """Total variation (N,) between both answers."""
        return (views.logits.softmax(1) - views.raw_logits.softmax(1)).abs().sum(1) / 2


class Confidence(Detector):
    """Max-softmax: what every other detector has to beat."""

    name = "confidence"

    def forward(self, views: Views) -> Tensor:
        """What the largest probability (N,) lacks of one."""
        return 1 - views.logits.softmax(1).amax(1)


class Energy(Detector):
    """How small all logits are."""

    name = "energy"

    def forward(self, views: Views) -> Tensor:
        """Free energy (N,)."""
        return -views.logits.logsumexp(1)


def features_of(classifier: Classifier, images: Images) -> Tensor:
    """Features (N, F) of `images`, in float64: with more features than images, rounding would make
    eigenvalues of their covariance negative.
    """
    with torch.no_grad():
        return torch.cat([classifier.embed(x) for x, _ in batches(images, 256)]).double()


class FeatureDistance(Detector):
    """Mahalanobis distance to the nearest class mean, covariance tied over classes."""

    name = "feature_distance"

    def __init__(self, classes: int, size: int, *, shrinkage: float = 0.1) -> None:
        super().__init__(classes, size)
        self.shrinkage = shrinkage
        self.register_buffer("means", torch.zeros(classes, size))
        self.register_buffer("whiten", torch.eye(size))
        self.means: Tensor
        self.whiten: Tensor

    def forward(self, views: Views) -> Tensor:
        """Distances (N,) of the features."""
        return self.distances(views.features)

    def distances(self, features: Tensor) -> Tensor:
        """Distances (N,) of features (N, F)."""
        # |a - b|^2 expanded, so that no (N, K, F) array is made; around the centre, so that little
        # cancels where features vary little.
        centre = self.means.mean(0)
        white, means = (features - centre) @ self.whiten, (self.means - centre) @ self.whiten
        square = white.square().sum(1, keepdim=True) - 2 * white @ means.T + means.square().sum(1)
        return square.min(dim=1).values.clamp_min(1e-6).sqrt()

    def fit(self, classifier: Classifier, images: Images) -> Self:
        """Set means and whitening from clean `images`; ValueError where a class has no image."""
        features = features_of(classifier, images)
        counts = torch.bincount(images.label, minlength=len(self.means))
        if (counts == 0).any():
            names = [images.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
            raise ValueError(f"the images lack the classes {names}: add some of each")
        sums = features.new_zeros(self.means.shape).index_add_(0, images.label, features)
        means = sums / counts[:, None]
        self.means.copy_(means)
        centred = features - means[images.label]
        covariance = centred.T @ centred / len(centred)
        diagonal = covariance.diagonal().diag() + 1e-6 * torch.eye(len(covariance)).to(features)
        values, vectors = torch.linalg.eigh(covariance.lerp(diagonal, self.shrinkage))
        self.whiten.copy_(vectors @ (values.rsqrt().diag()) @ vectors.T)
        return self


class Residual(Detector):
    """How far features lie outside the space that those of training fill: what the images show has
    nothing to do with the classes.
    """

    name = "residual"

    def __init__(self, classes: int, size: int) -> None:
        super().__init__(classes, size)
        self.register_buffer("centre", torch.zeros(size))
        # A quarter of the directions, those in which training images differ most, are left out.
        self.register_buffer("outside", torch.eye(size)[:, size // 4 :].contiguous())
        self.centre: Tensor
        self.outside: Tensor

    def forward(self, views: Views) -> Tensor:
        """Lengths (N,) of what sticks out."""
        outside = (views.features - self.centre) @ self.outside
        return (outside.square().sum(1) + 1e-12).sqrt()

    def fit(self, classifier: Classifier, images: Images) -> Self:
        """Find the space that clean `images` fill."""
        features = features_of(classifier, images)
        self.centre.copy_(features.mean(0))
        # eigh sorts by size, the smallest first.
        vectors = torch.linalg.eigh(features.T.cov(correction=0)).eigenvectors
        self.outside.copy_(vectors[:, : self.outside.shape[1]])
        return self


class Consistency(Detector):
    """How little of the label's margin is left after a small step against it: what an attack has
    pushed over a border lies near one (Chen et al. 2023, "Stratified Adversarial Robustness with
    Rejection", section 4.1, with one inner step, and by the margin instead of the confidence).
    """

    name = "consistency"
    needs = frozenset({PROBED})

    def __init__(self, classes: int, size: int) -> None:
        super().__init__(classes, size)
        self.register_buffer("radius", torch.tensor(2 / 255))
        self.radius: Tensor

    def forward(self, views: Views) -> Tensor:
        """The margin after the step (N,), in logits, its sign turned."""
        assert views.probed_logits is not None
        return -margin(views.probed_logits, views.raw_logits.argmax(1))


class Rectified(Detector):
    """Confidence times how far the classifier's second head trusts it."""

    name = "rectified"
    needs = frozenset({RECTIFIER})

    def forward(self, views: Views) -> Tensor:
        """What the rectified confidence (N,) lacks of one."""
        return 1 - views.rectified


class Squeezing(Detector):
    """Classic feature squeezing: how much squeezed views change what the classifier says."""

    name = "squeezing"
    needs = frozenset({SQUEEZED})

    def forward(self, views: Views) -> Tensor:
        """The largest L1 distance (N,) between answers."""
        own = views.raw_logits.softmax(1)
        moved = [(own - other.softmax(1)).abs().sum(1) for other in views.squeezed_logits]
        return torch.stack(moved).amax(0)


DETECTORS: dict[str, type[Detector]] = {}


def register(*detectors: type[Detector]) -> None:
    """Add detectors by their names, in this order."""
    DETECTORS.update({detector.name: detector for detector in detectors})


register(Median, BitDepth, Reconstruction, Disagreement, Confidence, Energy)
register(FeatureDistance, Residual, Consistency, Rectified, Squeezing)

FULL = (
    "median",
    "bit_depth",
    "reconstruction",
    "disagreement",
    "confidence",
    "energy",
    "feature_distance",
)
# Doubt between classes, unlike any class, unlike all that was trained on.
LEAN = ("confidence", "feature_distance", "residual")
# Unlike any class; near the border to another one, where attacks leave a picture.
GUARDED = ("feature_distance", "consistency")
FITTED = 5000  # training images that detectors are fitted on
RECTIFIED = Rectified.name  # where the classifier has a second head


class Detectors(nn.Module):
    """The named detectors, in order. What others have learned is kept too, for other setups."""

    def __init__(self, names: Sequence[str], classes: int, feature_size: int) -> None:
        super().__init__()
        if unknown := sorted(set(names) - set(DETECTORS)):
            raise ValueError(f"unknown detectors {unknown}: choose among {', '.join(DETECTORS)}")
        self.names = tuple(names)
        self.needs = frozenset[str]().union(*(DETECTORS[name].needs for name in names))
        for name, kind in DETECTORS.items():
            detector = kind(classes, feature_size)
            if name in names or detector.state_dict():
                self.add_module(name, detector)

    def fit(self, classifier: Classifier, images: Images) -> Self:
        """Fit every detector on clean `images`; returns itself."""
        for detector in self.children():
            detector.fit(classifier, images)  # type: ignore[operator]
        return self

    def take(self, other: "Detectors") -> None:
        """Copy what the detectors of `other` have learned. ValueError where one of ours learned
        nothing.
        """
        missing = self.load_state_dict(other.state_dict(), strict=False).missing_keys
        self.leave_out(missing)
        if lost := sorted({key.partition(".")[0] for key in missing if self.needed(key)}):
            raise ValueError(f"{', '.join(lost)} must be fitted first: rebuild the model folder")

    def leave_out(self, missing: Sequence[str]) -> None:
        """Take away the detectors of these tensors, unless they are looked at."""
        for name in {key.partition(".")[0] for key in missing if not self.needed(key)}:
            delattr(self, name)

    def lacks(self, name: str) -> bool:
        """Whether a detector of this name would have to be fitted first."""
        return not hasattr(self, name) and any(True for _ in DETECTORS[name](2, 4).buffers())

    def needed(self, key: str) -> bool:
        """Whether a tensor of a state belongs to a detector that is looked at."""
        return key.partition(".")[0] in self.names

    def forward(self, views: Views) -> Tensor:
        """Scores (N, D)."""
        # One copy and one transposition, where stacking columns would take a node each.
        each = torch.cat([self.get_submodule(name)(views) for name in self.names])
        return each.view(len(self.names), -1).T
