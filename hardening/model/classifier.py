"""Classifiers by name, with normalization inside: torchvision's own definitions, and timm's. Up to
64 pixels a side torchvision's stem keeps the resolution.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet

from rampart.hardening.model import registry, wrapping
from rampart.hardening.model.wrapping import Adapter, Layout

# fmt: off
RESNETS = (
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
)
VGGS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
# fmt: on
ARCHITECTURES = (*RESNETS, *VGGS, "alexnet", "googlenet", "squeezenet1_1")
TIMM = "timm:"
SMALL = 64  # pixels a side
HIDDEN = 1024  # of AlexNet's head for small images
DOUBTS = 64  # hidden units of the rectifier
# A smooth one gives attacks of training better gradients (Xie et al. 2020, "Smooth adversarial
# training", section 4).
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class ClassifierConfig(NamedTuple):
    """What builds a classifier; head and channels are of a network of your own, named by `arch`."""

    arch: str
    classes: int
    width: float = 1.0
    image_size: int = 32
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616)
    rectified: bool = False
    head: str = ""
    channels: int = 3
    channels_last: bool = False
    activation: str = "relu"

    def __repr__(self) -> str:
        # What stands for weights and for runs to go on with says of ours what it always said.
        shown = self._asdict()
        left_out = () if self.head else ("head", "channels", "channels_last")
        for name in (*left_out, *(["activation"] if self.activation == "relu" else [])):
            del shown[name]
        return (
            f"ClassifierConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
        )


class Classifier(nn.Module):
    """Pixels in [0, 1] to logits; detectors see the pooled features. `auxiliary` adds GoogLeNet's
    heads of training, `config.rectified` the second head of rectified rejection (Pang et al. 2022).
    Raises ValueError for what cannot be built.
    """

    def __init__(self, config: ClassifierConfig, *, auxiliary: bool = False) -> None:
        super().__init__()
        self.config = config
        self.trained = ""  # how, as the file of its weights says
        self.backbone = build(config, auxiliary=auxiliary)
        self.head_name, self.head, self.feature_size = split_head(self.backbone, config)
        self.rectifier: nn.Module | None = None
        if config.rectified:
            layers = nn.Linear(self.feature_size, DOUBTS), nn.ReLU(), nn.Linear(DOUBTS, 1)
            self.rectifier = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        *,
        head: str,
        classes: Sequence[str] | int,
        image_size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int = 3,
        channels_last: bool = False,
        name: str = "",
    ) -> "Classifier":
        """A classifier with the weights of `module`, a network of your own that gives logits.

        It takes (N, channels, H, W), or (N, H, W, channels) with `channels_last`; one channel is
        gray. `head` names the layer that makes the logits of features (N, F). `mean` and `std`, a
        value a channel, normalize pixels in [0, 1]: leave them out where the module does that
        itself. `name` stands for the network in checkpoints, which hold no code. Raises ValueError
        with the remedy.
        """
        wrapping.check_normalization(module, mean is not None or std is not None)
        own = copy.deepcopy(module).cpu()
        arch = name or f"{type(module).__module__}:{type(module).__qualname__}"
        registry.register(arch, lambda: copy.deepcopy(own))
        config = ClassifierConfig(
            arch,
            classes if isinstance(classes, int) else len(classes),
            image_size=image_size,
            mean=each_channel(mean, 0.0),
            std=each_channel(std, 1.0),
            head=head,
            channels=channels,
            channels_last=channels_last,
        )
        return cls(config)

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (N, F) of x (N, 3, H, W) in [0, 1]."""
        out = self.backbone((x - self.mean) / self.std)
        features: Tensor = out if isinstance(out, Tensor) else out[0]
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of x (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.embed(x))
        return logits

    def all_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward`, and in training what auxiliary heads say too, each (N, K)."""
        out = self.backbone((x - self.mean) / self.std)
        features, *others = (out,) if isinstance(out, Tensor) else out
        return (self.head(features), *others)

    def rectified_confidence(self, features: Tensor, logits: Tensor) -> Tensor:
        """Confidence (N,) times how far the second head trusts it, where there is one."""
        confidence = logits.float().softmax(1).amax(1)
        if self.rectifier is None:
            return confidence
        trust: Tensor = self.rectifier(features).float().sigmoid().squeeze(1)
        return confidence * trust


def build(config: ClassifierConfig, *, auxiliary: bool) -> nn.Module:
    """The library's network for `config`, its stem, head and width changed where asked for."""
    check_activation(config)
    if config.head:
        return own_network(config)
    if config.arch.startswith(TIMM):
        net = timm_model(config)
    elif config.arch in ARCHITECTURES:
        net = torchvision_model(config, auxiliary=auxiliary)
        if config.image_size <= SMALL:
            fit_small_images(net, config)
    else:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"unknown architecture {config.arch!r}: choose one of {known}, timm:NAME, or name a"
            " factory of your own as package.module:factory, with --head"
        )
    if config.width != 1.0:
        if config.arch not in (*RESNETS, *VGGS):
            raise ValueError(f"{config.arch} has no --width: only ResNet and VGG are scaled")
        scale_width(net, config.width)
    if config.activation != "relu":
        replace_relu(net, ACTIVATIONS[config.activation])
    return net


def check_activation(config: ClassifierConfig) -> None:
    """Raise ValueError for an activation that a network cannot have."""
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"--activation {config.activation}: choose one of {known}")
    # GoogLeNet calls ReLU as a function, where no module can be replaced.
    ours = not config.head and config.arch in ARCHITECTURES and config.arch != "googlenet"
    if config.activation != "relu" and not ours:
        raise ValueError(
            f"{config.arch} keeps its own activations: leave out --activation, or choose a ResNet,"
            " a VGG, alexnet or squeezenet1_1"
        )


def replace_relu(net: nn.Module, activation: type[nn.Module]) -> None:
    """Put `activation` in the place of each ReLU of `net`."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.ReLU):
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, activation(inplace=True))


def own_network(config: ClassifierConfig) -> Adapter:
    """The network that the user has named, with the weights it comes with."""
    if config.width != 1.0:
        raise ValueError(f"{config.arch} has no --width: only ResNet and VGG are scaled")
    layout = Layout(config.channels, config.channels_last)
    return Adapter(registry.network(config.arch), layout)


def each_channel(values: Sequence[float] | None, default: float) -> tuple[float, float, float]:
    """A value for red, green and blue. Raises ValueError for other than one or three."""
    every = tuple(values) if values is not None else (default,)
    if len(every) not in (1, 3):
        raise ValueError(f"mean and std have a value for each channel, one or three: {every}")
    red, green, blue = every if len(every) == 3 else every * 3
    return red, green, blue


def torchvision_model(config: ClassifierConfig, *, auxiliary: bool) -> nn.Module:
    """The network as torchvision defines it, with new weights."""
    if config.arch == "resnet10":  # the smallest; He et al. (2016) and torchvision begin at 18
        smallest: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=config.classes)
        return smallest
    options: dict[str, Any] = {"num_classes": config.classes}
    if config.arch == "googlenet":
        options |= {"aux_logits": auxiliary, "init_weights": True}
    net: nn.Module = get_model(config.arch, weights=None, **options)
    return net


def timm_model(config: ClassifierConfig) -> nn.Module:
    """The network as timm defines it, with new weights, and its stem as it is."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{config.arch} needs timm: `pip install timm`") from error
    name = config.arch.removeprefix(TIMM)
    if name not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "timm.list_models()"
        raise ValueError(f"timm knows no {name!r}: try {close}")
    options: dict[str, Any] = {"num_classes": config.classes}
    try:  # networks of tokens are built for one size, others refuse to hear of it
        sized: nn.Module = timm.create_model(name, img_size=config.image_size, **options)
    except TypeError:
        unsized: nn.Module = timm.create_model(name, **options)
        return unsized
    return sized


def fit_small_images(net: Any, config: ClassifierConfig) -> None:
    """Let few pixels through: a 3x3 stem of stride 1, no early pooling, a head that fits."""
    if config.arch in RESNETS:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    elif config.arch in VGGS:
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Sequential(nn.Linear(512, config.classes))
    elif config.arch == "alexnet":
        net.features[0] = nn.Conv2d(3, 64, 3, padding=1)
        net.features[2] = nn.Identity()
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        first, last = nn.Linear(256, HIDDEN), nn.Linear(HIDDEN, config.classes)
        net.classifier[1], net.classifier[4], net.classifier[6] = (
            first,
            nn.Linear(HIDDEN, HIDDEN),
            last,
        )
    elif config.arch == "googlenet":
        net.conv1.conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool1 = net.maxpool2 = nn.Identity()
    else:  # squeezenet1_1
        net.features[0] = nn.Conv2d(3, 64, 3, padding=1)
        net.features[2] = nn.Identity()


def split_head(net: nn.Module, config: ClassifierConfig) -> tuple[str, nn.Module, int]:
    """Take the last layer off `net`: (its name there, the layer, features that go into it)."""
    if isinstance(net, Adapter):
        size = config.image_size
        logits = wrapping.check_logits(net.net, net.layout, size, config.classes)
        return (config.head, *wrapping.split_off(net, config.head, logits, size))
    if config.arch == "squeezenet1_1":
        return "", nn.Identity(), config.classes
    linear = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    linear = [pair for pair in linear if not pair[0].startswith("aux")]
    name, head = linear[-1] if linear else ("", None)
    if head is None or head.out_features != config.classes:
        raise ValueError(f"{config.arch} does not end in one linear layer: take another")
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())
    return name, head, head.in_features


def scale_width(net: nn.Module, width: float) -> None:
    """Rebuild each layer of the unscaled `net` with its channel counts times `width`."""

    def scaled(channels: int) -> int:
        return channels if channels == 3 else max(8, round(channels * width / 8) * 8)

    every = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    new: nn.Module
    before = 0  # channels of the layer before, as they were; flattening repeats each of them
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Conv2d):
            new = convolution = nn.Conv2d(
                scaled(layer.in_channels),
                scaled(layer.out_channels),
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                bias=layer.bias is not None,
            )
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            before = layer.out_channels
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(scaled(layer.num_features))
        elif isinstance(layer, nn.Linear):
            inputs = layer.in_features // before * scaled(before)
            outputs = layer.out_features
            new = nn.Linear(inputs, outputs if name == every[-1] else scaled(outputs))
            before = outputs
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, new)
