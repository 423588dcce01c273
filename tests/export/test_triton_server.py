"""A repository of `export --triton --backend python` in a real Triton, as its clients meet it."""

import gc
import gzip
import hashlib
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from alike import assert_noticed, watchful
from command import run
from peers import assert_kserves_client_gets
from sent import ask
from servers import Redis, certificate_and_key, free_port
from triton_server import Triton
from tritonclient.utils import InferenceServerException

from rampart.export.archive import archive
from rampart.export.to_triton_python import to_triton_python
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming

feature = pytest.mark.feature

pytestmark = pytest.mark.server
OUTPUTS = ["label", "index", "confidence", "decision", "p_value", "error"]
Encode = Callable[..., bytes]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_archive: Path) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    assert to_triton_python(tiny_archive, folder) == folder / "tiny"
    return folder


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    server = Triton(repository, tmp_path_factory.mktemp("triton"), free_port())
    server.wait()
    yield server
    gc.collect()  # clients over HTTP, in the thread that they are of
    assert server.end() == 0


@pytest.fixture(params=["http", "grpc"])
def speak(request: pytest.FixtureRequest, triton: Triton) -> Iterator[tuple[Any, Any]]:
    """A client, and the module that it is of."""
    module = getattr(tritonclient, request.param)
    port = triton.port if request.param == "http" else triton.grpc
    with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client, module


@pytest.fixture(scope="module")
def service(unpacked: Path) -> Service:
    """What answers, in this process."""
    return Service.open(unpacked, name="tiny", version="1")


