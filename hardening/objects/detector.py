"""Object detectors by name, with normalization inside, and their files of weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import (
    RESNETS,
    SMALL,
    VGGS,
    Classifier,
    ClassifierConfig,
)
from rampart.hardening.model.pipeline import classifier_config
from rampart.hardening.model.purifier import Purifier
from rampart.hardening.model.purifier import build as build_purifier
from rampart.hardening.model.purifier import described as described_purifier
from rampart.hardening.model.registry import is_factory
from rampart.hardening.objects.boxes import Candidates, Dense, Found, Truth, strongest, suppressed
from rampart.hardening.objects.own import Network, normalization, own_network
from rampart.hardening.objects.places import ARCHITECTURES
from rampart.hardening.objects.single_stage import ssd_on, ssdlite
from rampart.hardening.objects.two_stage import faster_rcnn_on

TASK = "detect"  # of a file of weights; files of classifiers have none
TOP = 400  # candidates of each class, as torchvision's SSD has them
MOST = 100  # objects found in one picture
CHANNELS = 96  # of each map of the pyramid
MAPS = 4  # of the pyramid, at strides of 8, 16, 32 and 64 pixels
# Sides of anchors in parts of the picture's, one a map and one beyond.
LITE_SCALES = (0.08, 0.16, 0.3, 0.45, 0.6, 0.8, 1.0)
SCALES = (0.06, 0.15, 0.3, 0.55, 0.9)


class ObjectConfig(NamedTuple):
    """What builds an object detector."""

    arch: str
    classes: tuple[str, ...]
    size: int = 256  # pixels a side of the square that pictures are letterboxed into
    backbone: ClassifierConfig | None = None  # a ResNet or VGG; SSDLite has its own
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scales: tuple[float, ...] = ()  # of the anchors, in parts of `size`; () for the usual ones

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        backbone = None if self.backbone is None else self.backbone._asdict()
        return self._asdict() | {"backbone": backbone}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ObjectConfig":
        """The config that a file of weights carries."""
        backbone = values["backbone"]
        return cls(
            values["arch"],
            tuple(values["classes"]),
            values["size"],
            None if backbone is None else classifier_config({"classifier": backbone}),
            **{name: tuple(values[name]) for name in ("mean", "std", "scales")},
        )


class ObjectDetector(nn.Module):
    """Pixels in [0, 1] to objects, through a purifier, if any.

    Raises ValueError for what cannot be built.
    """

    def __init__(self, config: ObjectConfig, purifier: Purifier | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.net = cast(Network, build(config))
        self.purifier = purifier

    def behind(self, purifier: Purifier | None) -> "ObjectDetector":
        """A copy behind a purifier, which is not copied, or behind none."""
        own = copy.deepcopy(self)
        own.purifier = purifier
        return own

    def purified(self, x: Tensor) -> Tensor:
        """x (N, 3, S, S) as the network sees it."""
        return x if self.purifier is None else self.purifier(x)

    def raw(self, x: Tensor) -> Dense:
        """What every anchor or proposal says of x (N, 3, S, S) without the purifier."""
        return self.net.dense((x - self.mean) / self.std)

    def dense(self, x: Tensor) -> Dense:
        """What every anchor or proposal says of x (N, 3, S, S), with gradients."""
        return self.raw(self.purified(x))

    def candidates(self, x: Tensor) -> Candidates:
        """The strongest boxes of x (N, 3, S, S), of fixed size: what is exported."""
        return strongest(self.dense(x), TOP)

    def image_losses(self, x: Tensor, truth: Sequence[Truth]) -> dict[str, Tensor]:
        """torchvision's losses of each image of x (N, 3, S, S), by name, (N,) each.

        `classification` and `localization`; Faster R-CNN has `objectness` and `proposals` too.
        """
        each = self.net.losses((self.purified(x) - self.mean) / self.std, truth)
        return {name: torch.stack([losses[name] for losses in each]) for name in each[0]}

    def losses(self, x: Tensor, truth: Sequence[Truth]) -> dict[str, Tensor]:
        """The mean of each loss over the images: their sum is what training descends."""
        return {name: values.mean() for name, values in self.image_losses(x, truth).items()}

    def forward(self, x: Tensor) -> list[Found]:
        """The objects in each of x (N, 3, S, S), at most 100, the surest first."""
        return suppressed(self.candidates(x), iou=self.net.iou, most=MOST)


def build(config: ObjectConfig) -> nn.Module:
    """The network of a config, with new weights, or with those that your own comes with."""
    if config.arch not in ARCHITECTURES and not is_factory(config.arch):
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"unknown object detector {config.arch!r}: choose one of {known}, or a factory of yours"
            " as package.module:factory"
        )
    if config.size % 64 or config.size < 128:
        raise ValueError(f"--image-size {config.size}: take a multiple of 64 from 128 on")
    if not config.classes:
        raise ValueError("an object detector knows one class or more: none is named")
    if is_factory(config.arch):
        return own_network(config.arch, len(config.classes), config.size)
    if config.arch == "ssdlite":
        return ssdlite(len(config.classes), config.size, config.scales or LITE_SCALES)
    make = ssd_on if config.arch == "ssd" else faster_rcnn_on
    scales = config.scales or SCALES
    if len(scales) != MAPS + 1:
        raise ValueError(f"{config.arch} has {MAPS + 1} scales of anchors: {scales}")
    return make(pyramid(config), CHANNELS, len(config.classes), config.size, scales)


def of_factory(arch: str, classes: Sequence[str], size: int) -> ObjectDetector:
    """The object detector that a registered factory makes, with its weights and normalization."""
    return ObjectDetector(ObjectConfig(arch, tuple(classes), size, None, *normalization(arch)))


def on_classifier(
    arch: str, classifier: Classifier, classes: Sequence[str], size: int
) -> ObjectDetector:
    """A new object detector on the weights of a classifier, with its normalization.

    An adversarially trained one is the best begin for a robust detector (Li et al. 2023).
    """
    net = classifier.config
    config = ObjectConfig(arch, tuple(classes), size, net, net.mean, net.std)
    detector = ObjectDetector(config)
    body: Any = cast(Any, detector.net).backbone.body
    weights = classifier.backbone.state_dict()
    inside = "features." if net.arch in VGGS else ""
    body.load_state_dict({name: weights[inside + name] for name in body.state_dict()})
    return detector


def pyramid(config: ObjectConfig) -> nn.Module:
    """Maps at strides of 8 to 64 pixels, made from the last layers of a ResNet or VGG."""
    backbone = config.backbone
    if backbone is None or backbone.arch not in (*RESNETS, *VGGS):
        named = backbone.arch if backbone else "none"
        raise ValueError(f"{config.arch} stands on a ResNet or VGG: its backbone is {named}")
    net: Any = Classifier(backbone).backbone
    if backbone.arch in VGGS:
        return on_vgg(net.features)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    if backbone.image_size <= SMALL:  # its stem keeps the resolution: halve it, for the stride
        net.conv1.stride = (2, 2)
        layers = {"layer3": "0", "layer4": "1"}
    deep = [layer[-1].conv1.out_channels for layer in (net.layer2, net.layer3, net.layer4)]
    if hasattr(net.layer2[-1], "conv3"):
        deep = [layer[-1].conv3.out_channels for layer in (net.layer2, net.layer3, net.layer4)]
    extra = LastLevelP6P7(CHANNELS, CHANNELS) if len(layers) == 2 else LastMap()
    return Pyramid(net, layers, deep[-len(layers) :], CHANNELS, extra, nn.BatchNorm2d)


def on_vgg(features: nn.Sequential) -> nn.Module:
    """The pyramid on what a VGG has before its last two poolings, at strides of 8 and 16."""
    every = list(features)
    pools = [row for row, layer in enumerate(every) if isinstance(layer, nn.MaxPool2d)][-2:]
    layers = {str(row - 1): str(number) for number, row in enumerate(pools)}
    deep = [
        [layer.out_channels for layer in every[:row] if isinstance(layer, nn.Conv2d)][-1]
        for row in pools
    ]
    extra = LastLevelP6P7(CHANNELS, CHANNELS)
    return Pyramid(features, layers, deep, CHANNELS, extra, nn.BatchNorm2d)


class Pyramid(BackboneWithFPN):  # type: ignore[misc]
    """torchvision's, with its maps normalized and rectified: SSD's heads are one layer each."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (N, CHANNELS, S / stride, S / stride) by name."""
        return {name: value.relu() for name, value in super().forward(x).items()}


