"""An archive as the model of KServe's real ModelServer."""

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import requests
import tritonclient.grpc
from alike import assert_noticed, watchful
from kserve_server import KServe
from peers import assert_kserves_client_gets, assert_tritons_client_gets
from sent import Sent, ask, half_sent, overload
from servers import Server, certificate_and_key
from tritonclient.utils import InferenceServerException

from rampart.handlers.service import Service
from rampart.handlers.types import Incoming

feature = pytest.mark.feature

pytestmark = pytest.mark.server
Encode = Callable[..., bytes]
OUTPUTS = ("label", "index", "confidence", "decision", "p_value")
# What KServe answers by itself: it makes text of a binary BYTES tensor, and reads all that has no
# content type as JSON.
OWN = {"v2 binary", "raw on v1"}


@pytest.fixture(scope="module")
def kserve(tiny_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KServe]:
    server = KServe(tiny_archive, tmp_path_factory.mktemp("kserve"), RAMPART_EXPLAIN="true")
    server.wait()
    yield server
    assert server.end() == 0


@pytest.fixture(scope="module")
def client(kserve: KServe) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{kserve.grpc}") as client:
        yield client


@feature("Same verdicts as every other server", "KServe")
@feature("KServe v1", "KServe")
@feature("Open Inference v2, JSON", "KServe")
@feature("A bad picture does not affect the others", "KServe")
def test_kserve_gives_the_answers_of_our_own_front(
    kserve: KServe, front: Server, requests_of_all_kinds: dict[str, Sent]
) -> None:
    compared = set()
    for name, sent in requests_of_all_kinds.items():
        if sent[0].startswith("/predictions") or name in OWN:
            continue
        status, theirs, _ = ask(kserve.root, sent)
        expected, ours, _ = ask(front.root, sent)
        theirs = theirs if status == 200 else theirs.get("detail", theirs)
        assert (status, plain(theirs)) == (expected, plain(ours)), name
        compared.add(name)
    assert {"v1", "v1 of many", "v1 without instances", "v2", "v2 of pixels"} <= compared


def plain(answer: Any) -> Any:
    """An answer without KServe's own fields, its numbers in FP32, as KServe packs them."""
    if isinstance(answer, dict):
        return {k: plain(v) for k, v in answer.items() if v is not None}
    if isinstance(answer, list):
        return [plain(one) for one in answer]
    return float(np.float32(answer)) if isinstance(answer, float) else answer


@feature("Raw pictures and forms", "KServe")
def test_a_raw_picture_gets_the_plain_verdict_where_its_type_is_told(
    kserve: KServe, front: Server, encode: Encode, pixels: np.ndarray
) -> None:
    sent = ("/v1/models/tiny:predict", encode(pixels), {"Content-Type": "image/png"})
    expected = requests.post(front.url, encode(pixels), timeout=10).json()
    assert ask(kserve.root, sent)[:2] == (200, expected)


@feature("Open Inference v2, binary tensors", "KServe")
def test_tritons_http_client_sends_pixels_in_binary(
    kserve: KServe, front: Server, encode: Encode, pixels: np.ndarray
) -> None:
    verdict = requests.post(front.url, encode(pixels), timeout=10).json()
    assert_tritons_client_gets(verdict, kserve.port, pixels, binary=True)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_kserves_own_client(
    kserve: KServe, front: Server, encode: Encode, pixels: np.ndarray, version: str
) -> None:
    verdict = requests.post(front.url, encode(pixels), timeout=10).json()
    assert_kserves_client_gets(verdict, kserve.root, version, pixels, encode(pixels))


