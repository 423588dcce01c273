"""Clients that people have, against one real server: each gets the verdict that curl gets."""

import base64
import gzip
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tritonclient.http as triton
from peers import assert_kserves_client_gets, assert_same, tensors
from servers import Server
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def body(pixels: np.ndarray, encode: Callable[..., bytes]) -> bytes:
    return encode(pixels)


@pytest.fixture(scope="module")
def own(server: Server, body: bytes) -> dict[str, Any]:
    """What the plain route says."""
    verdict: dict[str, Any] = requests.post(server.url, data=body, timeout=60).json()
    return verdict


def test_curl(server: Server, body: bytes, own: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(body)
    for options in (["-T", "a.png"], ["-F", "image=@a.png"], ["--data-binary", "@a.png"]):
        command = ["curl", "-s", *options, "-H", "Expect:", server.url]
        if options[0] == "--data-binary":
            command += ["-H", "Content-Type: image/png"]
        done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
        assert json.loads(done.stdout) == own


def test_kserve_v1_answers_in_a_list_whatever_its_length(
    server: Server, body: bytes, own: dict[str, Any]
) -> None:
    url = f"{server.root}/v1/models/tiny:predict"
    instance = {"b64": base64.b64encode(body).decode()}
    for count in (1, 2):
        answer = requests.post(url, json={"instances": [instance] * count}, timeout=60)
        assert answer.json() == {"predictions": [own] * count}
    answer = requests.post(url, json={"instances": []}, timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (422, "no_instances")


def test_open_inference_v2_takes_pixels_and_pictures(
    server: Server, pixels: np.ndarray, body: bytes, own: dict[str, Any]
) -> None:
    url = f"{server.root}/v2/models/tiny/infer"
    picture = {"datatype": "BYTES", "shape": [1], "data": [base64.b64encode(body).decode()]}
    raw = {"datatype": "UINT8", "shape": [1, 32, 32, 3], "data": pixels.ravel().tolist()}
    for tensor in (picture, raw):
        request = {"id": "7", "inputs": [{"name": "image"} | tensor]}
        answer = requests.post(url, json=request, timeout=60).json()
        assert (answer["model_name"], answer["model_version"]) == ("tiny", "1.0")
        assert answer["id"] == "7"
        assert_same(tensors(answer), own)
    broken = {"inputs": [{"name": "image"} | picture | {"data": ["aGVsbG8="]}]}
    refused = requests.post(url, json=broken, timeout=60)
    assert refused.status_code == 415 and refused.json()["error"] == refused.json()["message"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("form", ["pixels", "picture"])
def test_tritons_http_client(
    server: Server, pixels: np.ndarray, body: bytes, own: dict[str, Any], binary: bool, form: str
) -> None:
    if form == "pixels":
        image, data = triton.InferInput("image", [2, 32, 32, 3], "UINT8"), np.stack([pixels] * 2)
    else:
        image = triton.InferInput("image", [2], "BYTES")
        data = np.array([body if binary else base64.b64encode(body)] * 2, dtype=object)
    image.set_data_from_numpy(data, binary_data=binary)
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    answer = client.infer("tiny", [image], request_id="7")
    assert answer.get_response()["id"] == "7"
    decoded = [
        value.decode() if isinstance(value, bytes) else value for value in answer.as_numpy("label")
    ]
    assert decoded == [own["label"]] * 2
    np.testing.assert_allclose(
        answer.as_numpy("p_value"), [own["detail"]["p_value"]] * 2, rtol=1e-5
    )
    flat = triton.InferInput("image", [3], "UINT8")
    flat.set_data_from_numpy(pixels[0, 0], binary_data=binary)
    with pytest.raises(InferenceServerException, match=r"its shape is not \[N, height, width, 3\]"):
        client.infer("tiny", [flat])
    client.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_tritons_http_client_may_compress(
    server: Server, body: bytes, own: dict[str, Any], encoding: str
) -> None:
    image = triton.InferInput("image", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[body]], dtype=object), binary_data=True)
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    answer = client.infer("tiny", [image], request_compression_algorithm=encoding)
    np.testing.assert_allclose(answer.as_numpy("p_value"), [own["detail"]["p_value"]], rtol=1e-5)
    client.close()


def test_curl_may_send_a_compressed_body(
    server: Server, body: bytes, own: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.png.gz").write_bytes(gzip.compress(body))
    command = ["curl", "-s", "-T", "a.png.gz", "-H", "Content-Encoding: gzip", server.url]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == own


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_kserves_own_client(
    server: Server, pixels: np.ndarray, body: bytes, own: dict[str, Any], version: str
) -> None:
    assert_kserves_client_gets(own, server.root, version, pixels, body)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Messages and stub, generated as a client would generate them."""
    folder = tmp_path_factory.mktemp("grpc")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{here}", "inference.proto"]
    command += [f"--python_out={folder}", f"--grpc_python_out={folder}"]
    subprocess.run(command, check=True, cwd=here)
    sys.path.insert(0, str(folder))
    try:
        names = ("inference_pb2", "inference_pb2_grpc")
        messages, service = (importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(str(folder))
    return messages, service


def test_grpc(server: Server, stubs: tuple[Any, Any], body: bytes, own: dict[str, Any]) -> None:
    messages, service = stubs
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        ask = service.InferenceAPIsServiceStub(channel).Predictions
        for name, data in (("data", body), ("body", body)):
            request = messages.PredictionsRequest(model_name="tiny", input={name: data})
            assert json.loads(ask(request, timeout=60).prediction) == own
        # TorchServe's gRPC knows no status of a request: what is wrong stands in the answer.
        request = messages.PredictionsRequest(model_name="tiny", input={"data": b"hello"})
        assert json.loads(ask(request, timeout=60).prediction)["code"] == 415


def test_request_ids_and_traces_come_back(server: Server, body: bytes) -> None:
    known = {"X-Request-Id": "q-1", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad-01"}
    for data, status in ((body, 200), (b"hello", 415)):
        answer = requests.post(server.url, data=data, headers=known, timeout=60)
        assert answer.status_code == status
        assert answer.headers["X-Client-Request-Id"] == "q-1"
        assert answer.headers["X-Request-Id"] != "q-1"  # TorchServe's own
        assert answer.headers["traceparent"] == known["traceparent"]
    odd = requests.post(server.url, data=body, headers={"traceparent": "a b"}, timeout=60)
    assert odd.status_code == 200 and "traceparent" not in odd.headers
