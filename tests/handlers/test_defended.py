"""TorchServe's side: what only a real server shows, and what the handler makes of its requests."""

import base64
import http.client
import itertools
import json
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from inprocess import png
from servers import Server, forget_peak, peak_memory
from test_image import huge_png

from rampart.handlers import defended
from rampart.handlers.defended import DefendedHandler, incoming
from rampart.handlers.engine import Engine
from rampart.handlers.image import default_pixels
from rampart.handlers.protocols.choice import read
from rampart.handlers.summary import summary
from rampart.handlers.wire import TOO_MANY
from rampart.hardening.model.images import Images

feature = pytest.mark.feature

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves its version file open
    from ts.context import Context, RequestProcessor
    from ts.utils.util import list_classes_from_module

PICTURE = b"\x89PNG\r\n\x1a\n and so on"
B64 = base64.b64encode(PICTURE).decode()


def post(server: Server, body: bytes, **headers: str) -> requests.Response:
    return requests.post(server.url, data=body, headers=headers, timeout=60)


def test_a_png_of_144_megapixels_is_refused_before_it_is_decoded(server: Server) -> None:
    body = huge_png(12_000)
    assert len(body) < 1_000_000
    (worker,) = server.worker_pids()
    before = forget_peak(worker)
    answer = post(server, body)
    assert (answer.status_code, answer.json()["type"]) == (413, "too_many_pixels")
    assert peak_memory(worker) - before < 16_000
    assert server.worker_pids() == [worker]


def test_a_body_over_the_limit_is_refused_by_the_front_end(server: Server) -> None:
    workers = server.worker_pids()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", "/predictions/tiny")
    connection.putheader("Content-Length", "6553501")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (413, b"")
    connection.close()
    assert server.worker_pids() == workers


def test_raw_multipart_and_json_agree(server: Server, pixels: np.ndarray) -> None:
    body = png(pixels)
    b64 = base64.b64encode(body).decode()
    raw = post(server, body).json()
    answers = [
        post(server, body, **{"Content-Type": "image/png"}),
        requests.put(server.url, data=body, timeout=60),
        requests.post(server.url, files={"image": ("a.png", body, "image/png")}, timeout=60),
        requests.post(server.url, json={"instances": [{"b64": b64}]}, timeout=60),
        post(server, json.dumps({"instances": [{"b64": b64}]}).encode()),
        requests.post(server.url, data=body, params={"image": "x", "body": "y"}, timeout=60),
    ]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.json() == raw


def test_several_images_are_answered_in_order_with_errors_in_place(
    server: Server, pixels: np.ndarray
) -> None:
    first, last = pixels, np.ascontiguousarray(255 - pixels)
    bodies = [png(first), b"hello", png(last)]
    expected = [post(server, body).json() for body in bodies]
    json_body = {"instances": [{"b64": base64.b64encode(body).decode()} for body in bodies]}
    files = {str(index): ("a", body, "image/png") for index, body in enumerate(bodies)}
    for answer in (
        requests.post(server.url, json=json_body, timeout=60),
        requests.post(server.url, files=files, timeout=60),
    ):
        assert answer.status_code == 200
        assert answer.json() == {"predictions": expected}
    assert expected[1]["code"] == 415


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 415),
        (b"7", "application/json", 415),
        (b'{"instances": [3]}', "application/json", 422),
        (b"a=1&b=2", "application/x-www-form-urlencoded", 415),
        (b"hello", "text/plain", 415),
    ],
)
def test_bodies_without_images_are_refused_with_a_message(
    server: Server, body: bytes, content_type: str, status: int
) -> None:
    answer = post(server, body, **{"Content-Type": content_type})
    assert answer.status_code == status
    assert answer.json()["message"]