def test_curl(
    kserve: KServe, front: Server, encode: Encode, pixels: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(encode(pixels))
    url = f"{kserve.root}/v1/models/tiny:predict"
    command = ["curl", "-s", "-H", "Content-Type: image/png", "--data-binary", "@a.png", url]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == requests.post(front.url, encode(pixels), timeout=10).json()


@feature("Explanations", "KServe")
def test_v1_explains_to_who_asks_and_sends_no_header_back(
    kserve: KServe, encode: Encode, pixels: np.ndarray
) -> None:
    text = base64.b64encode(encode(pixels)).decode()
    url, token = f"{kserve.root}/v1/models/tiny:explain", {"Authorization": "Bearer secret"}
    answer = requests.post(url, json={"instances": [{"b64": text}]}, headers=token, timeout=30)
    content = answer.json()
    assert np.array(content["explanations"][0]["label"]["effect"]).shape == (8, 8)
    plain = requests.post(url.replace("explain", "predict"), json={"instances": [{"b64": text}]})
    assert plain.json() == {"predictions": content["predictions"]}
    assert {name.lower() for name in answer.headers} == {name.lower() for name in plain.headers}
    two = requests.post(url, json={"instances": [{"b64": text}] * 2}, timeout=30)
    assert (two.status_code, two.json()["detail"]["type"]) == (422, "explain_one")


@feature("Open Inference v2, gRPC", "KServe")
@feature("Compressed bodies", "KServe")
@pytest.mark.parametrize("packing", [None, "gzip"])
def test_verdicts_over_grpc_are_the_services_packed_as_the_request_is(
    client: Any, unpacked: Path, encode: Encode, pixels: np.ndarray, packing: str | None
) -> None:
    service = Service.open(unpacked, name="tiny", version="1.0")
    picture = encode(np.tile(pixels, (3, 4, 1)), "JPEG")
    expected = [
        json.loads(service.answer([Incoming({}, [one])])[0].body)
        for one in (picture, encode(pixels))
    ]
    encoded = tritonclient.grpc.InferInput("image", [1], "BYTES")
    encoded.set_data_from_numpy(np.array([picture], dtype=object))
    decoded = tritonclient.grpc.InferInput("image", [1, 32, 32, 3], "UINT8")
    decoded.set_data_from_numpy(pixels[None])
    for tensor, verdict in zip((encoded, decoded), expected, strict=True):
        result = client.infer("tiny", [tensor], request_id="7", compression_algorithm=packing)
        assert result.get_response().id == "7"
        label, index, confidence, decision, p_value = (result.as_numpy(name)[0] for name in OUTPUTS)
        assert (label.decode(), index) == (verdict["label"], verdict["index"])
        assert decision.decode() == verdict["decision"]
        assert confidence == pytest.approx(verdict["confidence"], abs=1e-5)
        assert p_value == pytest.approx(verdict["detail"]["p_value"], abs=1e-5)


def test_faults_over_grpc_have_our_message_and_status(client: Any) -> None:
    tensor = tritonclient.grpc.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"no picture"], dtype=object))
    with pytest.raises(InferenceServerException, match="not a JPEG, PNG or WebP") as error:
        client.infer("tiny", [tensor])
    assert error.value.status() == str(grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(InferenceServerException, match="exactly one input"):
        client.infer("tiny", [tensor, tensor])


@feature("Protocol health and metadata", "KServe")
@feature("Prometheus metrics", "KServe")
def test_health_metadata_and_figures_are_told(kserve: KServe, client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    told = requests.get(f"{kserve.root}/v2/models/tiny", timeout=10).json()
    assert [one["name"] for one in told["outputs"]] == list(OUTPUTS)
    assert told["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]

    def counted() -> float:
        text = requests.get(f"{kserve.root}/metrics", timeout=10).text
        name = 'rampart_requests_total{model="tiny",status="415"}'
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = counted()
    path = f"{kserve.root}/v1/models/tiny:predict"
    answer = requests.post(path, b"text", headers={"Content-Type": "image/png"}, timeout=10)
    assert answer.status_code == 415 and counted() == before + 1


def figure(kserve: KServe, name: str) -> float:
    """One of our figures."""
    text = requests.get(f"{kserve.root}/metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@feature("Batches across clients", "KServe")
def test_requests_of_several_clients_share_runs_of_the_graph(
    kserve: KServe, encode: Encode, pixels: np.ndarray
) -> None:
    url, body = f"{kserve.root}/v1/models/tiny:predict", encode(np.tile(pixels, (20, 20, 1)))
    kind = {"Content-Type": "image/png"}

    def images_and_runs() -> np.ndarray:
        return np.array([figure(kserve, f"rampart_batch_images_{one}") for one in ("sum", "count")])

    before = images_and_runs()
    with ThreadPoolExecutor(16) as pool:
        tasks = [pool.submit(requests.post, url, body, headers=kind) for _ in range(200)]
        assert {task.result().status_code for task in tasks} == {200}
    images, runs = images_and_runs() - before
    assert images == 200 and runs < 150


@feature("Overload is refused at once with 503 and Retry-After", "KServe")
@feature("Graceful shutdown: requests received are answered", "KServe")
def test_too_many_are_told_when_to_come_again_and_what_has_come_is_answered_before_the_end(
    tiny_archive: Path, tmp_path: Path, encode: Encode, pixels: np.ndarray
) -> None:
    server = KServe(tiny_archive, tmp_path)
    server.wait()
    url, kind = f"{server.root}/v1/models/tiny:predict", {"Content-Type": "image/jpeg"}
    large = encode(np.zeros((1500, 1500, 3), np.uint8), "JPEG")  # which takes long to decode
    answers = overload(url, large, psutil.Process(server.pid), headers=kind)
    refused = [answer for answer in answers if not answer.ok]
    assert 0 < len(refused) <= 100
    for answer in refused:
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["detail"]["type"] == "busy"
    path = "/v1/models/tiny:predict"
    line = half_sent(server.port, path, encode(pixels), server.terminate)
    assert line == b"HTTP/1.1 200 OK"
    assert server.finish() == 0


@feature("TLS", "KServe")
def test_kserve_serves_by_tls(
    tiny_archive: Path, tmp_path: Path, encode: Encode, pixels: np.ndarray
) -> None:
    certificate, key = map(str, certificate_and_key(tmp_path))
    files = ("--ssl_certfile", certificate, "--ssl_keyfile", key, "--enable_grpc", "false")
    server = KServe(tiny_archive, tmp_path, *files)
    server.root = f"https://127.0.0.1:{server.port}"
    server.wait(verify=certificate)
    url, kind = f"{server.root}/v1/models/tiny:predict", {"Content-Type": "image/png"}
    assert requests.post(url, encode(pixels), headers=kind, verify=certificate, timeout=10).ok
    assert server.end() == 0


@feature("Query attacks are noticed", "KServe")
def test_query_attacks_are_noticed(tmp_path: Path, tiny_shipped: Path) -> None:
    archive = watchful(tiny_shipped, tmp_path)
    server = KServe(archive, tmp_path, RAMPART_QUERY_STORE=str(tmp_path / "queries"))
    server.wait()

    def decide(picture: bytes) -> str:
        instances = {"instances": [{"b64": base64.b64encode(picture).decode()}]}
        path = f"{server.root}/v1/models/tiny:predict"
        (verdict,) = requests.post(path, json=instances, timeout=30).json()["predictions"]
        return str(verdict["decision"])

    assert_noticed(decide)
    text = requests.get(f"{server.root}/metrics", timeout=10).text
    assert 'rampart_query_alerts_total{model="tiny",response="reject"} 12.0' in text
    assert 'rampart_query_store_up{model="tiny"} 1.0' in text
    assert server.end() == 0


def test_an_archive_that_is_none_is_told_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_bytes(b"none")
    server = KServe(tmp_path / "a.mar", tmp_path)
    assert server.finish() == 1
    assert server.log().splitlines()[-1].endswith("is not a Rampart archive: rebuild it")
    assert "Traceback" not in server.log()
