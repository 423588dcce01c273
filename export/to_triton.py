"""A model repository for Triton: the graph with its calibration inside, and its config.pbtxt. The
graph turns scores into the p-value, and the client flags where it is below a false-alarm rate.
Clients send decoded pixels: they must refuse and resize pictures as `handlers/image.py` does.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import compose
from torch import Tensor, nn

from rampart.export.archive import export_variant
from rampart.export.repository import check_free, place
from rampart.export.to_onnx import OUTPUTS, export
from rampart.handlers.engine import MAX_BATCH, Engine
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.files import Precision, load_variant, read_contents

CONFIG = """\
# Written by `rampart export --triton`.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {batch}
input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ {size}, {size}, 3 ] }} ]
output [
  {{ name: "logits" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }},
  {{ name: "raw_logits" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [ {detectors} ] }},
  {{ name: "purified" data_type: TYPE_UINT8 dims: [ {size}, {size}, 3 ] }},
  {{ name: "p_value" data_type: TYPE_FP64 dims: [ 1 ] }}
]
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
instance_group [ {{ count: 1 kind: KIND_AUTO }} ]
version_policy: {{ latest {{ num_versions: 2 }} }}
model_warmup [ {{
  name: "zeros"
  batch_size: 1
  inputs {{
    key: "image"
    value: {{ data_type: TYPE_UINT8 dims: [ {size}, {size}, 3 ] zero_data: true }}
  }}
}} ]
"""


class PValue(nn.Module):
    """`handlers.verdict.p_values` as a graph: scores (N, D) to float64 (N, 1)."""

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        knots = torch.from_numpy(calibration.knots)  # (D, Q)
        middle = knots.shape[1] // 2
        rise = calibration.surprise[-1] - calibration.surprise[middle]
        self.first = nn.Buffer(knots[:, :-1])
        self.width = nn.Buffer(knots.diff(dim=1))
        self.step = nn.Buffer(torch.from_numpy(np.diff(calibration.surprise)))
        self.last = nn.Buffer(knots[:, -1])
        self.slope = nn.Buffer(rise / (knots[:, -1] - knots[:, middle]).clamp_min(1e-6))
        self.ranked = nn.Buffer(torch.from_numpy(calibration.combined))

    def forward(self, scores: Tensor) -> Tensor:
        """The share of calibration images at least as suspicious."""
        score = scores.double()[:, :, None]  # (N, D, 1)
        # A piecewise linear function is the sum of its pieces; one without width is a jump.
        share = ((score - self.first) / self.width.clamp_min(1e-300)).clamp(0, 1)
        share = torch.where(self.width > 0, share, (score > self.first).double())
        beyond = (score[:, :, 0] - self.last).clamp_min(0) * self.slope
        suspicion = ((share * self.step).sum(2) + beyond).sum(1, keepdim=True)  # (N, 1)
        as_suspicious = (self.ranked >= suspicion).double().sum(1, keepdim=True)
        return (1 + as_suspicious) / (len(self.ranked) + 1)


def with_p_value(graph: Path, calibration: Calibration, out: Path) -> Path:
    """Write `graph` to `out` with an output `p_value` float64 (N, 1). RuntimeError if it is off."""
    with tempfile.TemporaryDirectory() as scratch:
        tail = Path(scratch) / "tail.onnx"
        example = torch.zeros(2, len(calibration.detectors))
        export(PValue(calibration), {"scores": example}, ("p_value",), tail)
        check_p_values(tail, calibration)
        model, end = onnx.load(graph), onnx.load(tail)
    end = compose.add_prefix(end, "rank_", rename_inputs=False, rename_outputs=False)
    end.ir_version = model.ir_version
    names = [*OUTPUTS, "p_value"]
    onnx.save(compose.merge_models(model, end, [("scores", "scores")], outputs=names), out)
    return out


def check_p_values(tail: Path, calibration: Calibration) -> None:
    """RuntimeError where a graph from `scores` to `p_value` is more than a rank off, anywhere."""
    knots = calibration.knots.T  # (Q, D)
    span = knots[-1] - knots[0]
    together = np.concatenate([knots, (knots[1:] + knots[:-1]) / 2, knots - span, knots + span])
    alone = [np.where(one, together, knots[0]) for one in np.eye(knots.shape[1], dtype=bool)]
    scores = np.concatenate([together, *alone]).astype(np.float32)
    session = ort.InferenceSession(tail, providers=["CPUExecutionProvider"])
    (p,) = session.run(["p_value"], {"scores": scores})
    gap = float(np.abs(p[:, 0] - p_values(scores, calibration)).max())
    # Sums may differ in the last digit, and so by the rank of an image with the same score.
    if not gap <= 1.5 / (calibration.images + 1):
        raise RuntimeError(f"the graph's p-values are off by up to {gap:.2g}: report this")


def to_triton(
    folder: Path,
    repository: Path,
    *,
    variant: pipelines.Variant,
    precision: Precision = "fp32",
    version: int = 1,
    images: Tensor | None = None,
) -> Path:
    """Write a variant as a new `version` in a Triton `repository`; returns the model's folder."""
    home = repository / folder.name
    check_free(home, version)
    labels = read_contents(folder / "weights.safetensors").classes
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        graph = work / "graph.onnx"
        export_variant(folder, variant, graph, precision=precision, images=images)
        calibration = load_variant(folder, variant, precision)
        content = work / "content"
        content.mkdir()
        with_p_value(graph, calibration, content / "model.onnx")
        facts = {"name": folder.name, "batch": MAX_BATCH, "size": Engine(graph).image_shape[0]}
        facts |= {"classes": len(labels), "detectors": len(calibration.detectors)}
        texts = {"labels.txt": "\n".join(labels) + "\n", "config.pbtxt": CONFIG.format(**facts)}
        place(home, version, texts, content)
    return home
