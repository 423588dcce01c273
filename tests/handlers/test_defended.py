"""The handler, most of it inside a real TorchServe over HTTP."""

import base64
import hashlib
import http.client
import itertools
import json
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import requests
from conftest import Server, forget_peak, peak_memory
from onnx import TensorProto, helper
from PIL import Image
from test_image import huge_png

from export import precision
from export.archive import archive
from handlers import defended
from handlers.defended import NEEDED, DefendedHandler, threads_for, verify
from handlers.engine import Engine
from handlers.image import MAX_PIXELS, ImageError, default_pixels
from handlers.open_inference import Answer
from handlers.protocol import Request
from handlers.summary import summary
from handlers.verdict import p_values
from hardening import report
from hardening.calibrate import load_variant
from hardening.data import Images

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves its version file open
    from ts.context import Context, RequestProcessor
    from ts.utils.util import list_classes_from_module

Encode = Callable[..., bytes]
CLASSES = 10


def png(image: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def post(server: Server, body: bytes, **headers: str) -> requests.Response:
    return requests.post(server.url, data=body, headers=headers, timeout=60)


def frames(encode: Encode, pixels: np.ndarray, format: str) -> bytes:
    return encode(pixels, format, save_all=True, append_images=[Image.fromarray(255 - pixels)])


def rows(encode: Encode, pixels: np.ndarray) -> Iterator[tuple[str, bytes, int]]:
    """What an image may be: (row, body, status)."""
    colour = Image.fromarray(pixels)
    hidden = colour.convert("RGBA")
    hidden.putalpha(254)
    turned = Image.Exif()
    turned[0x0112] = 6
    gray16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    yield "empty body", b"", 422
    for format in ("PNG", "JPEG", "WEBP"):
        whole = encode(pixels, format)
        yield f"plain {format}", whole, 200
        yield f"truncated {format}", whole[: len(whole) // 2], 422
        yield f"oriented {format}", encode(pixels, format, exif=turned), 200
    yield "corrupt", encode(pixels)[:60] + b"rampart!" * 8, 422
    yield "text", b"hello", 415
    for format in ("GIF", "BMP", "TIFF"):
        yield format, encode(pixels, format), 415
    yield "above 16 million pixels", encode(Image.new("L", (4097, 4096))), 413
    yield "16 million pixels as a PNG", encode(Image.new("L", (4096, 4096))), 413
    yield "16 million pixels as a JPEG", encode(Image.new("L", (4096, 4096)), "JPEG"), 200
    yield "aspect above 20", encode(Image.new("RGB", (210, 10))), 422
    yield "animated PNG", frames(encode, pixels, "PNG"), 422
    yield "animated WebP", frames(encode, pixels, "WEBP"), 422
    yield "JPEG with a preview", frames(encode, pixels, "MPO"), 200
    yield "alpha below 255", encode(hidden), 422
    yield "transparent palette", encode(colour.quantize(16), transparency=3), 422
    yield "opaque alpha", encode(colour.convert("RGBA")), 200
    yield "grayscale", encode(colour.convert("L")), 200
    yield "palette", encode(colour.quantize(16)), 200
    yield "CMYK", encode(colour.convert("CMYK"), "JPEG"), 200
    yield "16-bit", encode(gray16), 200
    yield "larger", encode(colour.resize((300, 200))), 200
    yield "smaller", encode(colour.resize((7, 9))), 200


def test_every_row_of_what_an_image_may_be_is_answered_by_the_same_worker(
    server: Server, encode: Encode, pixels: np.ndarray
) -> None:
    workers = server.worker_pids()
    for row, body, status in rows(encode, pixels):
        answer = post(server, body)
        assert answer.status_code == status, row
        assert answer.headers["Content-Type"] == "application/json", row
        content = answer.json()
        if status == 200:
            assert content["decision"] in ("accept", "flag"), row
        else:
            assert content["code"] == status and content["type"] and content["message"], row
    assert server.worker_pids() == workers


def test_a_png_of_144_megapixels_is_refused_fast_and_with_flat_memory(server: Server) -> None:
    body = huge_png(12_000)
    assert len(body) < 1_000_000
    (worker,) = server.worker_pids()
    before, times = forget_peak(worker), []
    for _ in range(3):
        began = time.monotonic()
        answer = post(server, body)
        times.append(time.monotonic() - began)
        assert (answer.status_code, answer.json()["type"]) == (413, "too_many_pixels")
    assert min(times) < 0.5
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


def test_an_int8_archive_answers_over_http_as_its_graph_does(
    launch: Callable[..., Server], tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    precision.make(folder, "full", "int8", tiny_images, source="blobs", rate=0.05)
    made = {"full": {"sha256": precision.parts(folder, "full", "int8")}}
    report.write_card(folder, report.read_card(folder) | {"int8": made})
    archive(folder, tmp_path / "tiny.mar", precision="int8")
    with zipfile.ZipFile(tmp_path / "tiny.mar") as content:
        content.extract("graph.onnx", tmp_path)
    images = tiny_images.image[:8].numpy()
    own = Engine(tmp_path / "graph.onnx").run(images)
    table = load_variant(folder, "full", "int8")
    server = launch(tmp_path / "tiny.mar")
    assert "Rampart is ready" in server.read(), server.lines
    answers = [post(server, png(image)).json() for image in images]
    assert [answer["index"] for answer in answers] == own.logits.argmax(1).tolist()
    seen = [answer["detail"]["p_value"] for answer in answers]
    np.testing.assert_allclose(seen, p_values(own.scores, table), atol=2e-3)
    assert server.end() == 0


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
    handler, made = DefendedHandler(), context(unpacked, requests=3)
    handler.initialize(made)
    made.request_processor[0] = RequestProcessor({"describe": "True", "url_path": ""})
    batch = [{"body": body}, {"body": body}, {"body": b"hello"}]
    labels = [json.loads(answer).get("label") for answer in handler.handle(batch, made)]
    assert labels == [own["label"], own["label"], None]


def test_pictures_of_one_request_that_are_too_large_together_get_an_error_in_their_place(
    server: Server, encode: Encode
) -> None:
    b64 = base64.b64encode(encode(Image.effect_noise((1900, 1900), 9), "JPEG")).decode()
    body = json.dumps({"instances": [{"b64": b64}] * 7})
    answers = post(server, body.encode()).json()["predictions"]
    assert ["label" in answer for answer in answers] == [True] * 4 + [False] * 3
    assert {answer["type"] for answer in answers[4:]} == {"too_many_pixels"}


def test_an_error_does_not_hold_the_picture_it_is_about(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(7)
    out = BytesIO()
    image.save(out, "PNG")
    (picture,) = defended.examined([out.getvalue()], 32, MAX_PIXELS)
    error = defended.pixels_of(picture, 32)
    assert isinstance(error, ImageError) and error.type == "transparent_image"
    assert error.__traceback__ is error.__context__ is error.__cause__ is None


def test_the_archive_names_model_and_version_in_each_verdict(
    server: Server, pixels: np.ndarray
) -> None:
    assert post(server, png(pixels)).json()["model"] == {"name": "tiny", "version": "1.0"}


def test_handlers_do_not_import_torch() -> None:
    modules = ("image", "engine", "verdict", "protocol", "defended", "launch")
    code = "".join(f"import handlers.{name}\n" for name in modules)
    code += "import sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(defended.__file__).parents[1])


def test_torchserve_finds_exactly_one_class_in_the_handler_file() -> None:
    assert list_classes_from_module(defended) == [DefendedHandler]


def test_an_archive_carries_every_needed_file_with_its_hash(unpacked: Path) -> None:
    listed = json.loads((unpacked / "sha256.json").read_text())
    assert set(NEEDED) <= set(listed)
    verify(unpacked)


@pytest.mark.parametrize("name", NEEDED)
def test_a_changed_file_is_named(unpacked: Path, name: str) -> None:
    path = unpacked / name
    original = path.read_bytes()
    try:
        path.write_bytes(original + b" ")
        with pytest.raises(ValueError, match=f"{name} is not the file that was packed"):
            verify(unpacked)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing from the archive"):
            verify(unpacked)
    finally:
        path.write_bytes(original)


def test_an_unlisted_needed_file_is_named(unpacked: Path) -> None:
    path = unpacked / "sha256.json"
    original = path.read_text()
    listed = json.loads(original)
    try:
        path.write_text(json.dumps({key: listed[key] for key in listed if key != "graph.onnx"}))
        with pytest.raises(ValueError, match=r"graph\.onnx is not listed in sha256\.json"):
            verify(unpacked)
        path.unlink()
        with pytest.raises(ValueError, match=r"sha256\.json is missing"):
            verify(unpacked)
    finally:
        path.write_text(original)


def test_threads_come_from_environment_settings_or_the_share_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAMPART_THREADS", raising=False)
    monkeypatch.setattr(defended, "available_cores", lambda: 8)
    assert [threads_for(workers, {}) for workers in (1, 3, 8, 9)] == [8, 2, 1, 1]
    assert threads_for(1, {"threads": 3}) == 3
    monkeypatch.setenv("RAMPART_THREADS", "5")
    assert threads_for(1, {"threads": 3}) == 5


@pytest.fixture
def moody_handler(tmp_path: Path, unpacked: Path) -> DefendedHandler:
    """A loaded handler whose graph gives NaN logits for a picture of mean brightness over 200."""
    names = [("logits", CLASSES), ("raw_logits", CLASSES), ("scores", 7)]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["limit", "mean"], ["margin"]),
        helper.make_node("Sqrt", ["margin"], ["root"]),  # NaN below zero
        helper.make_node("Unsqueeze", ["root", "one"], ["column"]),
        helper.make_node("Identity", ["image"], ["purified"]),
    ]
    nodes += [helper.make_node("Mul", ["column", f"w_{name}"], [name]) for name, _ in names]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("limit", TensorProto.FLOAT, [1], [200.0]),
    ]
    constants += [
        helper.make_tensor(f"w_{name}", TensorProto.FLOAT, [1, width], [0.0] * width)
        for name, width in names
    ]
    shape = ["n", 32, 32, 3]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in names
    ]
    outputs.append(helper.make_tensor_value_info("purified", TensorProto.UINT8, shape))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, shape)
    graph = helper.make_graph(nodes, "moody", [image], outputs, constants)
    path = tmp_path / "graph.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    handler = DefendedHandler()
    handler.initialize(context(unpacked))
    handler._engine = Engine(path, "cpu", 1)
    return handler


