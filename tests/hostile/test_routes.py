"""Every call that the server declares, with what belongs there and with what does not."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from clients import Target, form_fields, pipelined

from benchmarks.fuzz import INFERENCE, field, grpc_answer, grpc_request

Call = Callable[[grpc.Channel, bytes], list[bytes]]
TIMEOUT = 20


def unary(channel: grpc.Channel, path: str, asked: bytes) -> list[bytes]:
    return [channel.unary_unary(path)(asked, timeout=TIMEOUT)]


def streamed(channel: grpc.Channel, path: str, asked: bytes) -> list[bytes]:
    return list(channel.unary_stream(path)(asked, timeout=TIMEOUT))


def both_ways(channel: grpc.Channel, path: str, asked: bytes) -> list[bytes]:
    return list(channel.stream_stream(path)(iter([asked, asked]), timeout=TIMEOUT))


@pytest.fixture(scope="module")
def channel(target: Target) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{target.grpc}") as channel:
        yield channel


@pytest.fixture
def body(encode: Callable[..., bytes], pixels: np.ndarray) -> bytes:
    return encode(pixels)


@pytest.fixture(autouse=True)
def workers(server: Any) -> Iterator[None]:
    """Whatever a test sends, the workers stay the same."""
    before = server.worker_pids()
    yield
    assert server.worker_pids() == before


@pytest.mark.parametrize(
    ("method", "call"), [("Predictions", unary), ("StreamPredictions", streamed)]
)
def test_grpc_predictions_are_verdicts_by_one_call_and_by_one_that_streams(
    channel: grpc.Channel, target: Target, body: bytes, method: str, call: Any
) -> None:
    path = f"{INFERENCE}/{method}"
    (reply,) = call(channel, path, grpc_request(target.model, {"data": body}))
    assert grpc_answer(reply) == requests.post(target.url, body, timeout=60).json()
    (reply,) = call(channel, path, grpc_request(target.model, {"data": b"hello"}))
    assert grpc_answer(reply)["code"] == 415


@pytest.mark.parametrize("sequence", [b"", b"7"])
def test_grpc_sequences_are_refused_or_answered(
    channel: grpc.Channel, target: Target, body: bytes, sequence: bytes
) -> None:
    asked = grpc_request(target.model, {"data": body}) + field(4, sequence) * bool(sequence)
    try:
        replies = both_ways(channel, f"{INFERENCE}/StreamPredictions2", asked)
    except grpc.RpcError as error:
        assert error.code() is not grpc.StatusCode.OK
    else:
        assert all(b"label" in reply or b"Parameter" in reply for reply in replies)


@pytest.mark.parametrize(
    "path",
    [
        "/org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels",
        "/org.pytorch.serve.grpc.management.ManagementAPIsService/ScaleWorker",
        "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer",
        f"{INFERENCE}/Explanations",
    ],
)
def test_other_services_are_not_there(channel: grpc.Channel, path: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, path, b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_grpc_request_of_fifty_thousand_keys_is_refused(
    channel: grpc.Channel, target: Target
) -> None:
    asked = grpc_request(target.model, {f"k{i}": b"" for i in range(50_000)})
    (reply,) = unary(channel, f"{INFERENCE}/Predictions", asked)
    assert grpc_answer(reply)["type"] == "too_many_parts"


@pytest.mark.parametrize("asked", [b"\xff" * 50, b"\x1a\xff\xff\xff\x7f", field(1, b"\xff")])
def test_broken_protobuf_is_an_error_of_the_front_end_alone(
    channel: grpc.Channel, asked: bytes
) -> None:
    with pytest.raises(grpc.RpcError):
        unary(channel, f"{INFERENCE}/Predictions", asked)


def test_every_http_route_answers_any_method_without_an_error_of_ours(
    target: Target, body: bytes
) -> None:
    root = f"http://127.0.0.1:{target.port}"
    paths = requests.options(f"{root}/", timeout=60).json()["paths"]
    names = {"{model_name}": target.model, "{model_version}": "1.0"}
    ours = {"internal_error", "engine_failure", "reply_too_long"}
    for path in (*paths, "/models", "/explanations/tiny", "/invocations", "/wfpredict/tiny"):
        for name, value in names.items():
            path = path.replace(name, value)
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
            for data in (b"", body, b"{"):
                answer = requests.request(method, root + path, data=data, timeout=60)
                assert not any(name in answer.text for name in ours), (method, path)
                assert "label" not in answer.text or data == body, (method, path)


def test_an_id_is_echoed_up_to_256_characters_and_refused_beyond(target: Target) -> None:
    def infer(name: str) -> requests.Response:
        tensor = {"name": "i", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
        return requests.post(target.infer, json={"id": name, "inputs": [tensor]}, timeout=60)

    assert infer("é" * 256).json()["id"] == "é" * 256
    answer = infer("é" * 257)
    assert (answer.status_code, answer.json()["type"]) == (422, "id_too_long")
    assert len(answer.content) < 500


def test_a_form_of_many_fields_is_refused(target: Target) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = requests.post(target.url, form_fields(50_000), headers=kind, timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (413, "too_many_parts")


def test_an_http_request_without_a_host_is_answered_once(target: Target, body: bytes) -> None:
    """What tells gRPC's calls apart must not make HTTP answers into streams."""
    head = f"POST /predictions/{target.model} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", target.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        data = connection.recv(65536)
    assert data.startswith(b"HTTP/1.1 200") and b"content-length" in data.lower()
    assert data.endswith(b"}\n")


def test_thirty_pipelined_requests_get_thirty_answers(target: Target) -> None:
    answers = pipelined(target, 30)
    assert [answer[:3] for answer in answers] == [b"200"] * 30
