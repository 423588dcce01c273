"""KServe's ModelServer with an archive as its model: v1 and v2, over HTTP and gRPC.

    python -m rampart.kserve --archive /mnt/models/cifar10.mar

It takes KServe's own options too, of which `--workers` stays 1: KServe scales by pods.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from grpc_interceptor.exceptions import GrpcException
from kserve import InferRequest, InferResponse, Model, ModelServer
from kserve.model_server import parser
from prometheus_client import REGISTRY

from rampart.handlers.errors import ImageError
from rampart.handlers.http.exposition import Exposition
from rampart.handlers.http.inference import as_http, status_of
from rampart.handlers.http.lane import ANSWER_SECONDS, Lane
from rampart.handlers.http.metadata import tensors
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Incoming, Reply
from rampart.launch.opening import open_archive

# KServe has read the body already, so these say nothing of what it hands over.
OF_THE_BODY = {"content-encoding", "inference-header-content-length"}
Payload = Any  # bytes or the JSON of v1, an InferRequest of v2


class Rampart(Model):  # type: ignore[misc]
    """One defended classifier, under its archive's own name."""

    def __init__(self, archive: Path, folder: Path) -> None:
        metrics = Metrics()
        service, name, version = open_archive(archive, metrics)
        super().__init__(name, return_response_headers=True)
        self._lane = Lane(service, metrics)
        self._tensors = tensors({(name, version): self._lane}, name, version)
        REGISTRY.register(Exposition([(name, metrics)], folder))  # KServe shows it at /metrics
        self.ready = True

    async def predict(
        self, payload: Payload, headers: Mapping[str, str], response_headers: dict[str, str]
    ) -> Any:
        """As KServe calls it, once it has read a request."""
        reply = await self._reply(payload, headers)
        content = json.loads(reply.body)
        response_headers.update({k: v for k, v in reply.headers.items() if k != "content-type"})
        return _response(content, payload) if isinstance(payload, InferRequest) else content

    async def explain(self, payload: Payload, headers: dict[str, str]) -> Any:
        """As KServe calls it for v1's `:explain`."""
        own = dict(headers)
        headers.clear()  # KServe sends back what it finds there, a client's token too
        return json.loads((await self._reply(payload, own, explain=True)).body)

    async def _reply(
        self, payload: Payload, headers: Mapping[str, str], *, explain: bool = False
    ) -> Reply:
        """Raises what KServe makes of an answer that is no verdict."""
        own = {k.lower(): v for k, v in (headers or {}).items() if k.lower() not in OF_THE_BODY}
        over_grpc = isinstance(payload, InferRequest) and payload.from_grpc
        try:
            incoming = _incoming(payload, own)._replace(explain=explain)
        except ImageError as error:
            reply = self._lane.service.refuse(Incoming(own, ()), error)
        else:
            reply = await self._lane.answer(incoming, seconds=ANSWER_SECONDS)
        if reply.status != 200:
            raise _error(reply, over_grpc=over_grpc)
        return reply

    async def healthy(self) -> bool:
        """Whether its thread runs and no batch hangs."""
        return self._lane.alive()

    def get_input_types(self) -> list[dict[str, Any]]:
        """For the metadata."""
        return list(self._tensors["inputs"])

    def get_output_types(self) -> list[dict[str, Any]]:
        """For the metadata."""
        return list(self._tensors["outputs"])


def _incoming(payload: Payload, headers: Mapping[str, str]) -> Incoming:
    """A request as it would come to a server of ours. Raises ImageError."""
    if not isinstance(payload, InferRequest):
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return Incoming(headers, [body], "v1")
    if payload.from_grpc:
        return as_http(payload.to_grpc(), headers)
    return Incoming(headers, [json.dumps(payload.to_rest()[0]).encode()], "v2")


def _response(content: Mapping[str, Any], payload: InferRequest) -> InferResponse:
    return InferResponse(
        content.get("id"),
        content["model_name"],
        InferResponse.from_rest(content).outputs,
        model_version=content["model_version"],
        use_binary_outputs=payload.use_binary_outputs,
        requested_outputs=payload.request_outputs,
    )


def _error(reply: Reply, *, over_grpc: bool) -> Any:
    """The exception of which KServe makes an answer with the same status."""
    content = json.loads(reply.body)
    if over_grpc:
        return GrpcException(content["message"], status_of(reply.status))
    headers = {k: v for k, v in reply.headers.items() if k != "content-type"}
    return HTTPException(reply.status, content, headers)


def main() -> None:
    """Serve until SIGTERM; ends with one line for an archive that cannot be served."""
    parser.add_argument("--archive", type=Path, required=True)
    archive = parser.parse_known_args()[0].archive
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        try:
            model = Rampart(archive, Path(folder))
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        ModelServer(workers=1).start([model])


if __name__ == "__main__":
    main()
