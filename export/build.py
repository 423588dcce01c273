"""A model folder's variant as an ONNX graph: exported, held to the parity gate, lowered."""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from skimage.data import data_dir
from torch import Tensor

from rampart.export import shipped
from rampart.export.precision import lower
from rampart.export.shipped import AnyParity
from rampart.export.ways import WAYS
from rampart.handlers.image import decode
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.files import (
    Precision,
    graph_file,
    load_variant,
    ranges_file,
    read_contents,
)
from rampart.hardening.model.promise import finest_rate

TOOLS = ("torch", "onnx", "onnxscript")


def build(
    folder: Path,
    variant: pipelines.Variant,
    out: Path,
    *,
    precision: Precision = "fp32",
    images: Tensor | None = None,
    rate: float | None = None,
) -> AnyParity:
    """Write a variant's ONNX graph, through the gate on `images` uint8 (N, H, W, 3) or on crops, at
    the false-alarm `rate`, or the one that the calibration promises. What fails is not written.
    """
    weights = folder / "weights.safetensors"
    contents = read_contents(weights)
    way = WAYS[contents.task]
    pipeline, _ = way.load(weights, variant)
    if images is None:
        images = sample_crops(contents.image_size)
    calibration = load_variant(folder, variant)
    if rate is None:
        rate = finest_rate(calibration.images)
    with TemporaryDirectory(dir=out.parent) as scratch:
        draft = way.to_onnx(pipeline, Path(scratch) / out.name)
        engine = way.engine(draft, device="cpu")
        parity = way.compare(pipeline, engine, calibration, images, rate=rate)
        if precision != "fp32":
            lower(pipeline, precision, draft, ranges_file(folder, variant), fp32=draft)
            lowered = way.engine(draft, device="cpu"), load_variant(folder, variant, precision)
            way.check_close((engine, calibration), lowered, images)
        draft.replace(out)
    return parity


def ship(folder: Path, variant: pipelines.Variant, precision: Precision = "fp32") -> Path:
    """Build the graph into the model folder, with its record, for `archive` to copy."""
    shipped.check_made(folder, variant, precision)
    file = graph_file(folder, variant, precision)
    parity = build(folder, variant, file, precision=precision)
    tools = {tool: version(tool) for tool in TOOLS}
    return shipped.record(folder, variant, precision, parity, tools)


def sample_crops(size: int, *, count: int = 32) -> Tensor:
    """Crops (count, size, size, 3) of scikit-image's cat, a picture that needs no download."""
    picture = torch.from_numpy(decode((Path(data_dir) / "chelsea.png").read_bytes(), size + 64))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(picture.shape[0] - size, (count,), generator=generator)
    columns = torch.randint(picture.shape[1] - size, (count,), generator=generator)
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return torch.stack([picture[i : i + size, j : j + size] for i, j in places])
