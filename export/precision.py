"""A model folder's variants in fp16 for GPUs, and in int8 for CPUs, each with its calibration."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rampart.export.halve import halve
from rampart.export.parity import Agreement
from rampart.export.quantize import quantize
from rampart.export.scene_agreement import SceneAgreement
from rampart.export.to_onnx import to_onnx
from rampart.export.ways import WAYS
from rampart.hardening.model import calibrate
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.files import Precision, load_variant, ranges_file, read_contents
from rampart.hardening.model.images import Images, split
from rampart.hardening.train.data import spread

Found = TypeVar("Found", Agreement, SceneAgreement)


def lower(
    pipeline: pipelines.DefendedClassifier,
    precision: Precision,
    out: Path,
    ranges: Path,
    *,
    fp32: Path | None = None,
) -> Path:
    """Write the graph of `pipeline` to `out`, from its `fp32` one where there is one."""
    if precision == "int8":
        return quantize(fp32 or to_onnx(pipeline, out), ranges, out)
    return to_onnx(halve(pipeline) if precision == "fp16" else pipeline, out)


def make(
    folder: Path,
    variant: pipelines.Variant,
    precision: Precision,
    held: Images,
    agree: Callable[..., Found],
    *,
    source: str,
    limit: int = 512,
) -> Found:
    """Write the calibration of a model folder's variant in `precision`; for int8 its ranges too.

    `agree` compares two pairs of graph and calibration, in fp32 and in `precision`. Raises
    RuntimeError, and writes nothing, where it does not hold.
    """
    weights = folder / "weights.safetensors"
    way = WAYS[read_contents(weights).task]
    pipeline, classes = way.load(weights, variant)
    if held.classes != tuple(classes):
        raise ValueError(
            f"the images have the classes {held.classes}, the model {classes}: pass the images that"
            " it was calibrated on"
        )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        graph, form = way.to_onnx(pipeline, work / "fp32.onnx"), work / f"{precision}.onnx"
        ranges = ranges_file(work, variant)
        if precision == "int8":
            quantize(graph, ranges, form, spread(split(held, "tuning"), limit).image.numpy())
        else:
            lower(pipeline, precision, form, ranges)
        engine = way.engine(form)
        table = calibrate.calibrate(pipeline, held, variant, engine)
        agreement = agree((way.engine(graph), load_variant(folder, variant)), (engine, table))
        if not agreement.holds:
            loss = f"{variant} loses too much in {precision}"
            raise RuntimeError(f"{loss}, so nothing was written: {agreement}")
        calibrate.write(folder, table, f"{source}, calibration split", precision)
        if precision == "int8":
            ranges.replace(ranges_file(folder, variant))
    return agreement