def context(folder: Path, requests: int = 0) -> Context:
    """TorchServe's own context, as a worker makes it."""
    manifest = {"model": {"modelVersion": "1.0"}}
    config = {"rampart": {"false_alarm_rate": 0.05}}
    made = Context("tiny", str(folder), manifest, 8, None, "0.12.0", model_yaml_config=config)
    made.request_processor = [RequestProcessor({}) for _ in range(requests)]
    return made


def test_an_image_on_which_the_graph_fails_is_500_and_the_rest_of_its_batch_200(
    moody_handler: DefendedHandler, unpacked: Path
) -> None:
    dark, bright = (png(np.full((32, 32, 3), value, dtype=np.uint8)) for value in (50, 250))
    made = context(unpacked, requests=4)
    batch = [{"body": body} for body in (dark, bright, b"hello", dark)]
    answers = [json.loads(answer) for answer in moody_handler.handle(batch, made)]
    statuses = [made.get_response_status(index)[0] for index in range(4)]
    assert statuses == [200, 500, 415, 200]
    assert answers[1]["type"] == "engine_failure" and "CUDA" not in answers[1]["message"]
    assert answers[0]["label"] == answers[3]["label"]


def test_an_engine_that_always_fails_gives_each_request_500(
    moody_handler: DefendedHandler, unpacked: Path, pixels: np.ndarray
) -> None:
    def broken(images: np.ndarray) -> None:
        raise RuntimeError("CUDA error: out of memory")

    moody_handler._engine = SimpleNamespace(run=broken)
    made = context(unpacked, requests=3)
    answers = moody_handler.handle([{"body": png(pixels)}] * 2 + [{"body": b""}], made)
    assert [json.loads(answer)["code"] for answer in answers] == [500, 500, 422]
    assert all(b"CUDA" not in answer for answer in answers)


