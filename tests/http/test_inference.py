"""Open Inference Protocol v2 over gRPC, by Triton's own client and by bare calls."""

import queue
import signal
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tritonclient.grpc as triton
from servers import Server, certificate_and_key, free_port
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from rampart.handlers.errors import ImageError
from rampart.handlers.http.arrivals import AT_ONCE
from rampart.handlers.http.bodies import MAX_BODY
from rampart.handlers.http.inference import as_http
from rampart.handlers.http.messages import CLASSES, MESSAGES, SERVICE
from rampart.launch.probe import probe

feature = pytest.mark.feature

Encode = Callable[..., bytes]
OUTPUTS = ["label", "index", "confidence", "decision", "p_value"]


@pytest.fixture(scope="module")
def spoken(start: Callable[..., Server], tiny_archive: Path) -> Server:
    """A server that speaks gRPC too, with two workers."""
    port = free_port()
    server = start(tiny_archive, workers=2, port=port, grpc_port=port + 1)
    assert "Rampart is ready" in server.read(), server.lines
    return server


@pytest.fixture
def client(spoken: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{spoken.grpc}") as client:
        yield client


@pytest.fixture
def picture(encode: Encode, pixels: np.ndarray) -> bytes:
    return encode(pixels)


def encoded(*pictures: bytes) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(pictures)], "BYTES")
    tensor.set_data_from_numpy(np.array(pictures, dtype=object))
    return tensor


def test_the_messages_are_those_of_tritons_client() -> None:
    for name, fields in MESSAGES.items():
        theirs = service_pb2.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
        if "." in name:
            theirs = theirs.nested_types_by_name[name.rpartition(".")[2]]
        ours = CLASSES[name].DESCRIPTOR
        assert len(ours.fields) == len(fields)
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            kinds = [(f.number, f.type, f.is_repeated) for f in (field, other)]
            assert kinds[0] == kinds[1], f"{name}.{field.name}"


