"""A TensorRT plan of an exported graph, held to the parity gate on the GPU that it was built for.

Works with TensorRT 10 and 11. A plan belongs to one GPU, one TensorRT and one graph, and is code:
the handler refuses it without NAME.plan.json, which holds its hash and the figures of the gate.
int8 is for CPUs: TensorRT takes symmetric zero points only.
"""

import hashlib
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from rampart.export.archive import export_variant
from rampart.export.build import sample_crops
from rampart.export.parity import check_close, compare
from rampart.handlers.engine import Engine, sha256
from rampart.handlers.plan import PlanEngine, record_file
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.files import Precision, load_variant
from rampart.hardening.model.promise import finest_rate

INSTALL = (
    "TensorRT is not installed, and a plan can be built only on the machine that will run it: with"
    " an NVIDIA GPU and its driver, `pip install --extra-index-url https://pypi.nvidia.com"
    " 'tensorrt-cu13>=10.16'`"
)
# Operators of the default ONNX domain that our graphs may use and TensorRT's parser takes.
# Source: NVIDIA's support matrix, onnx-tensorrt docs/operators.md.
# fmt: off
SUPPORTED = frozenset((
    "Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Constant", "Conv", "DepthToSpace",
    "DequantizeLinear", "Div", "Exp", "Expand", "Flatten", "Gather", "GatherElements", "Gemm",
    "GlobalAveragePool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "Less", "Log", "LRN", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Pow",
    "QuantizeLinear", "Range", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "Relu", "Reshape", "Resize", "Round", "Shape", "Sigmoid", "Slice", "Softmax",
    "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
))
# fmt: on


BATCHES = (1, 8, 32)  # the smallest, the one that a plan is tuned for, the largest
WORKSPACE = 2 << 30  # bytes


def shapes(size: int) -> list[tuple[int, int, int, int]]:
    """The smallest, best and largest shape of `image`."""
    return [(batch, size, size, 3) for batch in BATCHES]


def trtexec_line(graph: Path, plan: Path, size: int) -> str:
    """The command that does the same with NVIDIA's own tool."""
    names = ("minShapes", "optShapes", "maxShapes")
    pairs = zip(names, shapes(size), strict=True)
    options = [f"--{name}=image:{'x'.join(map(str, shape))}" for name, shape in pairs]
    fixed = ["trtexec", f"--onnx={graph}", "--stronglyTyped", "--noTF32"]
    return " ".join([*fixed, *options, f"--saveEngine={plan}"])


def advice(plan: Path, size: int) -> str:
    """What to try where TensorRT's Python package builds no plan."""
    graph = plan.with_suffix(".onnx")
    line = trtexec_line(graph, plan, size)
    return f"With NVIDIA's own tool, on what `rampart export --out {graph}` writes: {line}"


def timing_name(graph: Path, *, gpu: str, tensorrt: str) -> str:
    """The file of tactics that were timed for this very build; no other build may use them."""
    facts = [gpu, tensorrt, str(BATCHES), sha256(graph)]
    return f"timing-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.cache"


def unsupported(graph: Path) -> dict[str, list[str]]:
    """Nodes that TensorRT cannot take, by what is the matter with them."""
    model = onnx.load(graph)
    out: dict[str, list[str]] = {}
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    small = {name for name, kind in kinds.items() if kind == onnx.TensorProto.UINT8}
    shown = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
            out.setdefault(f"{node.op_type} is not in the support matrix", []).append(node.name)
        if small & {*node.input} and node.op_type != "Cast":
            out.setdefault("8-bit input that is not cast at once", []).append(node.name)
        if node.op_type == "Cast" and not shown & {*node.output}:
            to = next(a.i for a in node.attribute if a.name == "to")
            if to == onnx.TensorProto.UINT8:
                out.setdefault("8-bit values inside the graph", []).append(node.name)
    return out


def build(graph: Path, plan: Path, timings: Path) -> str:
    """Write the plan of `graph`; returns the version of TensorRT that it needs. The folder
    `timings` speeds up the next build. Raises RuntimeError with the parser's words, or what to
    install.
    """
    trt = tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 0  # 11 knows strongly typed networks only
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise RuntimeError(f"TensorRT cannot read {graph.name}: {'; '.join(errors)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it would fail the parity gate
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *shapes(network.get_input(0).shape[1]))
    config.add_optimization_profile(profile)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    timing = timings / timing_name(graph, gpu=gpu, tensorrt=trt.__version__)
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"TensorRT built no plan of {graph.name}: its log above says why")
    plan.write_bytes(bytes(engine))
    timing.write_bytes(bytes(config.get_timing_cache().serialize()))
    return str(trt.__version__)


def tensorrt() -> Any:
    """The package. Raises RuntimeError that says what to install."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise RuntimeError(INSTALL) from error


def to_tensorrt(
    folder: Path,
    plan: Path,
    *,
    variant: pipelines.Variant,
    precision: Precision = "fp32",
    images: Tensor | None = None,
    rate: float | None = None,
) -> str:
    """Build the plan of a model folder's variant and hold it to the parity gate, batch 1, 2 and 32.
    Writes NAME.plan and NAME.plan.json, and returns the gate's figures. Raises RuntimeError, and
    writes nothing, where TensorRT is missing, cannot take the graph, or decides differently.
    """
    table = load_variant(folder, variant, precision)
    rate = finest_rate(table.images) if rate is None else rate
    plan.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.parent) as scratch:
        work = Path(scratch)
        graph, draft = work / "graph.onnx", work / plan.name
        export_variant(folder, variant, graph, precision=precision, images=images, rate=rate)
        if wrong := unsupported(graph):
            raise RuntimeError(f"TensorRT cannot take this graph: {wrong}")
        pipeline, _ = pipelines.load(folder / "weights.safetensors", variant)
        if images is None:
            images = sample_crops(pipeline.classifier.config.image_size)
        try:
            version = build(graph, draft, plan.parent)
        except RuntimeError as error:
            raise RuntimeError(f"{error}. {advice(plan, images.shape[1])}") from error
        write_record(draft, graph, version=version, parity="running")
        engine = PlanEngine(draft, graph)
        if precision == "fp32":
            parity = str(compare(pipeline, engine, table, images, rate=rate))
        else:
            close = check_close((Engine(graph), table), (engine, table), images)
            parity = f"the plan {close}"
        record = write_record(draft, graph, version=version, parity=parity)
        record.replace(record_file(plan))
        draft.replace(plan)
    return parity


def write_record(plan: Path, graph: Path, *, version: str, parity: str) -> Path:
    """Write what the handler asks for: hashes, TensorRT's version, and the gate's figures."""
    entries = {"sha256": sha256(plan), "graph_sha256": sha256(graph)}
    entries |= {"tensorrt": version, "parity": parity}
    file = record_file(plan)
    file.write_text(json.dumps(entries, indent=1) + "\n")
    return file
