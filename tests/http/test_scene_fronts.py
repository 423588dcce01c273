"""An object detector behind every front: the boxes are those of the service."""

import base64
import gc
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
import yaml
from drawn import objects, picture
from jsonschema import Draft202012Validator
from kserve_server import KServe
from ray_cluster import TOKEN, Ray
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from servers import Server, free_port
from triton_server import Triton

from rampart.export.to_triton_python import to_triton_python
from rampart.handlers.service import Service
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Incoming
from rampart.launch.opening import open_archive

pytestmark = [pytest.mark.server, pytest.mark.training]
OUTPUTS = ["count", "boxes", "label", "index", "confidence", "decision", "p_value"]


@pytest.fixture(scope="module")
def service(scene_archive: Path) -> Service:
    """What answers, in this process."""
    return open_archive(scene_archive, Metrics()).service


@pytest.fixture(scope="module")
def pictures(encode: Callable[..., bytes]) -> list[bytes]:
    draws = np.random.default_rng(0)
    sizes = [(128, 128), (180, 120)]
    drawn = [picture(draws, *size, objects(draws, min(size), 2)) for size in sizes]
    return list(map(encode, [*drawn, np.full((64, 64, 3), 128, np.uint8)]))


@pytest.fixture(scope="module")
def verdicts(service: Service, pictures: list[bytes]) -> list[dict[str, Any]]:
    expected = json.loads(service.answer([Incoming({}, pictures)])[0].body)["predictions"]
    assert expected[0]["boxes"] and not expected[2]["boxes"]
    return expected


