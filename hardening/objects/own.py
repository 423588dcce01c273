"""An object detector of your own: one of torchvision's classes, or a module with `dense`."""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from rampart.hardening.model import registry
from rampart.hardening.objects.boxes import Dense, Truth
from rampart.hardening.objects.single_stage import SingleStage
from rampart.hardening.objects.two_stage import TwoStage

Channels = tuple[float, float, float]


class Network(Protocol):
    """What an object detector is made of; a module of yours has the same four."""

    iou: float  # above which the weaker of two boxes is the same object
    loss_names: tuple[str, ...]

    def dense(self, x: Tensor) -> Dense:
        """What every anchor or proposal says of x (N, 3, S, S), normalized, with gradients."""
        ...

    def losses(self, x: Tensor, truth: Sequence[Truth]) -> list[dict[str, Tensor]]:
        """Each image's losses, by `loss_names`."""
        ...


def normalization(arch: str) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the pixels that a registered network wants."""
    module = registry.network(arch)
    if not isinstance(module, SSD | RetinaNet | FasterRCNN):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = (
        tuple(map(float, values))
        for values in (module.transform.image_mean, module.transform.image_std)
    )
    return cast(Channels, mean), cast(Channels, std)


def own_network(arch: str, classes: int, size: int) -> nn.Module:
    """The network of a registered factory. Raises ValueError for one that we cannot take apart."""
    module = registry.network(arch)
    if isinstance(module, SSD | RetinaNet):
        net: nn.Module = SingleStage(module, size)
    elif isinstance(module, FasterRCNN):
        net = TwoStage(module, size)
    elif all(hasattr(module, name) for name in ("dense", "losses", "loss_names", "iou")):
        net = module
    else:
        raise ValueError(
            f"--arch {arch} makes a {type(module).__name__}: return torchvision's SSD, RetinaNet or"
            " FasterRCNN, or a module with dense, losses, loss_names and iou"
            " (rampart.hardening.objects.own.Network)"
        )
    with torch.no_grad():
        logits = cast(Network, net.eval()).dense(torch.zeros(1, 3, size, size)).logits
    if logits.shape[2] != classes + 1:
        raise ValueError(
            f"--arch {arch} tells {logits.shape[2]} classes, with background, but the pictures show"
            f" {classes}: build it for {classes + 1}"
        )
    return net