def encoded(module: Any, *pictures: bytes) -> Any:
    tensor = module.InferInput("image", [len(pictures), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(pictures, dtype=object)[:, None])
    return tensor


def decoded(module: Any, pixels: np.ndarray) -> Any:
    tensor = module.InferInput("pixels", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    return tensor


def rows(result: Any) -> list[dict[str, Any]]:
    columns = {name: result.as_numpy(name) for name in OUTPUTS}
    count = len(columns["label"])
    assert all(column.shape == (count, 1) for column in columns.values())
    return [{name: column[row, 0] for name, column in columns.items()} for row in range(count)]


def assert_is(row: dict[str, Any], verdict: dict[str, Any]) -> None:
    assert row["label"].decode() == verdict["label"] and row["index"] == verdict["index"]
    assert row["confidence"] == pytest.approx(verdict["confidence"], abs=1e-5)
    assert row["decision"].decode() == verdict["decision"] and row["error"] == b""
    assert row["p_value"] == pytest.approx(verdict["detail"]["p_value"], abs=1e-5)


@feature("Protocol health and metadata", "Triton")
def test_health_and_metadata_are_told(speak: tuple[Any, Any]) -> None:
    client, _ = speak
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    metadata = client.get_model_metadata("tiny")
    if not isinstance(metadata, dict):
        assert [output.name for output in metadata.outputs] == OUTPUTS
        return
    inputs = {one["name"]: (one["datatype"], one["shape"]) for one in metadata["inputs"]}
    assert inputs == {"image": ("BYTES", [-1, 1]), "pixels": ("UINT8", [-1, -1, -1, 3])}
    assert [output["name"] for output in metadata["outputs"]] == OUTPUTS


@feature("Same verdicts as every other server", "Triton")
@feature("Open Inference v2, binary tensors", "Triton")
@feature("Open Inference v2, gRPC", "Triton")
@feature("A bad picture does not affect the others", "Triton")
def test_verdicts_are_those_of_the_service_and_a_bad_picture_harms_no_other(
    speak: tuple[Any, Any], service: Service, encode: Encode, pixels: np.ndarray
) -> None:
    client, module = speak
    large = encode(np.tile(pixels, (3, 4, 1)), "JPEG")
    pictures = [encode(pixels), b"{not a picture}", large, encode(pixels)[:90]]
    expected = [service.answer([Incoming({}, [one])])[0] for one in pictures]
    found = rows(client.infer("tiny", [encoded(module, *pictures)]))
    assert [reply.status for reply in expected[::2]] == [200, 200]
    for row, reply in zip(found[::2], expected[::2], strict=True):
        assert_is(row, json.loads(reply.body))
    for row, kind in zip(found[1::2], ["unsupported_format", "corrupt_image"], strict=True):
        error = json.loads(row["error"])
        assert error["type"] == kind and error["code"] in (415, 422) and error["message"]
        assert (row["label"], row["index"], row["decision"]) == (b"", -1, b"error")
        assert np.isnan(row["p_value"])
    (from_pixels,) = rows(client.infer("tiny", [decoded(module, pixels[None])]))
    assert_is(from_pixels, json.loads(expected[0].body))


@feature("Open Inference v2, JSON", "Triton")
@feature("Compressed bodies", "Triton")
@pytest.mark.parametrize("packed", [False, True])
def test_pixels_in_json_get_the_same_verdict(
    triton: Triton, service: Service, encode: Encode, pixels: np.ndarray, packed: bool
) -> None:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    body = json.dumps({"id": "7", "inputs": [tensor | {"data": pixels.ravel().tolist()}]}).encode()
    sent = ("/v2/models/tiny/infer", body, {"Content-Type": "application/json"})
    if packed:
        sent = (sent[0], gzip.compress(body), sent[2] | {"Content-Encoding": "gzip"})
    status, content, _ = ask(triton.root, sent)
    assert status == 200 and content["id"] == "7"
    found = {output["name"]: output["data"] for output in content["outputs"]}
    verdict = json.loads(service.answer([Incoming({}, [encode(pixels)])])[0].body)
    assert found["label"] == [verdict["label"]] and found["decision"] == [verdict["decision"]]
    assert found["p_value"] == pytest.approx([verdict["detail"]["p_value"]], abs=1e-5)


def test_kserves_own_client(
    triton: Triton, service: Service, encode: Encode, pixels: np.ndarray
) -> None:
    picture = encode(pixels)
    verdict = json.loads(service.answer([Incoming({}, [picture])])[0].body)
    assert_kserves_client_gets(verdict, triton.root, "v2", pixels, picture, name="pixels")


def test_requests_that_do_not_fit_are_told(speak: tuple[Any, Any], pixels: np.ndarray) -> None:
    client, module = speak
    both = [encoded(module, b"a"), decoded(module, pixels[None])]
    with pytest.raises(InferenceServerException, match="one of the inputs image and pixels"):
        client.infer("tiny", both)
    thin = decoded(module, np.zeros((2, 1, 900, 3), np.uint8))
    errors = [json.loads(row["error"])["code"] for row in rows(client.infer("tiny", [thin]))]
    assert errors == [422, 422]
    (row,) = rows(client.infer("tiny", [encoded(module, bytes(7_000_000))]))
    assert json.loads(row["error"])["type"] == "body_too_large"
    with pytest.raises(InferenceServerException, match="batch"):
        client.infer("tiny", [encoded(module, *[b"a"] * 33)])


def count(triton: Triton, name: str, label: str = "", model: str = "tiny") -> float:
    """A counter of a model's, of all its versions; those alone that have a label."""
    text = requests.get(f"http://127.0.0.1:{triton.metrics}/metrics", timeout=10).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(f"{name}{{") and f'model="{model}"' in line and label in line
    )


def test_triton_fetches_ahead_so_that_quick_clients_do_not_wait_for_half_a_second(
    triton: Triton,
) -> None:
    # It does so where nothing bounds its queue; how often a client meets the wait is timing.
    batching = requests.get(f"{triton.root}/v2/models/tiny/config", timeout=10).json()
    policy = batching["dynamic_batching"].get("default_queue_policy") or {}
    bounds = ("max_queue_size", "default_timeout_microseconds", "allow_timeout_override")
    assert not any(policy.get(bound) for bound in bounds)


@feature("Open Inference v2, gRPC streams", "Triton")
def test_a_stream_is_answered_too(triton: Triton, encode: Encode, pixels: np.ndarray) -> None:
    module, answers = tritonclient.grpc, queue.Queue[tuple[Any, Any]]()
    image = encoded(module, encode(pixels))
    with module.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
        (expected,) = rows(client.infer("tiny", [image]))
        client.start_stream(lambda result, error: answers.put((result, error)))
        for _ in range(3):
            client.async_stream_infer("tiny", [image])
        for _ in range(3):
            result, error = answers.get(timeout=30)
            assert error is None and rows(result) == [expected]
        client.stop_stream()


@feature("Prometheus metrics", "Triton")
def test_decisions_and_errors_are_among_tritons_own_figures(
    triton: Triton, encode: Encode, pixels: np.ndarray
) -> None:
    kinds = [("images", 'decision="error"'), ("errors", 'type="corrupt_image"'), ("images", "")]

    def counted() -> list[float]:
        return [count(triton, f"rampart_{name}_total", label) for name, label in kinds]

    before = counted()
    image = encoded(tritonclient.http, encode(pixels), encode(pixels)[:90], encode(pixels))
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{triton.port}") as client:
        for _ in range(3):
            client.infer("tiny", [image])
    deadline = time.monotonic() + 10
    while (now := counted()) != [then + more for then, more in zip(before, (3, 3, 9), strict=True)]:
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.05)


