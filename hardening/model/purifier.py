"""A purifier: a residual generator in front of the classifier that undoes perturbations. Half
resolution on pixel-unshuffled channels (as FFDNet, Zhang et al. 2018, section III) costs a quarter;
without BatchNorm no image's answer depends on its neighbours.
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

    def __init__(self, config: PurifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        channels = 12
        for _ in range(config.depth):
            layers += [nn.Conv2d(channels, config.width, 3, padding=1), nn.ReLU()]
            channels = config.width
        last = nn.Conv2d(channels, 12, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.residual: nn.Module = nn.Sequential(*layers, last, nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """Purified images, shaped like x (N, 3, H, W) with H and W even."""
        residual: Tensor = self.residual(x)
        return (x + residual).clamp(0, 1)


PURIFIERS: dict[str, type[Purifier]] = {}


def register(purifier: type[Purifier]) -> None:
    """Make a purifier known by its name."""
    PURIFIERS[purifier.name] = purifier


register(Purifier)


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
