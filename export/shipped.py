"""Graphs that a model folder holds ready, each with a record of hashes and of its gate."""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import rampart
from rampart.handlers.engine import sha256
from rampart.hardening.model.card import read_card
from rampart.hardening.model.files import (
    Precision,
    calibration_file,
    graph_file,
    ranges_file,
    read_contents,
    write_whole,
)

BATCHES = (1, 2, 32)  # at which the parity gate compares
PACKAGE = Path(rampart.__file__).parent
# The code that defines a graph, by task.
OBJECTS = (
    "boxes", "defended", "detector", "own", "single_stage", "step", "suspicions", "two_stage",
)  # fmt: skip
CLASSIFIERS = (
    "hardening/model/classifier.py",
    "hardening/model/wrapping.py",
    "hardening/model/pixels.py",
    "hardening/model/purifier.py",
    "hardening/model/detectors.py",
    "hardening/model/pipeline.py",
    "export/gradients.py",
    "export/to_onnx.py",
    "export/quantize.py",
    "export/halve.py",
)
CODE = {
    "classify": CLASSIFIERS,
    "detect": (
        *(f"hardening/objects/{name}.py" for name in OBJECTS),
        "export/scenes.py",
        *CLASSIFIERS,
    ),
}


class Parity(NamedTuple):
    """Largest differences between torch and the graph, and how many images were compared."""

    images: int
    logits: float  # also those before the purifier
    scores: float
    pixels: int  # levels
    labels_differ: int
    decisions_differ: int

    def __str__(self) -> str:
        return (
            f"parity on {self.images} images at batch {', '.join(map(str, BATCHES))}:"
            f" logits differ by at most {self.logits:.2g}, scores by {self.scores:.2g},"
            f" purified pixels by {self.pixels};"
            f" labels differ on {self.labels_differ}, decisions on {self.decisions_differ}"
        )


class SceneParity(NamedTuple):
    """How far torch and an object detector's graph are apart, and on how many pictures."""

    images: int
    boxes: int
    iou: float  # the smallest, of boxes that match
    confidence: float  # the largest difference, of boxes that match
    scores: float  # largest difference of combined ones, as a share of their size
    unmatched: int
    decisions_differ: int

    def __str__(self) -> str:
        return (
            f"parity on {self.images} pictures at batch {', '.join(map(str, BATCHES))}:"
            f" {self.boxes} boxes have an IoU of {self.iou:.4f} or more, confidences differ by at"
            f" most {self.confidence:.2g}, combined scores by {self.scores:.2g} of their size;"
            f" {self.unmatched} boxes have no like, decisions differ on {self.decisions_differ}"
        )


AnyParity = Parity | SceneParity


class Graph(NamedTuple):
    """A graph that a model folder holds, and the figures of its gate."""

    file: Path
    parity: AnyParity


def find(folder: Path, variant: str, precision: Precision = "fp32") -> Graph | None:
    """The graph of a variant in a model folder; None if stale, ValueError if damaged."""
    file = graph_file(folder, variant, precision)
    if not file.is_file() or not record_file(file).is_file():
        return None
    record = json.loads(record_file(file).read_text())
    if record["made_of"] != ingredients(folder, variant, precision):
        return None
    if record["sha256"] != sha256(file):
        raise ValueError(f"{file} is damaged: fetch it again, or `rampart export --ship` makes it")
    kinds = {frozenset(kind._fields): kind for kind in (Parity, SceneParity)}
    return Graph(file, kinds[frozenset(record["parity"])](**record["parity"]))


def record(
    folder: Path,
    variant: str,
    precision: Precision,
    parity: AnyParity,
    tools: dict[str, str],
) -> Path:
    """Write the record of a graph in a model folder; `tools` are their versions."""
    file = graph_file(folder, variant, precision)
    entries = {"sha256": sha256(file), "made_of": ingredients(folder, variant, precision)}
    entries |= {"made_by": tools, "parity": parity._asdict()}
    write_whole(record_file(file), json.dumps(entries, indent=1) + "\n")
    return file


def record_file(graph: Path) -> Path:
    """The path of the record of a model folder's graph."""
    return graph.with_suffix(".json")


def ingredients(folder: Path, variant: str, precision: Precision) -> dict[str, str]:
    """Digests of the files and the code that a graph, and the decision of its gate, rest on."""
    task = read_contents(folder / "weights.safetensors").task
    return parts(folder, variant, precision) | {"code": code(task)}


def parts(folder: Path, variant: str, precision: Precision) -> dict[str, str]:
    """Digests, by name, of those files of a variant in a precision that exist."""
    files = [folder / "weights.safetensors", calibration_file(folder, variant, precision)]
    if precision == "int8":
        files.append(ranges_file(folder, variant))
    return {file.name: sha256(file) for file in files if file.is_file()}


def check_made(folder: Path, variant: str, precision: Precision) -> None:
    """Raise ValueError where a form in lower precision is missing, or made of other files."""
    if precision == "fp32":
        return
    digests = read_card(folder).get(precision, {}).get(variant, {}).get("sha256")
    if digests != parts(folder, variant, precision):
        missing = "was made of other files than these" if digests else "was not made"
        form = f"the {precision} form of {folder.name} {variant}"
        raise ValueError(f"{form} {missing}: `rampart quantize --precision {precision}`")


def code(task: str) -> str:
    """Digest of the code that exports for a task, without its comments."""
    total = hashlib.sha256()
    for name in CODE[task]:
        total.update("\n".join(bare((PACKAGE / name).read_text(encoding="utf-8"))).encode())
    return total.hexdigest()


def bare(source: str) -> Iterator[str]:
    """The lines of Python that compute: no imports, no docstrings, no comments."""
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
                silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(source.splitlines(), start=1):
        if number not in silent and line.strip() and not line.lstrip().startswith("#"):
            yield line.rstrip()