@pytest.mark.slow
@feature("Batches across clients", "Triton")
def test_pictures_and_pixels_of_several_clients_share_a_batch(
    triton: Triton, service: Service, encode: Encode, pixels: np.ndarray
) -> None:
    module = tritonclient.grpc
    turned = np.ascontiguousarray(pixels[:, ::-1])
    pictures = [pixels, np.tile(turned, (2, 2, 1)), turned]
    inputs = [encoded(module, encode(one)) for one in pictures]
    inputs += [decoded(module, one[None]) for one in pictures]
    expected = [
        json.loads(service.answer([Incoming({}, [encode(one)])])[0].body) for one in pictures * 2
    ]
    before = [count(triton, f"nv_inference_{kind}") for kind in ("count", "exec_count")]
    wrong: list[BaseException] = []
    gc.collect()  # a client over HTTP must not be collected in another thread than its own

    def ask(number: int) -> None:
        try:
            with module.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
                for _ in range(30):
                    (row,) = rows(client.infer("tiny", [inputs[number]]))
                    assert_is(row, expected[number])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    deadline = time.monotonic() + 30  # Triton counts a run after it has answered
    while (answered := count(triton, "nv_inference_count") - before[0]) < 180:
        assert time.monotonic() < deadline, f"Triton counts {answered} of 180 answers"
        time.sleep(0.05)
    assert answered == 180
    assert count(triton, "nv_inference_exec_count") - before[1] < 180  # each alone without batches


@feature("A new version without a restart", "Triton")
@feature("Several models or versions", "Triton")
def test_a_new_version_is_taken_up_when_triton_is_told_and_a_damaged_one_is_not(
    triton: Triton, repository: Path, tiny_shipped: Path, tmp_path: Path, encode: Encode
) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    strict = tmp_path / "tiny.mar"
    archive(tiny_shipped, strict, settings={"rampart": {"false_alarm_rate": 0.99}})
    to_triton_python(strict, repository, version=2)
    module = tritonclient.http
    image = encoded(module, encode(noise))
    with module.InferenceServerClient(f"127.0.0.1:{triton.port}") as client:
        (before,) = rows(client.infer("tiny", [image]))
        client.load_model("tiny")
        for version, decision in (("1", before["decision"]), ("2", b"flag"), ("", b"flag")):
            (row,) = rows(client.infer("tiny", [image], model_version=version))
            assert row["decision"] == decision
            assert row["p_value"] == before["p_value"]
        damaged = repository / "tiny" / "3"
        shutil.copytree(repository / "tiny" / "2", damaged)
        (damaged / "labels.json").write_text("[]")
        with pytest.raises(InferenceServerException, match=r"labels\.json is not the file"):
            client.load_model("tiny")
        shutil.rmtree(damaged)
        (row,) = rows(client.infer("tiny", [image]))  # what was there answers on
        assert row["decision"] == b"flag"


