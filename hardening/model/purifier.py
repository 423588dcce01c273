"""Purifiers: residual generators in front of the classifier that undo perturbations. Half
resolution on pixel-unshuffled channels (as FFDNet, Zhang et al. 2018, section III) costs a quarter;
without BatchNorm no image's answer depends on its neighbours. `BlockPurifier` is what new models
get; `Purifier` is what those have whose files name no kind.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class PurifierConfig(NamedTuple):
    """What builds a generator: channels of its inner layers, and how many there are."""

    width: int = 48
    depth: int = 3


class Purifier(nn.Module):
    """Pixels in [0, 1] to pixels in [0, 1], at first the same; subclass and `register` another."""

    name: ClassVar[str] = "residual"
    Config: ClassVar[type[Any]] = PurifierConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        inner = self.inner()
        last = nn.Conv2d(config.width, 12, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        layers = nn.PixelUnshuffle(2), *inner, last, nn.PixelShuffle(2)
        self.residual: nn.Module = nn.Sequential(*layers)

    def inner(self) -> list[nn.Module]:
        """The layers from 12 channels to `width`, of half the height and width."""
        layers: list[nn.Module] = []
        channels = 12
        for _ in range(self.config.depth):
            layers += [nn.Conv2d(channels, self.config.width, 3, padding=1), nn.ReLU()]
            channels = self.config.width
        return layers

    def forward(self, x: Tensor) -> Tensor:
        """Purified images, shaped like x (N, 3, H, W) with H and W even."""
        residual: Tensor = self.residual(x)
        return (x + residual).clamp(0, 1)


class BlockPurifierConfig(NamedTuple):
    """What builds a generator of residual blocks: channels of its layers, and blocks of two."""

    width: int = 48
    blocks: int = 3


class BlockPurifier(Purifier):
    """What comes in keeps its scale through all layers (He et al. 2015, section 2.2), where
    `Purifier` begins by fading it: it learns in a few thousand steps.
    """

    name = "blocks"
    Config = BlockPurifierConfig

    def inner(self) -> list[nn.Module]:
        """A layer, then residual blocks."""
        blocks = [Block(self.config.width) for _ in range(self.config.blocks)]
        return [scaled(12, self.config.width), *blocks, nn.ReLU()]


class Block(nn.Module):
    """Two layers whose answer is added to what they were given; the identity before training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = scaled(width, width)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(nn.ReLU(), scaled(width, width), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Features, shaped like x (N, width, H, W)."""
        y: Tensor = x + self.layers(x)
        return y


def scaled(channels: int, width: int) -> nn.Conv2d:
    """3x3, drawn so that ReLUs keep the variance."""
    layer = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


PURIFIERS: dict[str, type[Purifier]] = {}


def register(purifier: type[Purifier]) -> None:
    """Make a purifier known by its name."""
    PURIFIERS[purifier.name] = purifier


register(Purifier)
register(BlockPurifier)


def described(purifier: Purifier) -> dict[str, Any]:
    """What a checkpoint says of a purifier, for `build`."""
    kind = {} if purifier.name == Purifier.name else {"kind": purifier.name}
    return {**kind, **purifier.config._asdict()}


def build(description: dict[str, Any]) -> Purifier:
    """The purifier of a description, with new weights. Raises ValueError for an unknown one."""
    values = dict(description)
    name = values.pop("kind", Purifier.name)
    if name not in PURIFIERS:
        raise ValueError(f"unknown purifier {name!r}: register its class before loading")
    kind = PURIFIERS[name]
    return kind(kind.Config(**values))


def of_config(config: Any) -> Purifier:
    """The purifier that `config` builds, with new weights."""
    kind = next(kind for kind in PURIFIERS.values() if kind.Config is type(config))
    return kind(config)
