"""A network of your own as a classifier of ours: its head split off, its input adapted."""

import copy
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L
NORMALIZERS = ("mean", "std")
DIGITS = 6  # of outputs that count: in double precision they are equal on any machine
GAP = 1e-3  # of the largest answer: single precision may differ by less


class Layout(NamedTuple):
    """What a network takes: three channels or one, and where they stand."""

    channels: int = 3
    channels_last: bool = False

    def of(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) as the network takes it."""
        if self.channels == 1:
            weights = x.new_tensor(GRAY).view(1, 3, 1, 1)
            x = (x * weights).sum(1, keepdim=True)
        return x.permute(0, 2, 3, 1) if self.channels_last else x


class Adapter(nn.Module):
    """A network behind what brings (N, 3, H, W) into its layout."""

    def __init__(self, net: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.net, self.layout = net, layout

    def forward(self, x: Tensor) -> Any:
        """What the network says of x (N, 3, H, W)."""
        return self.net(self.layout.of(x))


def example(size: int) -> Tensor:
    """Two images (2, 3, size, size) to try a network on."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def check_logits(net: nn.Module, layout: Layout, size: int, classes: int) -> Tensor:
    """The logits (2, K) of the example. Raises ValueError where the network does not give them."""
    x = example(size)
    try:
        logits = answer(net, layout, x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(advice(net, layout, x, error)) from error
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise ValueError(f"the module returns a {kind}: let it return the logits (N, K) alone")
    if logits.shape != (2, classes):
        raise ValueError(
            f"the module returns {tuple(logits.shape)} for two images, but {classes} classes need"
            f" (2, {classes}): pass the right number of classes"
        )
    return logits


def answer(net: nn.Module, layout: Layout, x: Tensor) -> Any:
    """What the network says of x (N, 3, H, W), as in use."""
    training = net.training
    try:
        with torch.no_grad():
            return net.eval()(layout.of(x))
    finally:
        net.train(training)


def advice(net: nn.Module, layout: Layout, x: Tensor, error: Exception) -> str:
    """What to pass instead, where another layout works."""
    others = {
        "channels_last=True": layout._replace(channels_last=not layout.channels_last),
        "channels=1": layout._replace(channels=1),
        "channels=1, channels_last=True": Layout(1, True),
    }
    if layout.channels_last:
        others["channels_last=False"] = others.pop("channels_last=True")
    for words, other in others.items():
        try:
            if isinstance(answer(net, other, x), Tensor):
                return f"the module does not take {shape(layout, x)}: pass {words}"
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
    first = str(error).splitlines()[0]
    return f"the module does not take {shape(layout, x)}, check image_size: {first}"


def shape(layout: Layout, x: Tensor) -> str:
    """The input's shape in words."""
    sizes = (str(size) for size in layout.of(x).shape[1:])
    return f"(N, {', '.join(sizes)})"


def split_off(backbone: Adapter, head: str, logits: Tensor, size: int) -> tuple[nn.Module, int]:
    """Take layer `head` off: (the layer, its features F); ValueError if it makes no `logits`."""
    names = [name for name, _ in backbone.net.named_modules() if name]
    if head not in names:
        last = ", ".join(names[-4:]) or "none, it is one layer"
        raise ValueError(f"the module has no layer {head!r}: its last ones are {last}")
    layer = backbone.net.get_submodule(head)
    features = features_before(backbone, head, logits, size)
    if features:
        parent, _, name = head.rpartition(".")
        setattr(backbone.net.get_submodule(parent), name, nn.Identity())
        return layer, features
    fitting = [name for name in reversed(names) if features_before(backbone, name, logits, size)]
    if fitting:
        raise ValueError(f"{head!r} does not output the logits: pass head={fitting[0]!r}")
    raise ValueError(
        f"{head!r} is not the module's last step (does a softmax follow?): let the module return"
        " what one layer makes of features (N, F), and name that layer"
    )


def features_before(backbone: Adapter, head: str, logits: Tensor, size: int) -> int:
    """How many features go into the layer `head`, or 0 where it does not make the logits alone."""
    layer = backbone.net.get_submodule(head)
    if next(layer.parameters(), None) is None:
        return 0  # a dropout or a softmax makes nothing of its own
    parent, _, name = head.rpartition(".")
    owner = backbone.net.get_submodule(parent)
    training = backbone.training
    setattr(owner, name, nn.Identity())
    try:
        features = answer(backbone, Layout(), example(size))
        flat = isinstance(features, Tensor) and features.dim() == 2 and len(features) == 2
        if not flat:
            return 0
        with torch.no_grad():
            again = layer.eval()(features)
        same = again.shape == logits.shape and torch.allclose(again, logits, atol=1e-4, rtol=1e-3)
        return int(features.shape[1]) if same else 0
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return 0
    finally:
        setattr(owner, name, layer.train(training))


def check_normalization(net: nn.Module, normalized: bool) -> None:
    """Raise ValueError where the network normalizes by itself and would be given it again."""
    for name, tensor in net.named_buffers():
        if normalized and name.split(".")[-1] in NORMALIZERS and tensor.numel() in (1, 3):
            raise ValueError(
                f"the module already normalizes its input (its buffer {name!r}): leave out mean and"
                " std"
            )


def behaviour(net: nn.Module, size: int) -> str:
    """16 hex digits that stand for what a network does, whatever its code: its logits of the
    example, and their gradients.
    """
    total = hashlib.sha256()
    for part in tried(net, size):
        share = part / part.abs().max().clamp_min(1e-30)
        total.update((share * 10**DIGITS).round().nan_to_num().long().numpy().tobytes())
    return total.hexdigest()[:16]


def tried(net: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """A network's logits of the example, and their gradient, in double precision if it has that."""
    own, x = copy.deepcopy(net).cpu().eval().requires_grad_(False), example(size)
    try:
        return logits_and_slope(own.double(), x.double())
    except (RuntimeError, ValueError, TypeError):  # it computes in single precision alone
        return logits_and_slope(own.float(), x)


def answers(net: nn.Module, size: int) -> list[list[float]]:
    """What a network does in few numbers, for files: its logits of the example, and the mean
    gradient of each channel.
    """
    logits, slope = tried(net, size)
    parts = logits.flatten(), slope.mean((2, 3)).flatten()
    return [[float(f"{value:.6g}") for value in part.nan_to_num().tolist()] for part in parts]


def same(some: list[list[float]], others: list[list[float]]) -> bool:
    """Whether `answers` are those of one network, on machines that round differently."""
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(some, others, strict=True)]
    return all(a.shape == b.shape and (a - b).abs().max() <= GAP * a.abs().max() for a, b in pairs)


def logits_and_slope(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (N, K) of x (N, 3, H, W), and the gradient of a sum of them."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        x = x.clone().requires_grad_()
        logits: Tensor = net(x)
        slope = torch.zeros_like(x)
        if logits.requires_grad:
            total = (logits * torch.arange(1, logits.shape[1] + 1)).sum()
            (slope,) = torch.autograd.grad(total, x, materialize_grads=True)
    return logits.detach(), slope


def behaviour_of_code(net: nn.Module, size: int) -> str:
    """The same of its code alone, with weights that are always the same."""
    own, draws = copy.deepcopy(net), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in own.parameters():
            if weight.dim() > 1:
                drawn = torch.randn(weight.shape, generator=draws)
                weight.copy_(drawn / weight[0].numel() ** 0.5)
            else:
                weight.fill_(1.0)
    return behaviour(own, size)
