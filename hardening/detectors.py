"""Scores of suspicion from two views of one image; higher = more suspicious.

All but classic feature squeezing reuse the two classifier passes (the image as sent and its
purified view) or look at pixels only. Sources: squeezers, Xu et al. 2018 (section 3);
reconstruction distance, Meng and Chen 2017; energy, Liu et al. 2020; feature distance, Lee et al.
2018 (section 2.1); rectified rejection, Pang et al. 2022.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.data import Images, batches
from hardening.models import Classifier


class Views(NamedTuple):
    """One batch as the detectors see it; pixels in [0, 1]."""

    x: Tensor  # (N, 3, H, W) as sent
    purified: Tensor  # (N, 3, H, W)
    raw_logits: Tensor  # (N, K) of x
    logits: Tensor  # (N, K) of purified
    features: Tensor  # (N, F) of x
    rectified: Tensor  # (N,) rectified confidence in x
    squeezed_logits: tuple[Tensor, ...] = ()  # (N, K) of each squeezed view of x


def median3x3(x: Tensor) -> Tensor:
    """Median of each 3x3 neighbourhood of x (N, C, H, W), borders reflected.

    Exact, from minima and maxima alone: each row of three is sorted once for the three windows
    that it is in, and a window's median is that of the largest of its small, the middle of its
    middle and the smallest of its large values (Smith 1996, "Implementing median filters in
    XC4000E FPGAs"). More than ten times faster than a sort in ONNX Runtime.
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
    """What feature squeezing compares x (N, 3, H, W) with: 5 bits of colour, and its median.

    Rounding passes gradients as if it were not there: what an attacker does (BPDA, Athalye et al.
    2018, section 4.1).
    """
    rounded = (x * 31).round() / 31
    return x + (rounded - x).detach(), median3x3(x)


def rms(d: Tensor) -> Tensor:
    """Root mean square of each image of d (N, C, H, W); smooth at zero."""
    return (d.square().mean(dim=(1, 2, 3)) + 1e-12).sqrt()


class FeatureDistance(nn.Module):
    """Mahalanobis distance to the nearest class mean, covariance tied over classes."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, size))
        self.register_buffer("whiten", torch.eye(size))
        self.means: Tensor
        self.whiten: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Distances (N,) of features (N, F)."""
        # |a - b|^2 expanded, so that no (N, K, F) array is made; around the centre, so that little
        # cancels where features vary little.
        centre = self.means.mean(0)
        white, means = (features - centre) @ self.whiten, (self.means - centre) @ self.whiten
        square = white.square().sum(1, keepdim=True) - 2 * white @ means.T + means.square().sum(1)
        return square.min(dim=1).values.clamp_min(1e-6).sqrt()

    def fit(self, classifier: Classifier, images: Images, *, shrinkage: float = 0.1) -> None:
        """Set means and whitening from clean `images`; covariance shrunk towards its diagonal.

        These must be no image that the distance is later ranked or measured on: of those it was
        fitted on, it is too small.

        Raises ValueError where a class has no image.
        """
        with torch.no_grad():
            # In float64: with more features than images, rounding would make eigenvalues negative.
            features = torch.cat([classifier.embed(x) for x, _ in batches(images, 256)]).double()
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
        values, vectors = torch.linalg.eigh(covariance.lerp(diagonal, shrinkage))
        self.whiten.copy_(vectors @ (values.rsqrt().diag()) @ vectors.T)


FULL = (
    "median",
    "bit_depth",
    "reconstruction",
    "disagreement",
    "confidence",
    "energy",
    "feature_distance",
)
LEAN = ("confidence", "energy")
SQUEEZING = "squeezing"  # classic feature squeezing: two more classifier passes
FITTED = 5000  # training images that the feature distance is fitted on
RECTIFIED = "rectified"  # where the classifier has the second head of Pang et al. 2022


class Detectors(nn.Module):
    """The named detectors, in order; FULL needs two views, LEAN looks at the last layers only."""

    def __init__(self, names: tuple[str, ...], classes: int, feature_size: int) -> None:
        super().__init__()
        unknown = set(names) - {*FULL, RECTIFIED, SQUEEZING}
        if unknown:
            raise ValueError(f"unknown detectors {sorted(unknown)}: choose among {', '.join(FULL)}")
        self.names = names
        self.feature_distance = FeatureDistance(classes, feature_size)

    def forward(self, views: Views) -> Tensor:
        """Scores (N, D)."""
        # One copy and one transposition, where stacking columns would take a node each.
        each = torch.cat([self.score(name, views) for name in self.names])
        return each.view(len(self.names), -1).T

    def score(self, name: str, views: Views) -> Tensor:
        """The (N,) scores of one detector."""
        match name:
            case "median":
                return rms(views.x - median3x3(views.x))
            case "bit_depth":
                # round() is piecewise constant, so this gradient is the true one: no BPDA needed.
                return rms(views.x - (views.x * 15).round() / 15)
            case "reconstruction":
                return rms(views.x - views.purified)
            case "disagreement":
                return (views.logits.softmax(1) - views.raw_logits.softmax(1)).abs().sum(1) / 2
            case "confidence":
                return 1 - views.logits.softmax(1).amax(1)
            case "energy":
                return -views.logits.logsumexp(1)
            case "rectified":
                return 1 - views.rectified
            case "squeezing":
                own = views.raw_logits.softmax(1)
                moved = [(own - other.softmax(1)).abs().sum(1) for other in views.squeezed_logits]
                return torch.stack(moved).amax(0)
            case _:
                distance: Tensor = self.feature_distance(views.features)
                return distance
