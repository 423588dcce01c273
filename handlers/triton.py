"""The model of Triton's Python backend: translates requests and replies between it and service.py.

`rampart export --triton FOLDER --backend python` puts it beside the files of an archive.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rampart.handlers.errors import ImageError
from rampart.handlers.image import check_size
from rampart.handlers.protocols.content_encoding import MAX_BODY
from rampart.handlers.protocols.open_inference import Output
from rampart.handlers.service import Service
from rampart.handlers.settings import override
from rampart.handlers.telemetry import COUNTERS, Key, Metrics
from rampart.handlers.types import Answer, Images

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[2]  # of one version in the repository
ENCODED, DECODED = "image", "pixels"  # inputs, of which a request has one
KINDS: Mapping[str, Any] = {"BYTES": np.object_, "INT64": np.int64, "FP32": np.float32}
# What stands for a verdict, of a class or of boxes, where there is none.
AT_FAULT: Mapping[str, Any] = {
    "label": None,
    "index": None,
    "confidence": None,
    "boxes": (),
    "decision": "error",
    "detail": {"p_value": np.nan},
}
COUNTED = ("rampart_images_total", "rampart_errors_total", "rampart_query_alerts_total")
TOO_LARGE = ImageError(
    413, "body_too_large", f"a picture may have {MAX_BODY} bytes: send a smaller one"
)
ONE_INPUT = f"send one of the inputs {ENCODED} and {DECODED}"


class TritonPythonModel:
    """One defended classifier behind Triton, which calls it by this name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the archive. Raises ValueError on one line, which names the file and the remedy."""
        import triton_python_backend_utils as backend  # Triton alone has it

        self._backend = backend
        config = json.loads(args["model_config"])
        settings = yaml.safe_load((FOLDER / "model-config.yaml").read_text()) or {}
        settings = override(settings.get("rampart") or {}, os.environ)
        if args["model_instance_kind"] == "GPU":
            settings = {"device": "cuda"} | settings
        self._metrics = Metrics()
        self._counters = Counters(backend, args["model_name"])
        self._service = Service.open(
            FOLDER,
            settings,
            self._metrics,
            name=args["model_name"],
            version=args["model_version"],
            workers=sum(group.get("count", 1) for group in config["instance_group"]),
            gpu=int(args["model_instance_device_id"]),
        )
        self._outputs = [output["name"] for output in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch of requests, each of one picture or several."""
        read = [self._images(request) for request in requests]
        answers = iter(self._service.answer_images([images for images in read if images]))
        self._counters.add(self._metrics.take())
        return [self._response(next(answers)) if images else self._refusal() for images in read]

    def _images(self, request: Any) -> Images:
        """The pictures of a request; none where it has not exactly one input."""
        named = self._backend.get_input_tensor_by_name
        tensors = [named(request, name) for name in (ENCODED, DECODED)]
        encoded, decoded = (tensor and tensor.as_numpy() for tensor in tensors)
        if (encoded is None) == (decoded is None):
            return ()
        if decoded is None:
            return [one if len(one) <= MAX_BODY else TOO_LARGE.bare() for one in encoded.flat]
        try:
            check_size((decoded.shape[2], decoded.shape[1]))
        except ImageError as error:
            return [error.bare()] * len(decoded)
        return list(decoded)  # (N, H, W, 3)

    def _response(self, answers: Sequence[Answer]) -> Any:
        """The outputs of a request, a row a picture."""
        tensors, known = [], self._service.outputs
        for name in self._outputs:
            tensors.append(self._backend.Tensor(name, column(known.get(name), answers)))
        return self._backend.InferenceResponse(tensors)

    def _refusal(self) -> Any:
        error = self._backend.TritonError(ONE_INPUT, self._backend.TritonError.INVALID_ARG)
        return self._backend.InferenceResponse(error=error)


class Counters:
    """Our counters among Triton's own figures, where it shows some; all versions add up."""

    def __init__(self, backend: Any, model: str) -> None:
        self._model, self._metrics = model, dict[Key, Any]()
        try:
            kind = backend.MetricFamily.COUNTER
            self._families = {
                name: backend.MetricFamily(name=name, description=name, kind=kind)
                for name in COUNTED
            }
        except backend.TritonModelException:  # of --allow-metrics=false
            logger.warning("Triton shows no metrics, so Rampart has none either")
            self._families = {}

    def add(self, changes: Mapping[Key, float]) -> None:
        """Count what has changed."""
        for key, change in changes.items():
            name, labels = key
            if name in self._families:
                if key not in self._metrics:
                    named = dict(
                        zip(("model", *COUNTERS[name]), (self._model, *labels), strict=True)
                    )
                    self._metrics[key] = self._families[name].Metric(labels=named)
                self._metrics[key].increment(change)


def column(output: Output | None, answers: Sequence[Answer]) -> NDArray[Any]:
    """What an output says of each picture, (N, 1) or rows (N, M, ...).

    None stands for the errors, which are JSON, or empty for a verdict.
    """
    if output is None:
        errors = ["" if status == 200 else json.dumps(content) for status, content in answers]
        return np.array(errors, np.object_).reshape(-1, 1)
    verdicts = [content if status == 200 else AT_FAULT for status, content in answers]
    shape, data = output.tensor(verdicts)
    return np.array(data, KINDS[output.datatype]).reshape(shape if output.sides else (-1, 1))
