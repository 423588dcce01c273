"""Classifiers: torchvision's ResNet with a small-image stem, normalization inside."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

# Blocks in each of the four stages (He et al., 2016, table 1).
ARCHITECTURES = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class ClassifierConfig(NamedTuple):
    """What builds a classifier; saved in every checkpoint. `width` scales the channel counts."""

    arch: str
    classes: int
    width: float = 1.0
    image_size: int = 32
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616)


class Classifier(nn.Module):
    """Pixels in [0, 1] to logits; the pooled features are what detectors see."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        if config.arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"unknown architecture {config.arch!r}: choose one of {known}")
        self.config = config
        self.backbone = small_resnet(config)
        self.feature_size: int = self.backbone.fc.in_features
        self.head = self.backbone.fc
        self.backbone.fc = nn.Identity()
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (N, F) of x (N, 3, H, W) in [0, 1]."""
        features: Tensor = self.backbone((x - self.mean) / self.std)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of x (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.embed(x))
        return logits


def small_resnet(config: ClassifierConfig) -> ResNet:
    """ResNet of basic blocks; at 64 pixels and below a 3x3 stem that keeps the resolution."""
    net = ResNet(BasicBlock, list(ARCHITECTURES[config.arch]), num_classes=config.classes)
    if config.width != 1.0:
        scale_width(net, config.width)
    if config.image_size <= 64:
        stem = net.conv1.out_channels
        net.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def scale_width(net: ResNet, width: float) -> None:
    """Rebuild each layer of the unscaled `net` with its channel counts times `width`."""

    def scaled(channels: int) -> int:
        return channels if channels == 3 else max(8, round(channels * width / 8) * 8)

    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                new: nn.Module = nn.Conv2d(
                    scaled(layer.in_channels),
                    scaled(layer.out_channels),
                    layer.kernel_size,  # type: ignore[arg-type]
                    layer.stride,  # type: ignore[arg-type]
                    layer.padding,  # type: ignore[arg-type]
                    bias=False,
                )
            elif isinstance(layer, nn.BatchNorm2d):
                new = nn.BatchNorm2d(scaled(layer.num_features))
            elif isinstance(layer, nn.Linear):
                new = nn.Linear(scaled(layer.in_features), layer.out_features)
            else:
                continue
            setattr(parent, name, new)
