"""The service in this process: whatever a server hands over is answered, and alone."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from allowed import rows
from inprocess import ask, png, post
from onnx import TensorProto, helper
from PIL import Image

from rampart import handlers
from rampart.export.archive import archive
from rampart.handlers.budget import Budget
from rampart.handlers.engine import Engine
from rampart.handlers.http.bodies import TOO_LARGE
from rampart.handlers.image import default_pixels
from rampart.handlers.protocols.choice import read
from rampart.handlers.service import Service
from rampart.handlers.summary import summary
from rampart.handlers.telemetry import BOUNDS, Metrics
from rampart.handlers.types import Answer, Incoming, Request
from rampart.handlers.verdict import Calibration, p_values
from rampart.hardening.model.calibrate import load_variant
from rampart.hardening.train.data import Images

Encode = Callable[..., bytes]
CLASSES = 10
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad-01"


@pytest.fixture(scope="module")
def service(unpacked: Path) -> Service:
    return Service.open(unpacked, {"false_alarm_rate": 0.05}, name="tiny", version="1.0")


def test_every_row_of_what_an_image_may_be_is_answered(
    service: Service, encode: Encode, pixels: np.ndarray
) -> None:
    for row, body, status in rows(encode, pixels):
        reply = post(service, body)
        assert reply.status == status, row
        assert reply.headers == {"content-type": "application/json"}, row
        content = json.loads(reply.body)
        if status == 200:
            assert content["decision"] in ("accept", "flag"), row
            assert content["model"] == {"name": "tiny", "version": "1.0"}, row
        else:
            assert content["code"] == status and content["type"] and content["message"], row


def test_raw_bodies_parts_and_json_agree_in_order_with_errors_in_place(
    service: Service, pixels: np.ndarray
) -> None:
    bodies = [png(pixels), b"hello", png(np.ascontiguousarray(255 - pixels))]
    expected = [ask(service, body) for body in bodies]
    assert expected[1]["code"] == 415
    instances = [{"b64": base64.b64encode(body).decode()} for body in bodies]
    text = json.dumps({"instances": instances}).encode()
    assert ask(service, *bodies) == ask(service, text) == {"predictions": expected}
    text = json.dumps({"instances": instances[:1]}).encode()
    assert ask(service, text) == expected[0]
    assert ask(service, text, route="v1") == {"predictions": expected[:1]}


def test_open_inference_takes_pixels_and_pictures_and_repeats_the_id(
    service: Service, pixels: np.ndarray
) -> None:
    own = ask(service, png(pixels))
    picture = {"datatype": "BYTES", "shape": [1], "data": [base64.b64encode(png(pixels)).decode()]}
    raw = {"datatype": "UINT8", "shape": [1, 32, 32, 3], "data": pixels.ravel().tolist()}
    for tensor in (picture, raw):
        body = json.dumps({"id": "7", "inputs": [{"name": "image"} | tensor]}).encode()
        answer = ask(service, body, route="v2")
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "tiny", "1.0")
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        assert outputs["label"] == [own["label"]]
        assert outputs["p_value"] == [own["detail"]["p_value"]]


def test_request_ids_and_traces_come_back(service: Service, pixels: np.ndarray) -> None:
    for body in (png(pixels), b"hello"):
        reply = post(service, body, x_request_id="q-1", traceparent=TRACE)
        assert reply.headers["x-request-id"] == "q-1" and reply.headers["traceparent"] == TRACE
    for odd in ("a b", "a\r\nb", "", "x" * 257):
        reply = post(service, png(pixels), traceparent=odd)
        assert reply.status == 200 and "traceparent" not in reply.headers


def test_a_description_is_a_summary_of_the_card(service: Service, unpacked: Path) -> None:
    card = json.loads((unpacked / "card.json").read_text())
    assert ask(service, route="describe") == service.summary == summary(card)
    assert service.summary["max_pixels"] == default_pixels(32)


def test_a_description_beside_predictions_harms_nobody(
    service: Service, pixels: np.ndarray
) -> None:
    body = png(pixels)
    batch = [Incoming({}, [], "describe"), Incoming({}, [body]), Incoming({}, [b"hello"])]
    summed, verdict, error = (json.loads(reply.body) for reply in service.answer(batch))
    assert "metrics" in summed and verdict == ask(service, body) and error["code"] == 415


def test_without_a_name_or_settings_the_cards_name_and_the_defaults_count(
    unpacked: Path, pixels: np.ndarray
) -> None:
    service = Service.open(unpacked)
    answer = ask(service, png(pixels))
    assert answer["model"] == {"name": "tiny", "version": ""}
    assert "detail" in answer


def test_pictures_of_one_request_that_are_too_large_together_get_an_error_in_their_place(
    service: Service, encode: Encode
) -> None:
    b64 = base64.b64encode(encode(Image.effect_noise((1900, 1900), 9), "JPEG")).decode()
    answers = ask(service, json.dumps({"instances": [{"b64": b64}] * 7}).encode())["predictions"]
    assert ["label" in answer for answer in answers] == [True] * 4 + [False] * 3
    assert {answer["type"] for answer in answers[4:]} == {"too_many_pixels"}


def test_an_answer_that_is_too_long_says_so(
    service: Service, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.handlers.service.MAX_REPLY", 100)
    reply = post(service, png(pixels))
    assert (reply.status, json.loads(reply.body)["type"]) == (500, "reply_too_long")


def test_a_request_that_is_put_off_hears_when_to_come_again(
    service: Service, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.handlers.budget.BATCH_SECONDS", -1.0)
    reply = post(service, png(pixels))
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")


def test_an_int8_archive_answers_as_its_graph_does(tiny_images: Images, tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "model_store" / "cifar10"  # ships its int8 graph
    archive(folder, tmp_path / "a.mar", variant="lean", precision="int8")
    with zipfile.ZipFile(tmp_path / "a.mar") as content:
        content.extractall(tmp_path / "unpacked")
    images = tiny_images.image[:8].numpy()
    own = Engine(tmp_path / "unpacked" / "graph.onnx").run(images)
    service = Service.open(tmp_path / "unpacked")
    answers = [ask(service, png(image)) for image in images]
    assert [answer["index"] for answer in answers] == own.logits.argmax(1).tolist()
    p = [answer["detail"]["p_value"] for answer in answers]
    assert len(set(p)) == len(p)
    np.testing.assert_allclose(
        p, p_values(own.scores, load_variant(folder, "lean", "int8")), atol=2e-3
    )


def test_handlers_import_neither_torch_nor_torchserve() -> None:
    folder = Path(handlers.__file__).parent
    names = [file.relative_to(folder).with_suffix("").parts for file in folder.rglob("*.py")]
    modules = [".".join(("rampart.handlers", *name)) for name in sorted(names)]
    code = "".join(f"import {module}\n" for module in modules if not module.endswith("__init__"))
    code += "import sys\nassert not {'torch', 'ts'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder.parents[1])


def moody_graph(path: Path) -> Path:
    """A graph that gives NaN logits for a picture of mean brightness over 200."""
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
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def moody_service(tmp_path: Path, unpacked: Path) -> Service:
    service = Service.open(unpacked)
    service._engine = Engine(moody_graph(tmp_path / "graph.onnx"), "cpu", 1)
    return service


def test_an_image_on_which_the_graph_fails_is_500_and_the_rest_of_its_batch_200(
    moody_service: Service,
) -> None:
    dark, bright = (png(np.full((32, 32, 3), value, dtype=np.uint8)) for value in (50, 250))
    batch = [Incoming({}, [body]) for body in (dark, bright, b"hello", dark)]
    replies = moody_service.answer(batch)
    answers = [json.loads(reply.body) for reply in replies]
    assert [reply.status for reply in replies] == [200, 500, 415, 200]
    assert answers[1]["type"] == "engine_failure" and "CUDA" not in answers[1]["message"]
    assert answers[0]["label"] == answers[3]["label"]


def test_an_engine_that_always_fails_gives_each_request_500(
    moody_service: Service, pixels: np.ndarray
) -> None:
    def broken(images: np.ndarray) -> None:
        raise RuntimeError("CUDA error: out of memory")

    moody_service._engine = SimpleNamespace(run=broken)  # type: ignore[assignment]
    batch = [Incoming({}, [body]) for body in (png(pixels), png(pixels), b"")]
    replies = moody_service.answer(batch)
    assert [json.loads(reply.body)["code"] for reply in replies] == [500, 500, 422]
    assert all(b"CUDA" not in reply.body for reply in replies)


def test_requests_of_many_pictures_do_not_take_the_time_of_one_with_a_single_picture(
    unpacked: Path, pixels: np.ndarray
) -> None:
    service = Service.open(unpacked)
    now, engine = [0.0], service._engine
    service._budget = Budget(lambda: now[0])

    def slow(images: np.ndarray) -> Any:
        now[0] += 0.03 * len(images)
        return engine.run(images)

    service._engine = SimpleNamespace(run=slow)  # type: ignore[assignment]
    many = [Incoming({}, [png(pixels)] * 32) for _ in range(31)]
    replies = service.answer([*many, Incoming({}, [png(pixels)])])
    assert json.loads(replies[-1].body)["label"]
    assert [b"busy" in reply.body for reply in replies] == [False] * 10 + [True] * 21 + [False]


def test_a_request_that_is_refused_unread_counts_by_its_error(unpacked: Path) -> None:
    metrics = Metrics()
    service = Service.open(unpacked, metrics=metrics)
    metrics.take()
    service.refuse(Incoming({}, []), TOO_LARGE)
    assert metrics.take()["rampart_errors_total", ("body_too_large",)] == 1


def test_a_reply_that_cannot_be_made_fails_its_own_request_alone(
    service: Service, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(answers: object) -> Answer:
        raise TypeError("secret")

    def read_some(incoming: Incoming, *_: object) -> Request:
        return Request([], broken) if incoming.headers else read(incoming)

    monkeypatch.setattr("rampart.handlers.service.read", read_some)
    body = png(pixels)
    failure, success = service.answer([Incoming({"a": "b"}, [body]), Incoming({}, [body])])
    assert (failure.status, success.status) == (500, 200) and b"secret" not in failure.body


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_detection": "shrug"}, "on_detection must be flag, reject or shadow"),
        ({"false_alarm": 0.1}, "unknown rampart setting"),
        ({"false_alarm_rate": 1e-9}, "cannot support a false_alarm_rate"),
        ({"max_pixels": 10}, "max_pixels must be a whole number from 1024"),
        ({"device": "tpu"}, "choose one of cpu, cuda, tensorrt, auto"),
        ({"query_store": "ftp://x"}, "query_store must be a folder or redis://"),
    ],
)
def test_settings_that_cannot_be_served_fail_the_load_in_one_line(
    unpacked: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(
        ValueError, match=f"Rampart cannot serve this archive: .*{message}"
    ) as error:
        Service.open(unpacked, settings)
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
        Service.open(folder)
    assert "\n" not in str(told.value)


def test_requests_images_errors_and_p_values_are_counted(
    unpacked: Path, pixels: np.ndarray
) -> None:
    metrics, good = Metrics(), png(pixels)
    service = Service.open(unpacked, {}, metrics)
    before = metrics.take()
    assert before["rampart_engine_info", ("cpu", "fp32", "full")] == 1
    assert before["rampart_false_alarm_rate", ()] == 0.01
    answers = [ask(service, body) for body in (good, good, b"hello", good, b"")]
    decisions = [answer.get("decision", "error") for answer in answers]
    after = metrics.take()
    assert after["rampart_requests_total", ("200",)] == 3
    assert after["rampart_requests_total", ("415",)] == 1
    assert after["rampart_requests_total", ("422",)] == 1
    for decision in set(decisions):
        assert after["rampart_images_total", (decision,)] == decisions.count(decision)
    assert after["rampart_errors_total", ("unsupported_format",)] == 1
    assert after["rampart_errors_total", ("empty_body",)] == 1
    p = answers[0]["detail"]["p_value"]
    assert after["rampart_p_value_sum", ()] == pytest.approx(3 * p, rel=1e-3)
    for bound in (*BOUNDS["rampart_p_value"], float("inf")):
        le = "+Inf" if bound == float("inf") else f"{bound:g}"
        assert after["rampart_p_value_bucket", (le,)] == 3 * (p <= bound)
    assert after["rampart_batch_images_count", ()] == 3
    for stage in ("decode", "graph", "response"):
        assert after["rampart_stage_seconds_count", (stage,)] == 5
        assert 0 < after["rampart_stage_seconds_sum", (stage,)] < 5


def test_optional_parts_that_fail_at_start_are_told_of_and_come_back(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("quarantine", "queries.watch"):
        monkeypatch.setattr(f"rampart.handlers.{module}.RETRY", 0.1)
    metrics, noise = Metrics(), np.random.default_rng(0)
    places = {"query_store": tmp_path / "queries", "quarantine": tmp_path / "flagged"}
    for place in places.values():
        place.write_text("a file where a folder should be")
    # What is asked about is flagged, and kept.
    settings = {"false_alarm_rate": 0.99} | {name: str(place) for name, place in places.items()}
    service = Service.open(unpacked, settings, metrics)

    def await_figures(value: float) -> None:
        deadline = time.monotonic() + 30
        up: set[float] = set()
        while up != {value}:
            assert time.monotonic() < deadline, up
            reply = post(service, png(noise.integers(0, 256, (32, 32, 3)).astype(np.uint8)))
            assert reply.status == 200
            names = ("rampart_query_store_up", "rampart_quarantine_up")
            changes = metrics.take()
            up = {changes[name, ()] for name in names if (name, ()) in changes}
            time.sleep(0.05)

    await_figures(0.0)
    for place in places.values():
        place.unlink()
        place.mkdir(mode=0o700)
    await_figures(1.0)


def test_replies_to_rejected_images_are_the_same_whichever_detector_it_was(
    unpacked: Path, tiny_images: Images, tiny_calibration: Calibration
) -> None:
    policy = {"detail": "public", "on_detection": "reject", "false_alarm_rate": 0.9}
    noise = np.random.default_rng(0)
    images = np.concatenate(
        [
            tiny_images.image[:40].numpy(),
            noise.integers(0, 256, (10, 32, 32, 3)),
            np.repeat(noise.integers(0, 256, (10, 32, 1, 3)), 32, axis=2),
            np.clip(tiny_images.image[:20].numpy() + noise.normal(0, 20, (20, 32, 32, 3)), 0, 255),
        ]
    ).astype(np.uint8)
    service = Service.open(unpacked, policy)
    replies = [post(service, png(image)) for image in images]
    decisions = [json.loads(reply.body)["decision"] for reply in replies]
    rejected = [number for number, decision in enumerate(decisions) if decision == "reject"]
    scores = Engine(unpacked / "graph.onnx").run(images[rejected]).scores
    pairs = zip(scores.T, tiny_calibration.knots, strict=True)
    ranks = np.stack([(column[:, None] > knots).mean(axis=1) for column, knots in pairs])
    assert len(set(ranks.argmax(axis=0).tolist())) >= 3  # detectors that found them
    assert len({str(replies[number]) for number in rejected}) == 1


def test_images_that_a_server_has_read_itself_are_answered_as_in_requests(
    service: Service, encode: Encode, pixels: np.ndarray
) -> None:
    good, bad, other = encode(pixels), b"{no picture", encode(np.ascontiguousarray(255 - pixels))
    answers = service.answer_images([[good, bad], [], [pixels], [other]])
    alone = [service.answer([Incoming({}, [one])])[0] for one in (good, other)]
    first, second = (json.loads(reply.body) for reply in alone)
    assert [[status for status, _ in row] for row in answers] == [[200, 415], [], [200], [200]]
    assert json.loads(json.dumps([answers[0][0][1], answers[2][0][1]])) == [first, first]
    assert json.loads(json.dumps(answers[3][0][1])) == second