@feature("Query attacks are noticed", "Triton")
@feature("Several models or versions", "Triton")
@pytest.mark.parametrize("kind", ["lmdb", "redis"])
def test_another_model_notices_query_attacks_by_a_store_of_either_kind(
    triton: Triton,
    repository: Path,
    tiny_shipped: Path,
    tmp_path: Path,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    store = str(tmp_path / "queries")
    if kind == "redis":
        redis: Redis = request.getfixturevalue("redis")
        redis.flush()
        store = redis.address
    name = f"watched-{kind}"
    to_triton_python(watchful(tiny_shipped, tmp_path, name, query_store=store), repository)
    module = tritonclient.http
    with module.InferenceServerClient(f"127.0.0.1:{triton.port}") as client:
        client.load_model(name)

        def decide(picture: bytes) -> str:
            (row,) = rows(client.infer(name, [encoded(module, picture)]))
            return str(row["decision"].decode())

        assert_noticed(decide)
        assert count(triton, "rampart_query_alerts_total", 'response="reject"', name) == 12
        client.unload_model(name)


def test_a_model_folder_is_packed_and_an_archive_of_before_is_told(
    tmp_path: Path, tiny_shipped: Path, unpacked: Path, repack: Callable[..., Path]
) -> None:
    home = to_triton_python(tiny_shipped, tmp_path / "models", form=("lean", None))
    assert json.loads((home / "1" / "card.json").read_text())["variant"] == "lean"
    with pytest.raises(ValueError, match=r"tiny/1 exists: name another --model-version"):
        to_triton_python(tiny_shipped, tmp_path / "models")
    file = "rampart/handlers/triton.py"
    hashes = json.loads((unpacked / "sha256.json").read_text())
    del hashes[file]
    old = repack(tmp_path, {file: None, "sha256.json": json.dumps(hashes).encode()})
    with pytest.raises(ValueError, match="without Triton support: rebuild it"):
        to_triton_python(old, tmp_path / "others")


@pytest.mark.parametrize("name", ["../out", "/proc/out", 'a" backend: "x', "a\n", "", 3, None])
def test_an_archive_chooses_no_place_outside_the_repository(
    tmp_path: Path, unpacked: Path, repack: Callable[..., Path], name: object
) -> None:
    file = "MAR-INF/MANIFEST.json"
    manifest = json.loads((unpacked / file).read_text())
    manifest["model"]["modelName"] = name
    foreign = rehashed(unpacked, repack, tmp_path, {file: json.dumps(manifest).encode()})
    with pytest.raises(ValueError, match=r"MANIFEST\.json names the model .*: do not trust the"):
        to_triton_python(foreign, tmp_path / "models" / "mine")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("content", [b"{}", b"[]", b"no JSON", b'{"model": "mine"}'])
def test_an_archive_without_a_name_is_refused_in_one_line(
    tmp_path: Path, unpacked: Path, repack: Callable[..., Path], content: bytes
) -> None:
    foreign = rehashed(unpacked, repack, tmp_path, {"MAR-INF/MANIFEST.json": content})
    with pytest.raises(ValueError, match=r"MANIFEST\.json names no model: rebuild the archive"):
        to_triton_python(foreign, tmp_path / "models")


def rehashed(
    unpacked: Path, repack: Callable[..., Path], folder: Path, files: dict[str, bytes]
) -> Path:
    """The archive with other files, as one who forges its hashes as well makes it."""
    hashes = json.loads((unpacked / "sha256.json").read_text())
    hashes |= {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return repack(folder, files | {"sha256.json": json.dumps(hashes).encode()})


def test_what_an_interrupted_export_left_is_no_part_of_the_next(
    tmp_path: Path, tiny_archive: Path
) -> None:
    left = tmp_path / "tiny" / "1.partial"
    left.mkdir(parents=True)
    (left / "graph.plan").write_text("of another model")
    home = to_triton_python(tiny_archive, tmp_path)
    assert not left.exists() and not (home / "1" / "graph.plan").exists()


def test_the_verb_writes_a_repository_of_an_archive_or_says_what_is_missing(
    tmp_path: Path, tiny_archive: Path
) -> None:
    run("export", tiny_archive, "--triton", tmp_path, "--backend", "python", "--model-version", 4)
    assert (tmp_path / "tiny" / "4" / "model.py").is_file()
    with pytest.raises(ValueError, match="--backend python needs --triton FOLDER"):
        run("export", tiny_archive, "--out", tmp_path / "a.onnx", "--backend", "python")


def test_who_may_not_see_p_values_does_not(tmp_path: Path, tiny_shipped: Path) -> None:
    public = tmp_path / "tiny.mar"
    archive(tiny_shipped, public, settings={"rampart": {"detail": "public"}})
    config = (to_triton_python(public, tmp_path / "models") / "config.pbtxt").read_text()
    assert '"p_value"' not in config and '"error"' in config


@pytest.fixture
def another(repository: Path, tmp_path: Path) -> Iterator[Triton]:
    """A server that the test may end, with TLS on its gRPC."""
    certificate, key = certificate_and_key(tmp_path)
    options = ("--grpc-use-ssl", "true", "--grpc-server-cert", certificate)
    server = Triton(repository, tmp_path, free_port(), *options, "--grpc-server-key", key)
    server.wait()
    yield server
    server.end()


@pytest.mark.slow
@feature("TLS", "Triton")
@feature("Graceful shutdown: requests received are answered", "Triton")
def test_triton_speaks_tls_and_answers_what_has_come_before_its_end(
    another: Triton, tmp_path: Path, service: Service, encode: Encode, pixels: np.ndarray
) -> None:
    module, picture = tritonclient.grpc, encode(pixels)
    trusted = {"ssl": True, "root_certificates": str(tmp_path / "c.pem")}
    large = encode(np.tile(pixels, (22, 22, 1)), "JPEG")  # of 32 the server takes long
    image, many = encoded(module, picture), encoded(module, *[large] * 32)
    answers = queue.Queue[tuple[Any, Any]]()
    with module.InferenceServerClient(f"127.0.0.1:{another.grpc}", **trusted) as client:
        (expected,) = rows(client.infer("tiny", [image]))
        assert_is(expected, json.loads(service.answer([Incoming({}, [picture])])[0].body))
        for _ in range(6):
            client.async_infer("tiny", [many], lambda result, error: answers.put((result, error)))
        every = [answers.get(timeout=60)]  # so the others have come too
        assert answers.qsize() < 5
        another.terminate()
        every += [answers.get(timeout=60) for _ in range(5)]
        for result, error in every:
            assert error is None and [row["error"] for row in rows(result)] == [b""] * 32
    assert another.finish() == 0