@feature("Protocol health and metadata", "Rampart")
def test_health_and_metadata_are_told(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1.0")
    assert not client.is_model_ready("none") and not client.is_model_ready("tiny", "9")
    assert client.get_server_metadata().name == "rampart"
    metadata = client.get_model_metadata("tiny")
    assert list(metadata.versions) == ["1.0"]
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [
        ("image", "BYTES", [-1])
    ]
    assert [output.name for output in metadata.outputs] == OUTPUTS


@feature("Open Inference v2, gRPC", "Rampart")
def test_a_verdict_is_that_of_http_in_pictures_and_in_pixels(
    client: triton.InferenceServerClient, spoken: Server, picture: bytes, pixels: np.ndarray
) -> None:
    expected = requests.post(spoken.url, picture, timeout=10).json()
    tensor = triton.InferInput("image", [1, 32, 32, 3], "UINT8")
    tensor.set_data_from_numpy(pixels[None])
    for image in (encoded(picture), tensor):
        result = client.infer("tiny", [image], request_id="7")
        assert result.get_response().id == "7"
        assert result.as_numpy("label")[0].decode() == expected["label"]
        assert result.as_numpy("index").tolist() == [expected["index"]]
        assert result.as_numpy("confidence")[0] == pytest.approx(expected["confidence"], abs=1e-6)
        assert result.as_numpy("decision")[0].decode() == expected["decision"]
        p_value = expected["detail"]["p_value"]
        assert result.as_numpy("p_value")[0] == pytest.approx(p_value, abs=1e-6)


def test_outputs_are_chosen_and_several_pictures_answered_in_order(
    client: triton.InferenceServerClient, picture: bytes, encode: Encode, pixels: np.ndarray
) -> None:
    other = encode(np.ascontiguousarray(255 - pixels))
    wanted = [triton.InferRequestedOutput("index")]
    both = client.infer("tiny", [encoded(picture, other)], outputs=wanted).as_numpy("index")
    each = [
        client.infer("tiny", [encoded(one)], outputs=wanted).as_numpy("index")[0]
        for one in (picture, other)
    ]
    assert both.tolist() == each
    result = client.infer("tiny", [encoded(picture)], outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["index"]


def call(channel: grpc.Channel, name: str, request: Any, **options: Any) -> Any:
    method = channel.unary_unary(
        f"/inference.GRPCInferenceService/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=getattr(service_pb2, f"{name}Response").FromString,
    )
    return method(request, timeout=20, **options)


@pytest.fixture
def channel(spoken: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{spoken.grpc}") as channel:
        yield channel


def infer(contents: dict[str, Any], shape: list[int], kind: str = "BYTES") -> Any:
    request = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="image", datatype=kind, shape=shape)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return request


def test_typed_contents_are_answered_by_typed_contents(
    channel: grpc.Channel, picture: bytes, pixels: np.ndarray
) -> None:
    for request in (
        infer({"bytes_contents": [picture]}, [1]),
        infer({"uint_contents": pixels.flatten().tolist()}, [1, 32, 32, 3], "UINT8"),
    ):
        answer = call(channel, "ModelInfer", request)
        assert not answer.raw_output_contents
        outputs = {output.name: output.contents for output in answer.outputs}
        assert len(outputs["label"].bytes_contents) == len(outputs["index"].int64_contents) == 1
        assert 0 < outputs["confidence"].fp32_contents[0] <= 1


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        (infer({"bytes_contents": [b"hello"]}, [1]), "INVALID_ARGUMENT", "unsupported_format"),
        (infer({"bytes_contents": [b"a"]}, [2]), "INVALID_ARGUMENT", "malformed_tensor"),
        (infer({"bytes_contents": [b"a"]}, [-1]), "INVALID_ARGUMENT", "malformed_tensor"),
        (infer({}, [1] * 100_000), "INVALID_ARGUMENT", "malformed_tensor"),
        (infer({"uint_contents": [256]}, [1], "UINT8"), "INVALID_ARGUMENT", "malformed_tensor"),
        (infer({"uint_contents": [1] * 600_000}, [1], "UINT8"), "INVALID_ARGUMENT", None),
        (infer({"fp32_contents": [1.0]}, [1], "FP32"), "INVALID_ARGUMENT", "malformed_tensor"),
        (infer({"bytes_contents": [b""] * 33}, [33]), "INVALID_ARGUMENT", "too_many_images"),
        (service_pb2.ModelInferRequest(model_name="tiny"), "INVALID_ARGUMENT", "malformed_tensor"),
        (service_pb2.ModelInferRequest(model_name="none"), "NOT_FOUND", "no_such_model"),
        (infer({"bytes_contents": [bytes(MAX_BODY)]}, [1]), "RESOURCE_EXHAUSTED", None),
    ],
)
def test_what_is_wrong_is_told_by_status_type_and_message(
    channel: grpc.Channel, request_: Any, status: str, kind: str | None
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "ModelInfer", request_)
    assert caught.value.code().name == status
    if kind:
        trailer = dict(caught.value.trailing_metadata())
        assert trailer["error-type"] == kind and caught.value.details()


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_millions_of_empty_contents_are_refused_before_one_is_read(raw: bool) -> None:
    """A message has room for three million, of which Python would make a gigabyte."""
    request = CLASSES["ModelInferRequest"](model_name="tiny")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    contents = request.raw_input_contents if raw else tensor.contents.bytes_contents
    contents.extend([b""] * 200_000)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError):
            as_http(request, {})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "fields", [b"\x2a\x00", b"\x32\x00", b"\x3a\x00", b"\x0a\x00", b"\x08\x01"]
)
def test_a_message_of_millions_of_fields_is_refused_before_it_is_parsed(
    channel: grpc.Channel, fields: bytes
) -> None:
    call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        call(fields * 3_000_000, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "exactly one input" in caught.value.details()


@pytest.mark.slow
def test_streams_whose_next_message_is_awaited_hold_nothing_of_the_one_before(
    spoken: Server, channel: grpc.Channel
) -> None:
    request = CLASSES["ModelInferRequest"](model_name="tiny")
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
        bytes(6_000_000)
    )
    ends = threading.Event()

    def sent(data: bytes) -> Iterator[bytes]:
        yield data
        ends.wait(60)

    def held() -> int:
        return sum(process.memory_info().rss for process in spoken.family())

    call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    next(call(iter([request.SerializeToString()]), timeout=30))  # what is allocated once, is
    before, calls = held(), []
    try:
        for _ in range(20):
            calls.append(call(sent(request.SerializeToString()), timeout=60))
            answer = CLASSES["ModelStreamInferResponse"].FromString(next(calls[-1]))
            assert answer.error_message
        assert held() - before < 60e6  # of 120 MB
    finally:
        ends.set()