def test_good_requests_among_bad_ones_on_64_connections_are_all_right(
    server: Server, unpacked: Path, tiny_images: Images
) -> None:
    """1,000 requests, every fourth bad."""
    images = tiny_images.image[:100].numpy()
    labels = Engine(unpacked / "graph.onnx").run(images).logits.argmax(axis=1).tolist()
    good = [png(image) for image in images]
    bad = [b"", b"hello", good[0][:40], good[0][:100], b'{"instances": 1}']

    def client(number: int) -> list[tuple[int, int, Any]]:
        answers = []
        with requests.Session() as session:
            for index in range(number, 1_000, 64):
                body = bad[index // 4 % len(bad)] if index % 4 == 3 else good[index % 100]
                answer = session.post(server.url, data=body, timeout=120)
                answers.append((index, answer.status_code, answer.json()))
        return answers

    workers = server.worker_pids()
    with ThreadPoolExecutor(64) as pool:
        answers = [answer for part in pool.map(client, range(64)) for answer in part]
    assert sorted(index for index, _, _ in answers) == list(range(1_000))
    for index, status, content in answers:
        if index % 4 == 3:
            assert 400 <= status < 500 and content["code"] == status
        else:
            assert (status, content["index"]) == (200, labels[index % 100])
    assert server.worker_pids() == workers


def test_describe_gives_a_summary_of_the_card(server: Server, unpacked: Path) -> None:
    answer = requests.get(
        server.management, params={"customized": "true"}, headers=server.token, timeout=60
    )
    card = json.loads((unpacked / "card.json").read_text())
    told = answer.json()[0]["customizedMetadata"]
    assert told == summary(card) and told["max_pixels"] == default_pixels(32)


def test_a_client_that_asks_for_a_description_harms_nobody(
    server: Server, unpacked: Path, pixels: np.ndarray
) -> None:
    body = png(pixels)
    own = post(server, body).json()
    assert post(server, body, describe="True").json() == own
    empty = {"application/x-www-form-urlencoded": b"", "multipart/form-data; boundary=x": b"--x--"}
    routes = (
        server.url,
        f"{server.root}/v1/models/tiny:predict",
        f"{server.root}/v2/models/tiny/infer",
    )
    for url, (kind, nothing) in itertools.product(routes, empty.items()):
        headers = {"describe": "True", "Content-Type": kind}
        answer = requests.post(url, nothing, headers=headers, timeout=60)
        assert answer.status_code >= 400 and "metrics" not in answer.text
    handler, worker = DefendedHandler(), context(unpacked, requests=3)
    handler.initialize(worker)
    worker.request_processor[0] = RequestProcessor({"describe": "True", "url_path": ""})
    batch = [{"body": body}, {"body": body}, {"body": b"hello"}]
    labels = [json.loads(answer).get("label") for answer in handler.handle(batch, worker)]
    assert labels == [own["label"], own["label"], None]
    assert [worker.get_response_status(index)[0] for index in range(3)] == [200, 200, 415]


def test_torchserve_finds_exactly_one_class_in_the_handler_file() -> None:
    assert list_classes_from_module(defended) == [DefendedHandler]


def context(folder: Path, requests: int = 0) -> Context:
    """TorchServe's own context, as a worker makes it."""
    manifest = {"model": {"modelVersion": "1.0"}}
    config = {"rampart": {"false_alarm_rate": 0.05}}
    worker = Context("tiny", str(folder), manifest, 8, None, "0.12.0", model_yaml_config=config)
    worker.request_processor = [RequestProcessor({}) for _ in range(requests)]
    return worker


def images(fields: dict[str, object], headers: dict[str, object] | None = None) -> list[object]:
    return list(read(incoming(fields, headers or {})).images)


@pytest.mark.parametrize("name", ["body", "data"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_raw_body_is_the_image(name: str, kind: type) -> None:
    assert images({name: kind(PICTURE)}) == [PICTURE]


def test_multipart_files_come_in_order() -> None:
    headers: dict[str, object] = {n: {"content-type": "image/png"} for n in ("first", "second")}
    assert images({"first": b"1", "second": bytearray(b"2")}, headers) == [b"1", b"2"]


def test_query_parameters_and_plain_form_fields_are_no_images() -> None:
    headers: dict[str, object] = {n: {"content-type": ""} for n in ("note", "body")}
    assert images({"note": bytearray(b"hello"), "body": PICTURE}, headers) == [PICTURE]
    assert images({"data": bytearray(b"hello"), "body": PICTURE}) == [PICTURE]
    assert incoming({"note": bytearray(b"hello")}, headers).parts == []


@pytest.mark.parametrize("form", ["parsed", "bytes", "text"])
def test_json_is_read_in_every_form_torchserve_gives(form: str) -> None:
    body = {"instances": [{"b64": B64}, {"b64": ""}]}
    text = json.dumps(body)
    forms = {"parsed": body, "bytes": bytearray(text.encode()), "text": text}
    assert images({"body": forms[form]}) == [PICTURE, b""]


def test_the_route_shows_by_headers() -> None:
    assert incoming({"body": b""}, {"URL_path": ""}).route == "predictions"
    assert incoming({"body": b""}, {}).route == "v1"
    assert incoming({}, {"describe": "True"}).route == "describe"
    for name in ("url_path", "explain", "Content-Type"):
        assert incoming({}, {"describe": "True", name: ""}).route != "describe"
    assert incoming({"body": b""}, {"describe": "True"}).route != "describe"


def test_names_of_headers_become_lower_case_and_too_many_parts_a_refusal() -> None:
    request = incoming({TOO_MANY: b""}, {"Inference-Header-Content-Length": "7"})
    assert request.headers == {"inference-header-content-length": "7"}
    assert request.refusal is not None
    assert (request.refusal.code, request.refusal.type) == (413, "too_many_parts")


def test_a_stream_by_grpc_hears_that_it_ends_and_ids_come_back_under_a_name_of_ours(
    unpacked: Path,
) -> None:
    handler, worker = DefendedHandler(), context(unpacked, requests=2)
    handler.initialize(worker)
    worker.request_processor[1] = RequestProcessor({"Content-Length": "5", "X-Request-Id": "q-1"})
    handler.handle([{"data": b"hello"}, {"body": b"hello"}], worker)
    by_grpc, by_http = (worker.get_response_headers(index) for index in range(2))
    assert by_grpc["ts_stream_next"] == "false" and "ts_stream_next" not in by_http
    assert by_http["x-client-request-id"] == "q-1" and "x-request-id" not in by_http
    assert worker.get_response_content_type(1) == "application/json"


def test_an_archive_that_cannot_be_served_ends_the_worker_in_one_line(unpacked: Path) -> None:
    worker = context(unpacked)
    worker.model_yaml_config = {"rampart": {"on_detection": "shrug"}}
    with pytest.raises(
        ValueError, match="Rampart cannot serve this archive: on_detection"
    ) as error:
        DefendedHandler().initialize(worker)
    assert "\n" not in str(error.value)


@feature("Batches across clients", "TorchServe")
def test_concurrent_requests_share_runs_of_the_graph(server: Server, pixels: np.ndarray) -> None:
    def images_and_runs() -> tuple[float, float]:
        text = requests.get(f"http://127.0.0.1:{server.port + 2}/metrics", timeout=60).text
        found = [
            sum(
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith(f"rampart_batch_images_{part}{{")
            )
            for part in ("sum", "count")
        ]
        return found[0], found[1]

    def settled(images: float) -> tuple[float, float]:
        """Once so many images are told of, and then no more: they are handed over once a second."""
        end, seen = time.monotonic() + 60, (-1.0, -1.0)
        while seen != (now := images_and_runs()) or now[0] < images:
            assert time.monotonic() < end, now
            seen = now
            time.sleep(2.5)
        return seen

    body, before = png(pixels), settled(0)
    worker, statuses = psutil.Process(server.worker_pids()[0]), set[int]()
    with ThreadPoolExecutor(80) as pool:
        for _ in range(5):  # however slow this sender is, all have come when the worker goes on
            worker.suspend()
            sent = [pool.submit(post, server, body) for _ in range(80)]
            time.sleep(0.5)
            worker.resume()
            statuses |= {answer.result().status_code for answer in sent}
    images, runs = np.subtract(settled(before[0] + 400), before)
    assert statuses == {200} and images == 400
    assert runs < 200