def assert_are(answers: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    """The same, but for what an engine of other threads may round otherwise."""
    for answer, verdict in zip(answers, verdicts, strict=True):
        assert answer["decision"] == verdict["decision"] and answer.keys() == verdict.keys()
        pairs = list(zip(answer["boxes"], verdict["boxes"], strict=True))
        for one, other in pairs:
            assert (one["label"], one["index"]) == (other["label"], other["index"])
            assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
            assert one["box"] == pytest.approx(other["box"], abs=0.02)


def as_verdicts(result: Any) -> list[dict[str, Any]]:
    """Tensors as the verdicts that they are of."""
    found = {name: result.as_numpy(name) for name in OUTPUTS}
    out = []
    for row, count in enumerate(found["count"].reshape(-1)):
        each = zip(*(found[name][row][:count] for name in OUTPUTS[1:5]), strict=True)
        boxes = [
            {"label": text(label), "index": i, "confidence": share, "box": list(box)}
            for box, label, i, share in each
        ]
        assert (found["index"][row][count:] == -1).all()
        decision = text(found["decision"].reshape(-1)[row])
        p_value = float(found["p_value"].reshape(-1)[row])
        out.append({"boxes": boxes, "decision": decision, "p_value": p_value})
    return out


def text(label: bytes | str) -> str:
    """A label, which Triton's client over HTTP has decoded."""
    return label if isinstance(label, str) else label.decode()


def told(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tensors say of verdicts."""
    return [
        {"boxes": one["boxes"], "decision": one["decision"], "p_value": one["detail"]["p_value"]}
        for one in verdicts
    ]


def tensor(module: Any, pictures: list[bytes], *sides: int) -> Any:
    named = module.InferInput("image", [len(pictures), *sides], "BYTES")
    named.set_data_from_numpy(np.array(pictures, dtype=object).reshape(len(pictures), *sides))
    return named


def instances(pictures: list[bytes]) -> dict[str, Any]:
    return {"instances": [{"b64": base64.b64encode(one).decode()} for one in pictures]}


@pytest.fixture(scope="module")
def front(start: Callable[..., Server], scene_archive: Path) -> Server:
    port = free_port()
    server = start(scene_archive, port=port, grpc_port=port + 1)
    assert "Rampart is ready" in server.read(), server.lines
    return server


def test_our_own_server_gives_the_boxes_of_the_service_over_http_and_grpc(
    front: Server, pictures: list[bytes], verdicts: list[dict[str, Any]]
) -> None:
    one = requests.post(f"{front.root}/predictions/drawn", pictures[0], timeout=20).json()
    many = requests.post(
        f"{front.root}/v1/models/drawn:predict", json=instances(pictures), timeout=20
    ).json()
    assert_are([one, *many["predictions"]], [verdicts[0], *verdicts])
    for module, port in ((tritonclient.http, front.port), (tritonclient.grpc, front.grpc)):
        with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
            result = client.infer("drawn", [tensor(module, pictures)])
            assert_are(as_verdicts(result), told(verdicts))
            metadata = client.get_model_metadata("drawn")
            if isinstance(metadata, dict):
                shapes = {one["name"]: one["shape"] for one in metadata["outputs"]}
                assert list(shapes) == OUTPUTS and shapes["boxes"] == [-1, -1, 4]
                assert metadata["card"]["task"] == "detect"
            else:
                shapes = {one.name: list(one.shape) for one in metadata.outputs}
                assert list(shapes) == OUTPUTS and shapes["boxes"] == [-1, -1, 4]
    gc.collect()  # clients over HTTP, in the thread that they are of


def test_the_description_of_the_endpoint_knows_verdicts_on_objects(
    front: Server, pictures: list[bytes]
) -> None:
    content = yaml.safe_load(Path("deploy/openapi.yaml").read_text())
    known = Registry().with_resource("urn:api", Resource.from_contents(content, DRAFT202012))
    schemas = "urn:api#/components/schemas"
    answer = requests.post(f"{front.root}/predictions/drawn", pictures[0], timeout=20).json()
    many = requests.post(
        f"{front.root}/v1/models/drawn:predict", json=instances(pictures), timeout=20
    ).json()
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}]}
    body["inputs"][0]["data"] = [base64.b64encode(pictures[0]).decode()]
    tensors = requests.post(f"{front.root}/v2/models/drawn/infer", json=body, timeout=20).json()
    for name, one in (
        ("SceneVerdict", answer),
        ("Predictions", many),
        ("InferResponse", tensors),
        ("Metadata", requests.get(f"{front.root}/v2/models/drawn", timeout=20).json()),
    ):
        Draft202012Validator({"$ref": f"{schemas}/{name}"}, registry=known).validate(one)


def test_torchserve_gives_the_boxes_of_the_service(
    launch: Callable[..., Server],
    scene_archive: Path,
    pictures: list[bytes],
    verdicts: list[dict[str, Any]],
) -> None:
    server = launch(scene_archive)
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    one = requests.post(f"{server.root}/predictions/drawn", pictures[0], timeout=20).json()
    many = requests.post(
        f"{server.root}/predictions/drawn", json=instances(pictures), timeout=20
    ).json()
    assert_are([one, *many["predictions"]], [verdicts[0], *verdicts])
    assert server.end() == 0


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory, scene_archive: Path) -> Iterator[Triton]:
    repository = tmp_path_factory.mktemp("repository")
    to_triton_python(scene_archive, repository)
    server = Triton(repository, tmp_path_factory.mktemp("triton"), free_port())
    server.wait()
    yield server
    gc.collect()
    assert server.end() == 0


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
def test_triton_gives_the_boxes_of_the_service_and_a_bad_picture_harms_no_other(
    module: Any, triton: Triton, pictures: list[bytes], verdicts: list[dict[str, Any]]
) -> None:
    port = triton.port if module is tritonclient.http else triton.grpc
    with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
        result = client.infer("drawn", [tensor(module, [*pictures, b"hello"], 1)])
    *good, bad = as_verdicts(result)
    assert_are(good, told(verdicts))
    assert bad["decision"] == "error" and not bad["boxes"]
    assert json.loads(result.as_numpy("error")[3, 0])["type"] == "unsupported_format"


@pytest.fixture(scope="module")
def kserve(tmp_path_factory: pytest.TempPathFactory, scene_archive: Path) -> Iterator[KServe]:
    server = KServe(scene_archive, tmp_path_factory.mktemp("kserve"))
    server.wait()
    yield server
    assert server.end() == 0


def test_kserve_gives_the_boxes_of_the_service(
    kserve: KServe, pictures: list[bytes], verdicts: list[dict[str, Any]]
) -> None:
    url = f"{kserve.root}/v1/models/drawn:predict"
    many = requests.post(url, json=instances(pictures), timeout=20).json()
    assert_are(many["predictions"], verdicts)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{kserve.grpc}") as client:
        result = client.infer("drawn", [tensor(tritonclient.grpc, pictures)])
        assert_are(as_verdicts(result), told(verdicts))
    data = [base64.b64encode(one).decode() for one in pictures]
    body = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}
    url = f"{kserve.root}/v2/models/drawn/infer"
    answer = requests.post(url, json={"inputs": [body]}, timeout=20).json()
    outputs = {one["name"]: np.reshape(one["data"], one["shape"]) for one in answer["outputs"]}
    assert list(outputs) == OUTPUTS
    own = [box["box"] for box in verdicts[0]["boxes"]]
    np.testing.assert_allclose(outputs["boxes"][0, : len(own)], own, atol=0.02)


@pytest.mark.slow
def test_ray_serve_gives_the_boxes_of_the_service(
    scene_archive: Path, pictures: list[bytes], verdicts: list[dict[str, Any]]
) -> None:
    cluster = Ray(scene_archive)
    try:
        cluster.wait(2)
        own = {"Authorization": f"Bearer {TOKEN}"}
        answer = requests.post(
            f"{cluster.root}/predictions/drawn", pictures[0], headers=own, timeout=30
        )
        assert_are([answer.json()], verdicts[:1])
    finally:
        cluster.end()


def test_an_archive_carries_all_code_that_judges_boxes(scene_archive: Path) -> None:
    with zipfile.ZipFile(scene_archive) as content:
        names = set(content.namelist())
    assert {"rampart/handlers/scenes.py", "rampart/handlers/tasks.py"} <= names