def test_a_reply_that_cannot_be_made_fails_its_own_request_alone() -> None:
    def broken(answers: object) -> Answer:
        raise TypeError("secret")

    code, body = defended._replied(Request([], broken), [])
    assert code == body["code"] == 500 and "secret" not in body["message"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_detection": "shrug"}, "on_detection must be flag, reject or shadow"),
        ({"false_alarm": 0.1}, "unknown rampart setting"),
        ({"false_alarm_rate": 1e-9}, "cannot tell a false_alarm_rate"),
        ({"max_pixels": 10}, "max_pixels must be a whole number from 1024"),
        ({"device": "tpu"}, "choose one of cpu, cuda, tensorrt, auto"),
    ],
)
def test_settings_that_cannot_be_served_fail_the_load_in_one_line(
    unpacked: Path, settings: dict[str, object], message: str
) -> None:
    made = context(unpacked)
    made.model_yaml_config = {"rampart": settings}
    with pytest.raises(
        ValueError, match=f"Rampart cannot serve this archive: .*{message}"
    ) as error:
        DefendedHandler().initialize(made)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", b'["one", "two"]', "do not fit 2 labels"),
        ("graph.onnx", b"no graph", r"graph\.onnx"),
        ("calibration.json", b"{}", r"calibration\.json: the entry 'detectors' is missing"),
    ],
)
def test_files_that_are_listed_but_do_not_fit_fail_the_load_in_one_line(
    unpacked: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unpacked, folder)
    (folder / name).write_bytes(content)
    listed = json.loads((folder / "sha256.json").read_text())
    listed[name] = hashlib.sha256(content).hexdigest()
    (folder / "sha256.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=f"Rampart cannot serve this archive: .*{message}") as told:
        DefendedHandler().initialize(context(folder))
    assert "\n" not in str(told.value)


def test_concurrent_requests_share_runs_of_the_graph(server: Server, pixels: np.ndarray) -> None:
    def images_and_runs() -> tuple[float, float]:
        time.sleep(2.5)  # figures are handed over once a second
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

    body, before = png(pixels), images_and_runs()
    with ThreadPoolExecutor(32) as pool:
        statuses = set(pool.map(lambda _: post(server, body).status_code, range(400)))
    images, runs = np.subtract(images_and_runs(), before)
    assert statuses == {200} and images == 400
    assert runs < 200
