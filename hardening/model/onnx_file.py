"""A classifier as an ONNX file of whatever origin: what it takes, what it says, and its twin in
torch, which has gradients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from rampart.handlers.engine import sha256
from rampart.hardening.model.arrays import Floats, Pixels
from rampart.hardening.model.scaling import SCALINGS, Layout, Scaling

CHANNELS: dict[Layout, int] = {"nchw": 0, "nhwc": 2}  # where they stand after the batch
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
PIECE = 64  # images of a run
TINY = 1e-12  # below any probability that counts
# How far torch may be from the file: as a share of the largest logit, and at least.
NEAR, LEAST = 1e-3, 1e-4
OPSETS = (18, 17, 13)  # that onnx2torch knows, from newer ones


class Unconvertible(ValueError):
    """Why a file has no twin in torch that can be believed."""


class Entry(NamedTuple):
    """The one input of a file: `batch` is None where it is free."""

    name: str
    type: str
    layout: Layout
    size: int
    batch: int | None


class OnnxFile:
    """An ONNX classifier. `layout` and `size` stand in where the file says nothing of them.

    Raises ValueError, in a sentence, for a file that is no classifier of RGB pictures.
    """

    def __init__(
        self, path: Path, *, layout: Layout | None = None, size: int | None = None
    ) -> None:
        try:
            self.model = onnx.load(str(path))
        except Exception as error:  # protobuf's have no common type
            raise ValueError(f"{path} is no ONNX file: {error}") from error
        self.name = path.stem
        self.digest = sha256(path)
        self.was_cut = cut_softmax(self.model)
        try:
            self._session = onnxruntime.InferenceSession(
                self.model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's have no common type
            raise ValueError(f"{path} does not load in ONNX Runtime: {error}") from error
        self.entry = entry_of(self._session, path, layout, size)
        self.classes = self._scores(np.zeros((1, self.entry.size, self.entry.size, 3), np.uint8))

    def _scores(self, images: Pixels) -> int:
        """How many classes it answers. Raises ValueError where that is no row of scores."""
        first = self._run(images, SCALINGS["unit"])
        if first.ndim != 2 or first.dtype.kind != "f" or first.shape[1] < 2:
            raise ValueError(
                f"{self.name} gives {first.dtype} {list(first.shape)}, but a classifier gives"
                " scores (N, K) of two classes or more"
            )
        return int(first.shape[1])

    def logits(self, images: Pixels, scaling: Scaling) -> NDArray[np.float32]:
        """What it says of uint8 (N, H, W, 3): logits (N, K), or log-probabilities."""
        out = self._run(images, scaling).astype(np.float32)
        return np.log(np.maximum(out, TINY)) if self.gives_probabilities(out) else out

    @staticmethod
    def gives_probabilities(out: NDArray[Any]) -> bool:
        """Whether outputs (N, K) are shares."""
        return bool((out >= 0).all() and np.allclose(out.sum(1), 1, atol=1e-3))

    def _run(self, images: Pixels, scaling: Scaling) -> Floats:
        """The first output for uint8 (N, H, W, 3), padded where the batch is fixed."""
        step, parts = self.entry.batch or PIECE, []
        for start in range(0, len(images), step):
            piece = images[start : start + step]
            missing = step - len(piece) if self.entry.batch else 0
            padded = np.concatenate([piece, np.repeat(piece[:1], missing, 0)])
            x = scaling.of(padded, self.entry.layout).astype(TYPES[self.entry.type])
            parts.append(self._session.run(None, {self.entry.name: x})[0][: len(piece)])
        out: Floats = np.concatenate(parts)
        return out

    def twin(self, images: Pixels, scaling: Scaling) -> Callable[[Tensor], Tensor]:
        """The same in torch, of x (N, 3, H, W) in [0, 1], once it says of `images` what the file
        says. Raises Unconvertible.
        """
        run = in_torch(converted(self.model), self.entry, scaling)
        self._check(run, images, scaling)
        return run

    def _check(self, run: Callable[[Tensor], Tensor], images: Pixels, scaling: Scaling) -> None:
        """The parity gate: batches of 1 and more, pictures and noise, and a gradient."""
        noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
        try:
            for some in (images[:1], images, noise):
                x = torch.from_numpy(some.transpose(0, 3, 1, 2)).float() / 255
                own, theirs = run(x).detach().numpy(), self.logits(some, scaling)
                limit = max(LEAST, NEAR * float(np.abs(theirs).max()))
                if own.shape != theirs.shape:
                    raise Unconvertible(f"its twin in torch gives {list(own.shape)}")
                if (off := float(np.abs(own - theirs).max())) > limit:
                    raise Unconvertible(f"its twin in torch differs from it, by {off:.2g}")
            x.requires_grad_()
            (slope,) = torch.autograd.grad(run(x).amax(1).sum(), x)
        except RuntimeError as error:
            raise Unconvertible(f"its twin in torch does not run ({said(error)})") from error
        if not slope.isfinite().all() or (slope.abs().amax((1, 2, 3)) == 0).float().mean() > 0.5:
            raise Unconvertible("its twin in torch has no gradients to follow")


def converted(model: Any) -> torch.nn.Module:
    """A model in torch, by way of an older opset where onnx2torch does not know its own. Raises
    Unconvertible.
    """
    from onnx2torch import convert

    plain, problems = onnx.ModelProto(), []
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type == "Reshape":  # torch writes `allowzero` even where no side is 0
            del node.attribute[:]
    for opset in (None, *OPSETS):
        try:
            older = onnx.version_converter.convert_version(plain, opset) if opset else plain
            net: torch.nn.Module = convert(older).eval().requires_grad_(False)
        except Exception as error:  # each operator has its own
            problems.append(error)
        else:
            return net
    raise Unconvertible(f"onnx2torch does not convert it ({said(problems[0])})") from problems[0]


def said(error: Exception) -> str:
    """An error on a short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def cut_softmax(model: Any) -> bool:
    """Let a file give logits that ends in a softmax, whose gradients vanish; whether it did."""
    output = model.graph.output[0]
    last = next((node for node in model.graph.node if output.name in node.output), None)
    if last is None or last.op_type != "Softmax":
        return False
    model.graph.node.remove(last)
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == last.input[0]:
                node.output[place] = output.name
        for place, name in enumerate(node.input):
            if name == last.input[0]:
                node.input[place] = output.name
    return True


