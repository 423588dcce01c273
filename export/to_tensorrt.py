"""A TensorRT plan of an exported graph, held to the parity gate on the GPU that it was built for.

    rampart export model_store/NAME --tensorrt NAME.plan

Works with TensorRT 10 and 11: precision lies in the graph (strongly typed), so neither the flags
nor the calibrators that 11 has lost are needed. A plan belongs to one GPU, one TensorRT and one
graph, and is code: beside it lies NAME.plan.json with its hash and what the gate measured, and
without that the handler refuses it. int8 is for CPUs: TensorRT takes symmetric zero points alone.
"""

import hashlib
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor

from rampart.export.archive import export_variant
from rampart.export.build import sample_crops
from rampart.export.parity import check_close, compare
from rampart.handlers.engine import Engine
from rampart.handlers.plan import PlanEngine, record_file
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.calibrate import Precision, load_variant

INSTALL = (
    "TensorRT is not installed, and a plan can be built only on the machine that will run it: with"
    " an NVIDIA GPU and its driver, `pip install --extra-index-url https://pypi.nvidia.com"
    " 'tensorrt-cu13>=10.16'`"
)
# Operators of the default ONNX domain that TensorRT's parser takes, of those that our graphs may
# use. Source: NVIDIA's support matrix, onnx-tensorrt docs/operators.md.
# fmt: off
SUPPORTED = frozenset((
    "Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Constant", "Conv", "DepthToSpace",
    "DequantizeLinear", "Div", "Exp", "Expand", "Flatten", "Gather", "Gemm", "GlobalAveragePool",
    "Greater", "GreaterOrEqual", "HardSigmoid", "Identity", "Less", "Log", "LRN", "MatMul", "Max",
    "MaxPool", "Min", "Mul", "Neg", "Pad", "Pow", "QuantizeLinear", "Range", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Round", "Shape",
    "Sigmoid", "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
    "Where",
))
# fmt: on


class Profile(NamedTuple):
    """The batch that a plan is tuned for, and the largest that it takes; the least is 1."""

    best: int
    most: int

    def shapes(self, size: int) -> list[tuple[int, int, int, int]]:
        """The three shapes of `image`. Raises ValueError where the sizes are out of order."""
        if not 1 <= self.best <= self.most:
            raise ValueError(f"batch sizes {tuple(self)}: they must be at least 1 and in order")
        return [(batch, size, size, 3) for batch in (1, *self)]


PROFILE = Profile(best=8, most=32)


def trtexec_line(graph: Path, plan: Path, size: int, profile: Profile) -> str:
    """What does the same with NVIDIA's own tool, for a machine that has it."""
    names = ("minShapes", "optShapes", "maxShapes")
    shapes = zip(names, profile.shapes(size), strict=True)
    spelled = [f"--{name}=image:{'x'.join(map(str, shape))}" for name, shape in shapes]
    options = ["--stronglyTyped", "--noTF32", *spelled, f"--saveEngine={plan}"]
    return " ".join(["trtexec", f"--onnx={graph}", *options])


def cache_key(graph: Path, *, gpu: str, tensorrt: str, profile: Profile) -> str:
    """Names a timing cache: what was timed elsewhere or on another graph must not be reused."""
    known = [gpu, tensorrt, str(tuple(profile)), hashlib.sha256(graph.read_bytes()).hexdigest()]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


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


def build(
    graph: Path, plan: Path, timings: Path, *, profile: Profile, workspace: int = 2 << 30
) -> str:
    """Write the plan of `graph`; returns the version of TensorRT that it needs.

    What was timed is kept in the folder `timings`, for the next build of the same.
    Raises RuntimeError with the parser's own words, or with what to install.
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
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it would fail the parity gate
    shapes = builder.create_optimization_profile()
    size = network.get_input(0).shape[1]
    shapes.set_shape("image", *profile.shapes(size))
    config.add_optimization_profile(shapes)
    known = timings / timing_name(graph, trt.__version__, profile)
    cache = config.create_timing_cache(known.read_bytes() if known.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RuntimeError(f"TensorRT built no plan of {graph.name}: its log above says why")
    plan.write_bytes(bytes(made))
    known.write_bytes(bytes(config.get_timing_cache().serialize()))
    return str(trt.__version__)


def timing_name(graph: Path, version: str, profile: Profile) -> str:
    """The file of tactics that were timed for this very build."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    key = cache_key(graph, gpu=gpu, tensorrt=version, profile=profile)
    return f"timing-{key}.cache"


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
    profile: Profile = PROFILE,
    images: Tensor | None = None,
    rate: float = 0.01,
) -> str:
    """Build the plan of a model folder's variant and hold it to the parity gate, batch 1, 2 and 32.

    In fp16 it is held to the labels of its own graph on the CPU. Writes NAME.plan and
    NAME.plan.json, or neither, and returns what the gate saw. Raises RuntimeError where TensorRT is
    missing, cannot take the graph, or decides differently.
    """
    with tempfile.TemporaryDirectory(dir=plan.parent) as scratch:
        work = Path(scratch)
        graph, made = work / "graph.onnx", work / plan.name
        export_variant(folder, variant, graph, precision=precision, images=images, rate=rate)
        if wrong := unsupported(graph):
            raise RuntimeError(f"TensorRT cannot take this graph: {wrong}")
        pipeline, _ = pipelines.load(folder / "weights.safetensors", variant)
        if images is None:
            images = sample_crops(pipeline.classifier.config.image_size)
        try:
            version = build(graph, made, plan.parent, profile=profile)
        except RuntimeError as error:
            exported = plan.with_suffix(".onnx")
            line = trtexec_line(exported, plan, images.shape[1], profile)
            raise RuntimeError(
                f"{error}. With NVIDIA's own tool, on what `rampart export --out {exported}`"
                f" writes: {line}"
            ) from error
        write_record(made, graph, version=version, parity="running")
        engine = PlanEngine(made, graph)
        table = load_variant(folder, variant, precision)
        if precision == "fp32":
            parity = str(compare(pipeline, engine, table, images, rate=rate))
        else:
            close = check_close((Engine(graph), table), (engine, table), images)
            parity = f"the plan {close}"
        record = write_record(made, graph, version=version, parity=parity)
        record.replace(record_file(plan))
        made.replace(plan)
    return parity


def write_record(plan: Path, graph: Path, *, version: str, parity: str) -> Path:
    """What the handler asks for: hashes, the version that built it, and the gate's figures."""
    known = {
        "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
        "graph_sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "tensorrt": version,
        "parity": parity,
    }
    file = record_file(plan)
    file.write_text(json.dumps(known, indent=1) + "\n")
    return file
