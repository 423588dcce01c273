"""The pipeline as one ONNX file: uint8 images in; logits, scores and purified images out."""

import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

from rampart.export.gradients import unrolled
from rampart.hardening.model.detectors import PROBED
from rampart.hardening.model.pipeline import DefendedClassifier

OUTPUTS = ("logits", "raw_logits", "scores", "purified")


def to_onnx(pipeline: DefendedClassifier, path: Path) -> Path:
    """Write `pipeline` for any batch of uint8 (N, H, W, 3); RuntimeError if the batch is fixed."""
    size = pipeline.classifier.config.image_size
    # A batch of 2 and not 1: the exporter specializes on sizes of 0 and 1.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    module = unrolled(pipeline, example) if PROBED in pipeline.detectors.needs else pipeline
    export(module, {"image": example}, OUTPUTS, path)
    cast_first(path)
    return path


def export(
    module: nn.Module, example: dict[str, torch.Tensor], outputs: tuple[str, ...], path: Path
) -> Path:
    """Write any module of one input, named in `example`, whose first dimension is the batch."""
    (name,) = example
    with warnings.catch_warnings():
        # The exporter's own notices about its internals; nothing a user could act on.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            external_data=False,
            input_names=[name],
            output_names=list(outputs),
            verbose=False,
        )
    check_batch_is_dynamic(path)
    forget_sources(path)
    return path


def forget_sources(path: Path) -> None:
    """Take out where in whose files each node came from: the hash must be that of the graph."""
    model = onnx.load(path)
    for item in (model, model.graph, *model.graph.node, *model.graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    onnx.save(model, path)


def cast_first(path: Path) -> None:
    """Read the batch size off the cast input: TensorRT refuses to read it off 8 bits."""
    model = onnx.load(path)
    nodes = list(model.graph.node)
    cast = next(node for node in nodes if node.op_type == "Cast" and "image" in node.input)
    nodes.remove(cast)
    for node in nodes:
        node.input[:] = [cast.output[0] if name == "image" else name for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend([cast, *nodes])
    onnx.checker.check_model(model)
    onnx.save(model, path)


def check_batch_is_dynamic(path: Path) -> None:
    """Raise RuntimeError where an input or output of the graph has a fixed batch size."""
    graph = onnx.load(path).graph
    for value in [*graph.input, *graph.output]:
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise RuntimeError(
                f"{path}: {value.name} has a fixed batch of {first.dim_value}; look for chunk or"
                " reshape with a constant batch in the pipeline"
            )