def test_a_compressed_message_is_bounded_after_it_is_inflated(channel: grpc.Channel) -> None:
    small, large = ([bytes(size)] for size in (1_000_000, MAX_BODY + 1_000_000))
    for contents, status in ((small, "INVALID_ARGUMENT"), (large, "RESOURCE_EXHAUSTED")):
        with pytest.raises(grpc.RpcError) as caught:
            call(
                channel,
                "ModelInfer",
                infer({"bytes_contents": contents}, [1]),
                compression=grpc.Compression.Gzip,
            )
        assert caught.value.code().name == status


def test_a_message_that_is_none_and_a_call_without_one_are_told(channel: grpc.Channel) -> None:
    method = "/inference.GRPCInferenceService/ModelInfer"
    calls = [
        lambda: channel.unary_unary(method)(b"\xff" * 9, timeout=20),
        lambda: channel.stream_unary(method)(iter(()), timeout=20),
    ]
    for ask in calls:
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        assert caught.value.code().name == "INVALID_ARGUMENT"
        assert dict(caught.value.trailing_metadata())["error-type"] == "malformed_message"


@feature("Client deadlines", "Rampart")
def test_the_deadline_of_a_call_counts(channel: grpc.Channel, picture: bytes) -> None:
    request = infer({"bytes_contents": [picture]}, [1])
    method = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
    )
    with pytest.raises(grpc.RpcError) as caught:
        method(request, timeout=0.0005)
    assert caught.value.code().name == "DEADLINE_EXCEEDED"


def test_the_clients_mistake_is_told_by_tritons_client(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException, match="send one of these") as caught:
        client.infer("tiny", [encoded(b"hello")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_headers_that_http_repeats_come_back_as_metadata(
    channel: grpc.Channel, picture: bytes
) -> None:
    request, sent = infer({"bytes_contents": [picture]}, [1]), (("x-request-id", "abc"),)
    method = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
    )
    _, answered = method.with_call(request, timeout=20, metadata=sent)
    assert ("x-request-id", "abc") in [(k, v) for k, v in answered.trailing_metadata()]


@feature("Tokens", "Rampart")
@feature("TLS", "Rampart")
def test_tokens_and_tls_hold_for_grpc(
    start: Callable[..., Server], tiny_archive: Path, picture: bytes, tmp_path: Path
) -> None:
    (certificate, key), tokens = certificate_and_key(tmp_path), tmp_path / "tokens"
    tokens.write_text(f"team {'a' * 20}\nslow {'c' * 20} 0.01 2\n")
    port = free_port()
    server = start(
        tiny_archive,
        port=port,
        grpc_port=port + 1,
        tokens=str(tokens),
        tls=[str(certificate), str(key)],
    )
    assert "Rampart is ready" in server.read(), server.lines
    trust = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{server.grpc}", trust) as channel:
        request = infer({"bytes_contents": [picture]}, [1])
        for sent in ((), (("authorization", f"Bearer {'b' * 20}"),)):
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, "ModelInfer", request, metadata=sent)
            assert caught.value.code().name == "UNAUTHENTICATED"
            assert dict(caught.value.trailing_metadata())["error-type"] == "no_token"
        assert call(channel, "ServerReady", service_pb2.ServerReadyRequest()).ready
        good = (("authorization", f"Bearer {'a' * 20}"),)
        assert call(channel, "ModelInfer", request, metadata=good).model_name == "tiny"
        slow = (("authorization", f"Bearer {'c' * 20}"),)
        for _ in range(2):
            assert call(channel, "ModelInfer", request, metadata=slow).model_name == "tiny"
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", request, metadata=slow)
        assert caught.value.code().name == "RESOURCE_EXHAUSTED"
        trailer = dict(caught.value.trailing_metadata())
        assert trailer["error-type"] == "too_many_requests" and int(trailer["retry-after"]) >= 1
    metrics = f"https://127.0.0.1:{port}/metrics"
    files = {"tokens": tokens, "certificate": certificate}
    assert set(probe(metrics, 15, **files)) == {"tiny"}
    for missing in files:
        with pytest.raises(RuntimeError, match="no metrics at"):
            probe(metrics, 15, **(files | {missing: None}))
    assert server.end() == 0


