"""ONNX files as others make them, of images that a network learns in seconds."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float

SIZE = 16


def saved(path: Path, images: Images) -> Path:
    """Images as an .npz file."""
    np.savez(path, image=images.image, label=images.label, classes=images.classes)
    return path


class Signed(torch.nn.Module):
    """A network that wants pixels in [-1, 1], and gives probabilities."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x / 2 + 0.5).softmax(1)


def learn(model: torch.nn.Module, images: Images, steps: int = 120) -> torch.nn.Module:
    """`model` after some steps on images in [0, 1]."""
    x, label = to_float(images.image), images.label
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def export(model: torch.nn.Module, path: Path, size: int = SIZE, **options: Any) -> Path:
    """By torch's own exporter."""
    x = torch.zeros(2, 3, size, size)
    names = {"input_names": ["pixels"], "output_names": ["scores"]}
    options = {"dynamic_shapes": ({0: torch.export.Dim("n")},)} | options
    quiet = {"external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own, in its exporter
        torch.onnx.export(model.eval(), (x,), path, dynamo=True, **quiet, **names, **options)
    return path


def by_timm(path: Path, images: Images) -> Path:
    """A network of timm's, by its own script."""
    import timm
    from timm.utils.onnx import onnx_export

    torch.manual_seed(0)
    model = learn(timm.create_model("test_resnet", num_classes=10), images, steps=60)
    onnx_export(model, str(path), batch_size=1, input_size=(3, *images.image.shape[1:3]))
    return path


def quantized(path: Path, out: Path) -> Path:
    """By ONNX Runtime's own script, in 8 bits."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(path, out)
    return out


def by_scikit_learn(path: Path, images: Images) -> Path:
    """A linear classifier of flat rows, by skl2onnx."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    rows = images.image.reshape(len(images), -1).numpy().astype(np.float32) / 255
    model = LogisticRegression(tol=10.0).fit(rows, images.label.numpy())
    path.write_bytes(to_onnx(model, rows[:1]).SerializeToString())
    return path
