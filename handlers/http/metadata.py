"""What Open Inference Protocol v2 tells of the server and its models, over HTTP and gRPC."""

from collections.abc import Mapping
from typing import Any

from rampart.handlers.errors import ImageError
from rampart.handlers.http.lane import Lane
from rampart.handlers.protocols.open_inference import INPUTS

NO_MODEL = ImageError(404, "no_such_model", "no such model or version is served here")
SERVER = {"name": "rampart", "version": "2", "extensions": ["binary_tensor_data"]}
Models = Mapping[tuple[str, str], Lane]  # by name and version; a name's first is its default


def find(models: Models, name: str, version: str | None) -> Lane:
    """The lane of a model, of its first version where none is named. Raises ImageError."""
    for served, lane in models.items():
        if served[0] == name and version in (None, "", served[1]):
            return lane
    raise NO_MODEL.bare()


def tensors(models: Models, name: str, version: str | None) -> dict[str, Any]:
    """A model's versions and tensors. Raises ImageError."""
    service = find(models, name, version).service
    outputs = [
        {"name": name, "datatype": output.datatype, "shape": [-1, *output.sides]}
        for name, output in service.outputs.items()
        if not (service.policy.detail == "public" and name == "p_value")
    ]
    return {
        "name": name,
        "versions": [version for served, version in models if served == name],
        "platform": "rampart",
        "inputs": list(INPUTS),
        "outputs": outputs,
    }