class LastMap(LastLevelP6P7):  # type: ignore[misc]
    """One map more, where the ResNet gives three."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, CHANNELS)
        del self.p7

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """The maps and their names, with one more of each."""
        return [*p, self.p6(p[-1])], [*names, "p6"]


def save(path: Path, detector: ObjectDetector, content: dict[str, Any] | None = None) -> None:
    """Write the weights, with the config that rebuilds them and other `content` (JSON values)."""
    checkpoint.save(path, detector, described(detector) | (content or {}))


def described(detector: ObjectDetector) -> dict[str, Any]:
    """What a file of weights says of its network, and of the purifier in front of it."""
    content = {"task": TASK, "object_detector": detector.config.as_json()}
    if detector.purifier is not None:
        content["purifier"] = described_purifier(detector.purifier)
    return content


def load(path: Path, *, purified: bool = False) -> ObjectDetector:
    """The frozen object detector of a file; if `purified`, behind the file's purifier, if any.

    Raises FileNotFoundError or ValueError.
    """
    config, state = checkpoint.read(path)
    if config.get("task") != TASK:
        raise ValueError(
            f"{path} holds no object detector, but a classifier: pass a file of `rampart train` on"
            " pictures with boxes"
        )
    purifier = build_purifier(config["purifier"]) if purified and "purifier" in config else None
    detector = ObjectDetector(ObjectConfig.from_json(config["object_detector"]), purifier)
    own = {key: t for key, t in state.items() if purified or not key.startswith("purifier.")}
    detector.load_state_dict(own)
    return detector.eval().requires_grad_(False)