def entry_of(session: Any, path: Path, layout: Layout | None, size: int | None) -> Entry:
    """What a file takes. Raises ValueError for what is no RGB picture, or not told."""
    inputs = session.get_inputs()
    told = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in TYPES:
        raise ValueError(f"{path} takes {told}, but an image classifier takes (N, 3, H, W)")
    (one,) = inputs
    batch, *rest = (side if isinstance(side, int) else None for side in one.shape)
    orders = [name for name, at in CHANNELS.items() if rest[at] == 3]
    if rest[0] == 1 or rest[2] == 1:
        raise ValueError(f"{path} takes gray pictures ({told}), but Rampart attacks only RGB")
    if layout is None and len(orders) != 1:
        raise ValueError(f"{path} takes {told}: pass --layout nchw or --layout nhwc")
    order = layout or orders[0]
    height, width = rest[1:] if order == "nchw" else rest[:2]
    side = height or size
    if side is None:
        raise ValueError(f"{path} takes pictures of any size: name one with --image-size")
    if (width or side) != side or (size or side) != side:
        raise ValueError(f"{path} takes {told}: it must be square, and --image-size its own size")
    return Entry(one.name, one.type, order, side, batch)


def in_torch(net: torch.nn.Module, entry: Entry, scaling: Scaling) -> Callable[[Tensor], Tensor]:
    """A converted network of x (N, 3, H, W) in [0, 1], piece by piece where its batch is fixed."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (scaling.mean, scaling.std))

    def once(x: Tensor) -> Tensor:
        scaled = (x * scaling.factor - mean) / std
        out = net(scaled.permute(0, 2, 3, 1) if entry.layout == "nhwc" else scaled)
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        is_share = (first.detach() >= 0).all() and (first.detach().sum(1) - 1).abs().max() < 1e-3
        return first.clamp_min(TINY).log() if is_share else first

    def run(x: Tensor) -> Tensor:
        if not entry.batch:
            return once(x)
        missing = -len(x) % entry.batch
        padded = torch.cat([x, x[:1].expand(missing, -1, -1, -1)])
        return torch.cat([once(part) for part in torch.split(padded, entry.batch)])[: len(x)]

    return run