def test_a_port_that_is_taken_is_told(
    start: Callable[..., Server], spoken: Server, tiny_archive: Path
) -> None:
    server = start(tiny_archive, grpc_port=spoken.grpc)
    assert server.finish() == 1
    assert f"error: port {spoken.grpc} on 127.0.0.1 cannot be used" in "".join(server.lines)


class Stream:
    """A stream of one client's, whose answers come into a queue."""

    def __init__(self, port: int, **options: Any) -> None:
        self.client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(
            lambda result, error: self._answers.put((result, error)), **options
        )

    def ask(self, picture: bytes, name: str) -> None:
        self.client.async_stream_infer("tiny", [encoded(picture)], request_id=name)

    def answer(self) -> tuple[Any, Any]:
        """The next result, or why there is none."""
        return self._answers.get(timeout=30)

    def close(self) -> None:
        self.client.stop_stream()
        self.client.close()


@feature("Open Inference v2, gRPC streams", "Rampart")
def test_a_stream_answers_in_order_and_a_fault_ends_it_not(
    spoken: Server, client: triton.InferenceServerClient, picture: bytes
) -> None:
    expected = client.infer("tiny", [encoded(picture)]).as_numpy("p_value")
    stream = Stream(spoken.grpc)
    for number in range(20):
        stream.ask(b"text" if number == 7 else picture, str(number))
    for number in range(20):
        result, error = stream.answer()
        if number == 7:
            assert "not a JPEG, PNG or WebP" in str(error)
            continue
        assert error is None and result.get_response().id == str(number)
        assert result.as_numpy("p_value") == expected
    stream.close()


@feature("Rate limits per token", "Rampart")
def test_each_request_of_a_stream_counts_for_its_tokens_rate(
    start: Callable[..., Server], tiny_archive: Path, picture: bytes, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"slow {'a' * 20} 0.01 5\nfree {'b' * 20}\n")
    port = free_port()
    server = start(tiny_archive, port=port, grpc_port=port + 1, tokens=str(tokens))
    assert "Rampart is ready" in server.read(until="  curl")
    stream = Stream(server.grpc, headers={"authorization": f"Bearer {'a' * 20}"})
    for number in range(9):
        stream.ask(picture, str(number))
    errors = [stream.answer()[1] for _ in range(9)]
    stream.close()
    assert errors[:5] == [None] * 5
    assert all("more requests than its rate" in str(error) for error in errors[5:])
    assert server.end() == 0


def test_streams_that_say_nothing_stop_no_other_call_and_are_told(
    spoken: Server, client: triton.InferenceServerClient, picture: bytes
) -> None:
    streams = [Stream(spoken.grpc) for _ in range(3 * AT_ONCE)]
    for _ in range(10):
        client.infer("tiny", [encoded(picture)])  # raises where a stream does not make room
    result, error = streams[0].answer()
    assert result is None and error.status() == "StatusCode.UNAVAILABLE"
    for stream in streams:
        stream.close()


def test_calls_that_have_come_are_answered_before_the_end(
    start: Callable[..., Server], tiny_archive: Path, encode: Encode
) -> None:
    port = free_port()
    server = start(tiny_archive, port=port, grpc_port=port + 1)
    assert "Rampart is ready" in server.read(), server.lines
    large = encode(np.zeros((1500, 1500, 3), np.uint8), "JPEG")  # which takes long to decode
    answers: queue.Queue[Exception | None] = queue.Queue()
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        for _ in range(50):  # of 64 that one connection may have at once
            client.async_infer(
                "tiny",
                [encoded(large)],
                lambda result, error: answers.put(error),
                client_timeout=30,
            )
        assert answers.get(timeout=30) is None  # the others are under way
        server.process.send_signal(signal.SIGTERM)
        left = answers.qsize()
        assert left < 40, "the server was too fast for this test"
        assert [answers.get(timeout=30) for _ in range(49)] == [None] * 49
    assert server.end() == 0
