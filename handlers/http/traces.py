"""Traces by OpenTelemetry: a span for a request, under the caller's, and one for each stage of it.

Where the extra `otel` is not installed, or no endpoint is named, there are none.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rampart.handlers.types import Incoming, Reply

logger = logging.getLogger(__name__)

# Its warnings quote what clients send as `tracestate`, and could fill a disk.
logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)

ENDPOINTS = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"}
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SPOKEN = "http/protobuf"
Stages = Mapping[str, tuple[int, int]]  # when each began and ended, in ns since 1970


class Traces:
    """Gives spans to an exporter, in a thread of its own; a batch's stages are each request's."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._kind = provider, SpanKind.SERVER
        self._tracer = provider.get_tracer("rampart")
        self._caller = TraceContextTextMapPropagator()

    def add(self, replies: Sequence[tuple[Incoming, int, Reply]], stages: Stages) -> None:
        """The spans of a batch's requests, each with the time at which it came, in ns."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        for incoming, came, reply in replies:
            span = self._tracer.start_span(
                "infer",
                context=self._caller.extract(incoming.headers),
                kind=self._kind,
                start_time=came,
                attributes={
                    "http.response.status_code": reply.status,
                    "rampart.batch_requests": len(replies),
                },
            )
            if reply.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(span)
            for stage, (began, ended) in stages.items():
                self._tracer.start_span(stage, context=inside, start_time=began).end(ended)
            span.end()

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def open_traces(environment: Mapping[str, str] = os.environ) -> Traces | None:
    """Traces as OpenTelemetry's own variables say; where they cannot be sent, the log says why."""
    wanted = any(environment.get(name) for name in ENDPOINTS)
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if off or not wanted:
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), SPOKEN)
    if protocol != SPOKEN:
        logger.warning(
            "No traces: Rampart exports them only by %s: set %s to it", SPOKEN, PROTOCOLS[0]
        )
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning("No traces: to send them to the endpoint, install the extra `otel`")
        return None
    named = Resource.create()  # what the variables say counts for more than our name
    own = Resource({"service.name": "rampart"})
    unnamed = str(named.attributes["service.name"]).startswith("unknown_service")
    provider = TracerProvider(resource=named.merge(own) if unnamed else named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)
