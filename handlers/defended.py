"""The TorchServe handler: translates requests and replies between TorchServe and service.py.

TorchServe imports this file by its own name and wants exactly one class in it.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any

from rampart.handlers import wire
from rampart.handlers.errors import ImageError
from rampart.handlers.hand_over import HandOver
from rampart.handlers.service import Service
from rampart.handlers.settings import override
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Incoming, Reply, Route

# Headers of every prediction, which a describe call of the management API lacks.
PREDICTION = {"url_path", "explain", "content-type"}
# TorchServe sends an x-request-id of its own, so the client's needs another name.
RENAMED = {"x-request-id": "x-client-request-id"}
TOO_MANY_PARTS = ImageError(
    413,
    "too_many_parts",
    f"a request may have at most {wire.MAX_PARTS} parts, fields and query parameters: send fewer",
)
Fields = Mapping[str, object]


def seat(arguments: Sequence[str]) -> str:
    """The number of this worker, which TorchServe gives to who replaces it too."""
    where = dict(pairwise(arguments))
    return (where.get("--sock-name") or where.get("--port") or "").rpartition(".")[2]


class DefendedHandler:
    """One defended classifier behind TorchServe."""

    def initialize(self, context: Any) -> None:
        """Open the archive. Raises ValueError on one line, which names the file and the remedy."""
        wire.install()
        metrics, config = Metrics(), context.model_yaml_config
        self._service = Service.open(
            Path(context.system_properties["model_dir"]),
            override(config.get("rampart") or {}, os.environ),
            metrics,
            name=context.model_name,
            version=str(context.manifest["model"].get("modelVersion", "")),
            workers=os.environ.get("RAMPART_WORKERS") or config.get("maxWorkers") or 1,
            gpu=context.system_properties.get("gpu_id") or 0,
        )
        self._hand_over = HandOver(
            metrics, context.metrics, context.model_name, worker=seat(sys.argv)
        )
        self._hand_over.start()

    def handle(self, data: Sequence[Fields], context: Any) -> list[bytes]:
        """Answer a batch of requests, one JSON body each; statuses go to the context."""
        with self._hand_over.pulse.busy():
            batch = [
                incoming(fields, context.get_all_request_header(index))
                for index, fields in enumerate(data)
            ]
            replies = self._service.answer(batch)
            for index, reply in enumerate(replies):
                respond(context, index, batch[index], reply)
        return [reply.body for reply in replies]


def incoming(fields: Fields, headers: Mapping[str, object]) -> Incoming:
    """A request for the service. `fields` are the body, or the parts and query parameters by name;
    `headers` also hold each part's content type, under its name."""
    texts = {name.lower(): str(value) for name, value in headers.items()}
    # TorchServe calls a whole body `body`; gRPC clients usually call their image `data`.
    whole = "body" if "body" in fields else "data"
    parts = [
        as_bytes(value)
        for name, value in fields.items()
        if name == whole or content_type(headers.get(name))
    ]
    refusal = TOO_MANY_PARTS if wire.TOO_MANY in fields else None
    # What came to /explanations or to :explain. TorchServe passes no query on to a model.
    explain = texts.get("explain") == "True"
    return Incoming(texts, parts, route(fields, texts), refusal, explain)


def route(fields: Fields, headers: Mapping[str, str]) -> Route:
    """The route. Only TorchServe's own, /predictions/NAME, has a header `url_path`. A describe call
    is a header too, which any client can send."""
    described = headers.get("describe") == "True" and not fields
    if described and PREDICTION.isdisjoint(headers):
        return "describe"
    return "predictions" if "url_path" in headers else "v1"


def content_type(entry: object) -> object:
    """A part's content type; query parameters and plain form fields have none."""
    return entry.get("content-type") if isinstance(entry, Mapping) else None


def as_bytes(value: object) -> bytes:
    """A part as it was sent. TorchServe hands over some of type text/* as str, JSON parsed."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def respond(context: Any, index: int, request: Incoming, reply: Reply) -> None:
    """Status and headers of one reply. Phrases are HTTP's own: others can end a worker."""
    context.set_response_status(reply.status, HTTPStatus(reply.status).phrase, index)
    for name, value in reply.headers.items():
        if name == "content-type":
            context.set_response_content_type(index, value)
        else:
            context.set_response_header(index, RENAMED.get(name, name), value)
    if "content-length" not in request.headers:
        # The call came by gRPC. A streaming one ends the worker without this header.
        context.set_response_header(index, "ts_stream_next", "false")
