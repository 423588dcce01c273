"""What a finished file is, and whether this machine can run it.

rampart inspect model_store/NAME.mar
"""

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import yaml

from export.archive import sha256
from export.recalibrate import unpack
from handlers.engine import Engine
from handlers.plan import record_file
from hardening.report import markdown, read_card

KINDS = (".mar", ".onnx", ".plan")
FREQUENT = 6  # kinds of nodes named


def inspect(file: Path) -> Iterator[str]:
    """Lines for people on an archive or a graph. Raises ValueError for anything else."""
    if file.suffix not in KINDS:
        raise ValueError(f"{file}: neither an archive (.mar), a graph (.onnx) nor a plan (.plan)")
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}")
    yield f"{file}: {file.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(file)}"
    if file.suffix == ".onnx":
        yield from graph_lines(file)
        return
    if file.suffix == ".plan":
        yield from plan_lines(file)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        names = unpack(file, work)
        listed = json.loads((work / "sha256.json").read_text())
        free = ", ".join(sorted(name for name in names if name not in listed))
        yield f"{len(listed)} files have the hashes that sha256.json lists; not listed: {free}"
        yield from card_lines(read_card(work), work)
        yield from graph_lines(work / "graph.onnx")


def plan_lines(file: Path) -> Iterator[str]:
    """What the record beside a plan says of it. A plan is code, so it is not loaded."""
    try:
        record = json.loads(record_file(file).read_text(encoding="utf-8"))
        same = record["sha256"] == sha256(file)
        facts = [f"TensorRT {record['tensorrt']}", f"graph SHA-256 {record['graph_sha256']}"]
        facts.append(f"gate: {record['parity']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} has no readable record {record_file(file).name}: `rampart export --tensorrt`"
        ) from error
    yield from facts
    yield f"its record {'has its hash' if same else 'is that of another file: do not load it'}"
    here = importlib.util.find_spec("tensorrt") is not None
    yield f"TensorRT is {'installed' if here else 'not installed'} here; inputs are its graph's"


def card_lines(card: dict[str, Any], work: Path) -> Iterator[str]:
    """Name, policy and figures of an unpacked archive."""
    try:
        settings = yaml.safe_load((work / "model-config.yaml").read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"model-config.yaml is not YAML: {error}") from error
    facts = {
        "model": f"{card.get('name')}, {card.get('variant')}, {card.get('precision', 'fp32')}",
        "trained on": card.get("data", "not said"),
        "threat model": card.get("threat_model", "not evaluated"),
        "calibration": f"{card.get('calibration_images', '?')} images",
        "policy": ", ".join(f"{k} {v}" for k, v in (settings.get("rampart") or {}).items()),
        "weights": f"SHA-256 {card.get('sha256', {}).get('weights.safetensors', 'not said')}",
    }
    yield from (f"{name}: {fact}" for name, fact in facts.items())
    if card.get("metrics") and "threat_model" in card:
        yield f"\n{markdown(card)}\n"


def graph_lines(file: Path) -> Iterator[str]:
    """Inputs, outputs and nodes of a graph, and what this machine makes of it."""
    try:
        model = onnx.load(file)
    except Exception as error:  # protobuf's errors have no common type
        raise ValueError(f"{file} is no ONNX graph: {error}") from error
    if not model.opset_import:
        raise ValueError(f"{file} is no ONNX graph: it is empty")
    for title, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            kind = value.type.tensor_type
            shape = [d.dim_param or d.dim_value for d in kind.shape.dim]
            name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
            yield f"{title} {value.name}: {name} {tuple(shape)}"
    kinds = Counter(node.op_type for node in model.graph.node)
    common = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(FREQUENT))
    opset = model.opset_import[0].version
    yield f"{len(model.graph.node)} nodes, opset {opset}: {common} ..."
    yield f"ONNX Runtime {ort.__version__} here has {', '.join(ort.get_available_providers())}"
    try:
        Engine(file)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        yield f"it does not run as a Rampart graph: {error}"
    else:
        yield "it runs here, on the CPU"
