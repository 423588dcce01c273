"""Traces that a real server sends to a real receiver of OTLP, which is this process."""

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from servers import Server, free_port
from tritonclient.utils import InferenceServerException

from rampart.handlers.http.traces import open_traces
from rampart.handlers.types import Incoming, Reply

feature = pytest.mark.feature

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Encode = Callable[..., bytes]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


class Receiver:
    """Keeps the spans that come, with the name of the service that sends them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                receiver.keep(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def keep(self, message: Any) -> None:
        for of in message.resource_spans:
            names = {one.key: one.value.string_value for one in of.resource.attributes}
            for scope in of.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]

    def wait(self, count: int, trace: str) -> list[tuple[str, Any]]:
        """The spans of one trace, once there are so many."""
        end = time.monotonic() + 30
        while True:
            spans = [one for one in self.spans if one[1].trace_id.hex() == trace]
            if len(spans) >= count:
                return spans
            assert time.monotonic() < end, spans
            time.sleep(0.1)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="module")
def traced(start: Callable[..., Server], tiny_archive: Path, receiver: Receiver) -> Server:
    port = free_port()
    environment = {ENDPOINT: receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    server = start(tiny_archive, port=port, grpc_port=port + 1, environment=environment)
    assert "Rampart is ready" in server.read(), server.lines
    return server


def assert_whole(spans: list[tuple[str, Any]], status: int) -> None:
    """A request's span under its caller's, and in it the stages, one after the other."""
    assert {service for service, _ in spans} == {"rampart"}
    (request,) = [span for _, span in spans if span.name == "infer"]
    assert request.parent_span_id.hex() == CALLER
    numbers = {one.key: one.value.int_value for one in request.attributes}
    assert numbers["http.response.status_code"] == status
    stages = sorted(
        (span for _, span in spans if span is not request), key=lambda one: one.start_time_unix_nano
    )
    assert [span.name for span in stages] == ["decode", "graph", "response"]
    assert {span.parent_span_id for span in stages} == {request.span_id}
    times = [
        time for span in stages for time in (span.start_time_unix_nano, span.end_time_unix_nano)
    ]
    whole = [request.start_time_unix_nano, *times, request.end_time_unix_nano]
    assert whole == sorted(whole) and whole[0] > time.time_ns() - 120e9


@feature("Traces", "Rampart")
def test_the_stages_of_a_request_are_spans_under_its_callers(
    traced: Server, receiver: Receiver, encode: Encode, pixels: Any
) -> None:
    assert requests.post(traced.url, encode(pixels), headers=SENT, timeout=60).status_code == 200
    assert_whole(receiver.wait(4, TRACE), 200)


def test_the_log_keeps_nothing_of_the_state_that_a_caller_sends(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenTelemetry would quote what is malformed, once for each request."""
    monkeypatch.setenv(ENDPOINT, receiver.url)
    traces = open_traces()
    assert traces
    other = TRACE[1:] + TRACE[:1]
    sent = {"traceparent": f"00-{other}-{CALLER}-01", "tracestate": "CANARY, =, =="}
    traces.add([(Incoming(sent, ()), time.time_ns(), Reply(200, {}, b""))], {})
    traces.close()
    assert len(receiver.wait(1, other)) == 1
    assert "CANARY" not in caplog.text


def test_a_call_by_grpc_and_a_fault_have_spans_too(traced: Server, receiver: Receiver) -> None:
    other = TRACE[::-1]
    sent = {"traceparent": f"00-{other}-{CALLER}-01"}
    tensor = tritonclient.grpc.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"text"], dtype=object))
    with (
        tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{traced.grpc}") as client,
        pytest.raises(InferenceServerException, match="not a JPEG"),
    ):
        client.infer("tiny", [tensor], headers=sent)
    assert_whole(receiver.wait(4, other), 415)


@feature("Batches across clients", "Rampart")
def test_requests_of_one_batch_have_spans_each(
    traced: Server, receiver: Receiver, encode: Encode, pixels: Any
) -> None:
    picture = encode(pixels)
    traces = [f"{number:032x}" for number in range(1, 41)]

    def ask(trace: str) -> int:
        headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
        return requests.post(traced.url, picture, headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, traces)) == {200}
    batches = []
    for trace in traces:
        spans = receiver.wait(4, trace)
        assert len(spans) == 4
        assert_whole(spans, 200)
        (request,) = [span for _, span in spans if span.name == "infer"]
        batches += [one.value.int_value for one in request.attributes if "batch" in one.key]
    assert max(batches) > 1


def test_without_an_endpoint_or_where_they_are_turned_off_there_are_no_traces(
    caplog: pytest.LogCaptureFixture,
) -> None:
    endpoint = {ENDPOINT: "http://127.0.0.1:1"}
    assert open_traces({}) is None
    assert open_traces(endpoint | {"OTEL_SDK_DISABLED": "true"}) is None
    assert open_traces(endpoint | {"OTEL_TRACES_EXPORTER": "none"}) is None
    assert not caplog.messages
    assert open_traces(endpoint | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) is None
    assert caplog.messages == [
        "No traces: Rampart exports them only by http/protobuf:"
        " set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL to it"
    ]


def test_without_the_extra_there_are_no_traces_and_the_log_says_so() -> None:
    python = Path(sys.prefix) / "kserve" / "bin" / "python"  # has OpenTelemetry's names alone
    code = "from rampart.handlers.http.traces import open_traces; print(open_traces())"
    own = os.environ | {ENDPOINT: "http://127.0.0.1:1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=own)
    assert done.stdout == "None\n", done.stderr
    assert done.stderr == "No traces: to send them to the endpoint, install the extra `otel`\n"
