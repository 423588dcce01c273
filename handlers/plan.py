"""Run a TensorRT plan: one context a worker, tensors on the GPU from input to output.

A plan is executable code, and belongs to one graph: it is loaded only if the record beside it holds
its hash, the hash of the graph in the same archive, and the figures of the parity gate.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.engine import (
    OUTPUTS,
    EngineError,
    Outputs,
    check_images,
    run_in_pieces,
    sha256,
)


def record_file(plan: Path) -> Path:
    """The path of a plan's record."""
    return plan.with_name(f"{plan.name}.json")


def check_record(plan: Path, graph: Path) -> dict[str, Any]:
    """The record of `plan`. Raises EngineError where it is missing or of other files."""
    file = record_file(plan)
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{plan.name} has no readable {file.name}: build it with `rampart export --tensorrt`"
        ) from error
    for name, path in (("sha256", plan), ("graph_sha256", graph)):
        if record.get(name) != sha256(path):
            raise EngineError(
                f"{path.name} is not the file that {file.name} describes: build the plan anew"
            )
    if not record.get("parity"):
        raise EngineError(f"{file.name} records no parity run: build the plan anew")
    return record


class PlanEngine:
    """A loaded plan with the interface of `handlers.engine.Engine`. Raises EngineError."""

    device = "tensorrt"

    def __init__(self, plan: Path, graph: Path, *, device_id: int = 0) -> None:
        record = check_record(plan, graph)
        try:
            self._load(plan, record, device_id)
        except EngineError:
            raise
        except Exception as error:  # no package, driver or memory: they have no common type
            raise EngineError(f"{plan.name} does not run here: {error}") from error

    def _load(self, plan: Path, record: dict[str, Any], device_id: int) -> None:
        trt, torch = (importlib.import_module(name) for name in ("tensorrt", "torch"))
        if trt.__version__ != record.get("tensorrt"):
            raise EngineError(
                f"{plan.name} was built by TensorRT {record.get('tensorrt')} and this is"
                f" {trt.__version__}: build it anew here"
            )
        self._torch, self._gpu = torch, torch.device("cuda", device_id)
        torch.cuda.set_device(self._gpu)  # where TensorRT puts the plan
        self._stream = torch.cuda.Stream(self._gpu)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(f"{plan.name} does not load on this GPU: build it anew here")
        self._context = self._engine.create_execution_context()
        _, _, largest = self._engine.get_tensor_profile_shape("image", 0)
        self._max_batch, height, width, channels = map(int, largest)
        self.image_shape = height, width, channels
        for batch in (1, self._max_batch):
            self.run(np.zeros((batch, *self.image_shape), dtype=np.uint8))

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run uint8 (N, H, W, 3), in pieces that the plan's profile takes."""
        check_images(images, self.image_shape)
        return run_in_pieces(self._piece, images, self._max_batch, Outputs)

    def _piece(self, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        torch = self._torch
        with torch.cuda.stream(self._stream):
            image = torch.from_numpy(np.ascontiguousarray(images)).to(self._gpu)
            if not self._context.set_input_shape("image", tuple(image.shape)):
                raise EngineError(f"the plan takes no batch of {len(images)}")
            self._context.set_tensor_address("image", image.data_ptr())
            outputs = []
            for name in OUTPUTS:
                kind = torch.uint8 if name == "purified" else torch.float32
                shape = tuple(self._context.get_tensor_shape(name))
                outputs.append(torch.empty(shape, dtype=kind, device=self._gpu))
                self._context.set_tensor_address(name, outputs[-1].data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError("TensorRT failed to run the plan: its log says why")
            arrays = [output.cpu().numpy() for output in outputs]
        self._stream.synchronize()
        return arrays
