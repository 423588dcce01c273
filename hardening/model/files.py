"""The files of a model folder by name, and what can be read off them without torch."""

import json
import os
import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rampart.handlers.verdict import Calibration
from rampart.hardening.model.presence import check_file

FORMAT = "rampart-1"
SAMPLE = "sample.png"  # one held-out picture, to try an endpoint with
SAMPLES = (SAMPLE, "sample-attacked.png", "sample-other.png")  # in the order that they are tried
TRAINED_ON = "training-images.npy"  # fingerprints of the images behind the weights beside it
CAPTION = "Description"  # PNG's own keyword for what a picture shows; samples have it
Precision = Literal["fp32", "fp16", "int8"]


class Contents(NamedTuple):
    """What a model is for, what it tells apart, and how large it sees pictures."""

    task: str  # of handlers.tasks
    classes: list[str]
    image_size: int  # pixels a side


def write_whole(file: Path, text: str) -> None:
    """Write a text: whatever ends this, `file` holds all of it, or what it held before."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def calibration_file(folder: Path, variant: str, precision: Precision = "fp32") -> Path:
    """Where a folder of model_store has the calibration of a variant in a precision."""
    return folder / f"calibration-{named(variant, precision)}.json"


def graph_file(folder: Path, variant: str, precision: Precision = "fp32") -> Path:
    """Where a folder of model_store has a variant's exported graph, if it has it."""
    return folder / f"graph-{named(variant, precision)}.onnx"


def ranges_file(folder: Path, variant: str) -> Path:
    """Where a folder of model_store has the activation ranges of a variant's int8 form."""
    return folder / f"ranges-{variant}.json"


def named(variant: str, precision: Precision) -> str:
    """A variant in a precision, as file names have it."""
    return variant if precision == "fp32" else f"{variant}-{precision}"


def load_variant(folder: Path, variant: str, precision: Precision = "fp32") -> Calibration:
    """The calibration of one variant in a folder of model_store."""
    return Calibration.load(calibration_file(folder, variant, precision))


def read_config(weights: Path) -> dict[str, Any]:
    """The config in the head of a file of weights. Raises FileNotFoundError or ValueError."""
    check_file(weights, "checkpoint", "make one with `rampart train`")
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > weights.stat().st_size:
                raise ValueError("its head is cut off")
            metadata = json.loads(file.read(length)).get("__metadata__", {})
    except (struct.error, ValueError, AttributeError) as error:
        raise ValueError(f"{weights} is not a safetensors file: {error}") from error
    config: dict[str, Any] = json.loads(metadata.get("config", "{}"))
    if metadata.get("format", config.pop("format", None)) != FORMAT:
        raise ValueError(f"{weights} carries no Rampart config: only files of `rampart train` load")
    return config


def read_contents(weights: Path) -> Contents:
    """What the weights of a model folder are of. Raises FileNotFoundError or ValueError."""
    config = read_config(weights)
    if net := config.get("object_detector"):
        return Contents(config["task"], net["classes"], net["size"])
    if "classes" not in config:
        raise ValueError(f"{weights} holds no defended model: `rampart calibrate` makes one")
    return Contents("classify", config["classes"], config["classifier"]["image_size"])
