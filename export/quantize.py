"""The exported graph with its network in int8: a third of the size, and less time.

Static quantization (ONNX Runtime's, Q/DQ): weights by channel, activations by tensor, ranges from
tuning images. Weights have 7 bits, so that CPUs without 8-bit dot products (AVX-512 VNNI and its
like) can sum their products in 16 bits. Purifier, heads and detectors stay in float32, since
thresholds are about small differences.
"""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.numpy_helper import from_array, to_array
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from rampart.handlers.engine import SAFE_BITS, WEIGHT_BITS

# The largest 1 in 100,000 activations are clipped: with them in, a step is too coarse for the rest.
PERCENTILE = 99.999
BATCH = 32
# How the exporter begins the names of the weights, of a classifier and of an object detector. Heads
# stay in float32: they cost little, and the steps of 8-bit logits would show in the scores.
OWN, HEAD = ("classifier.", "detector.net.backbone."), "classifier.head."
LAYERS = ("Conv", "Gemm", "MatMul")
MASK = ("Cast", "QuantizeLinear", "DequantizeLinear", "Mul")  # what follows where a ReLU passed
BETWEEN = ("Add", "Concat", "DepthToSpace", "MaxPool", "Relu")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Images uint8 (N, H, W, 3) in the batches that ONNX Runtime asks for."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        size = min(BATCH, len(images))
        starts = range(0, len(images) - size + 1, size)  # all alike, or ONNX Runtime stops
        self.batches: Iterator[NDArray[np.uint8]] = (images[i : i + size] for i in starts)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next batch as the graph's input, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch}


def quantize(graph: Path, ranges: Path, out: Path, images: NDArray[np.uint8] | None = None) -> Path:
    """Write `graph` with its network in int8; its `ranges` are measured on `images`, else read."""
    nodes = onnx.load(graph).graph
    inside = network_nodes(nodes)
    kinds = {node.op_type for node in nodes.node if node.name in inside}
    if images is not None:
        ranges.unlink(missing_ok=True)
    elif not ranges.is_file():
        raise FileNotFoundError(f"no {ranges}: `rampart quantize` makes it")
    bits = SAFE_BITS if images is not None else bits_of(ranges)
    with quiet():
        quantize_static(
            graph,
            out,
            Reader(images) if images is not None else None,
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=inside,
            # Ranges of nothing else are looked for: a mask of large numbers has none.
            op_types_to_quantize=sorted(kinds),
            per_channel=True,
            reduce_range=bits == SAFE_BITS,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE},
            calibration_cache_path=ranges,
        )
    if images is not None:
        note = json.loads(ranges.read_text()) | {WEIGHT_BITS: SAFE_BITS}
        ranges.write_text(json.dumps(note))
    model = onnx.load(out)
    clip_masks(model.graph)
    if bits == SAFE_BITS:  # for Engine to see
        model.metadata_props.add(key=WEIGHT_BITS, value=str(SAFE_BITS))
    onnx.save(model, out)
    return out


def bits_of(ranges: Path) -> int:
    """The bits of weights that these ranges were measured for; files of before say none: 8."""
    return int(json.loads(ranges.read_text()).get(WEIGHT_BITS, 8))


def network_nodes(graph: onnx.GraphProto) -> list[str]:
    """Names of the network's layers in `graph`, and of what lies between them and its head."""
    own = {value.name for value in graph.initializer if value.name.startswith(OWN)}
    layers = {n.name for n in graph.node if n.op_type in LAYERS and own & {*n.input}}
    heads = {n.name for n in graph.node if any(name.startswith(HEAD) for name in n.input)}
    if not layers - heads:
        named = " or ".join(f"{name}*" for name in OWN)
        raise ValueError(f"the graph has no layer whose weights are named {named}: export it again")
    after: set[str] = set()  # values that a layer leads to
    for node in graph.node:  # in topological order, as ONNX demands
        if node.name in layers or after & {*node.input}:
            after.update(node.output)
    before: set[str] = set()  # values that lead to a layer
    for node in reversed(graph.node):
        if node.name in layers or before & {*node.output}:
            before.update(node.input)
    between = {n.name for n in graph.node if after & {*n.input} and before & {*n.output}}
    kinds = {n.name for n in graph.node if n.op_type in BETWEEN}
    inside = (kinds | silus(graph) | masked(graph)) & between
    return [n.name for n in graph.node if n.name in (layers - heads) | inside]


def silus(graph: onnx.GraphProto) -> set[str]:
    """Names of what the exporter makes of SiLU: a sigmoid, and its product with what it is of."""
    gates = {node.output[0]: node for node in graph.node if node.op_type == "Sigmoid"}
    found: set[str] = set()
    for node in graph.node:
        for gate in (gates[name] for name in node.input if name in gates):
            if node.op_type == "Mul" and gate.input[0] in node.input:
                found |= {node.name, gate.name}
    return found


def masked(graph: onnx.GraphProto) -> set[str]:
    """Names of the products that pass a slope where a ReLU did; other products stay in float32."""
    made = {node.output[0]: node for node in graph.node}
    bounds, found = zeros(graph), set[str]()
    for node in graph.node:
        source = made.get(node.input[0]) if node.op_type == "Greater" else None
        if source is not None and source.op_type == "Relu" and node.input[1] in bounds:
            found |= {product.name for product in chain(graph, node, "Cast", "Mul")[2:]}
    return found


def zeros(graph: onnx.GraphProto) -> dict[str, np.dtype[Any]]:
    """The names of constants that are 0, and their types."""
    values = {value.name: to_array(value) for value in graph.initializer}
    return {name: value.dtype for name, value in values.items() if not value.any()}


def chain(graph: onnx.GraphProto, node: onnx.NodeProto, *kinds: str) -> list[onnx.NodeProto]:
    """`node` and those after it; empty where they are of other kinds, or others read between."""
    nodes = [node]
    for kind in kinds:
        (value,) = nodes[-1].output
        after = [other for other in graph.node for name in other.input if name == value]
        if [other.op_type for other in after] != [kind]:
            return []
        nodes += after
    return nodes


def clip_masks(graph: onnx.GraphProto) -> None:
    """Make masks of ReLUs from their 8-bit values, where 0 stands for 0: those, clipped to 1."""
    bounds = zeros(graph)
    made = {node.output[0]: node for node in graph.node}
    gone = []
    for node in graph.node:
        source = made.get(node.input[0]) if node.op_type == "Greater" else None
        if source is None or source.op_type != "DequantizeLinear" or node.input[1] not in bounds:
            continue
        nodes = chain(graph, node, *MASK) if bounds.get(source.input[2]) == np.uint8 else []
        if not nodes:
            continue
        _, cast, mask, passed, _ = nodes
        node.op_type = "Clip"
        node.input[:] = [source.input[0], "mask_zero", "mask_one"]
        node.output[:] = mask.output
        passed.input[1:] = ["mask_scale", "mask_zero"]
        gone += [cast, mask]
    for node in gone:
        graph.node.remove(node)
    if gone:
        values = {"mask_zero": np.uint8(0), "mask_one": np.uint8(1), "mask_scale": np.float32(1)}
        used = {name for node in graph.node for name in node.input}
        kept = [value for value in graph.initializer if value.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(from_array(np.array(v), k) for k, v in values.items())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what ONNX Runtime prints on the way; its errors are raised."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
