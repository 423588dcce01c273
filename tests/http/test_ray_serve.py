"""The application of rampart.ray on a real Ray with two nodes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from ray_cluster import TOKEN, Ray
from sent import Sent, ask
from servers import Server

from rampart.handlers.service import Service
from rampart.handlers.types import Incoming

feature = pytest.mark.feature

pytestmark = [pytest.mark.server, pytest.mark.slow]
Encode = Callable[..., bytes]
OWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def ray(tiny_archive: Path) -> Iterator[Ray]:
    cluster = Ray(tiny_archive)
    try:
        cluster.wait(2)
        yield cluster
    finally:
        code = cluster.end()
    assert code == 0


@feature("Same verdicts as every other server", "Ray Serve")
@feature("Raw pictures and forms", "Ray Serve")
@feature("KServe v1", "Ray Serve")
@feature("Open Inference v2, JSON", "Ray Serve")
@feature("Open Inference v2, binary tensors", "Ray Serve")
@feature("A bad picture does not affect the others", "Ray Serve")
@feature("Protocol health and metadata", "Ray Serve")
def test_ray_serve_gives_the_answers_of_our_own_front(
    ray: Ray, front: Server, requests_of_all_kinds: dict[str, Sent]
) -> None:
    for name, sent in requests_of_all_kinds.items():
        path, body, headers = sent
        assert ask(ray.root, (path, body, headers | OWN)) == ask(front.root, sent), name
    for path in ("/v2", "/v2/models/tiny", "/v2/models/tiny/ready", "/v1/models", "/nowhere"):
        theirs, ours = (
            requests.get(root + path, headers=OWN, timeout=10) for root in (ray.root, front.root)
        )
        assert (theirs.status_code, theirs.json()) == (ours.status_code, ours.json()), path


@feature("Tokens", "Ray Serve")
def test_a_replica_answers_those_who_have_a_token_and_other_deployments(
    ray: Ray, encode: Encode, pixels: np.ndarray, tmp_path: Path
) -> None:
    url, picture = f"{ray.root}/predictions/tiny", encode(pixels)
    refused = requests.post(url, picture, timeout=10)
    assert (refused.status_code, refused.json()["type"]) == (401, "no_token")
    (tmp_path / "a.png").write_bytes(picture)
    expected = requests.post(url, picture, headers=OWN, timeout=10).json()
    assert ray.verdict(tmp_path / "a.png") == expected
    (tmp_path / "b.png").write_bytes(b"text")
    assert ray.verdict(tmp_path / "b.png")["code"] == 415


def test_each_node_has_a_replica(ray: Ray) -> None:
    assert len({replica.ppid() for replica in ray.replicas()}) == 2


@feature("Dead workers are replaced", "Ray Serve")
def test_a_replica_that_is_killed_under_load_is_replaced_and_no_answer_is_another_pictures(
    ray: Ray, unpacked: Path, encode: Encode, pixels: np.ndarray
) -> None:
    service = Service.open(unpacked, name="tiny", version="1.0")
    turned = [np.ascontiguousarray(np.rot90(pixels, turn)) for turn in range(4)]
    pictures = [encode(one) for one in turned]
    verdicts = [json.loads(service.answer([Incoming({}, [one])])[0].body) for one in pictures]
    assert len({json.dumps(one) for one in verdicts}) == 4
    answers: list[tuple[float, int, int, Any]] = []
    ends = threading.Event()

    def load(number: int) -> None:
        while not ends.is_set():
            url = f"{ray.root}/predictions/tiny"
            answer = requests.post(url, pictures[number], headers=OWN, timeout=60)
            content = answer.json() if answer.status_code == 200 else None
            answers.append((time.monotonic(), number, answer.status_code, content))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2)
        killed = ray.replicas()[0]
        killed.kill()
        at = time.monotonic()
        while killed in ray.replicas() or len(ray.replicas()) < 2:
            assert time.monotonic() < at + 60, ray.log()
            time.sleep(0.2)
        time.sleep(2)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert len([one for one in answers if one[0] > at and one[2] == 200]) > 10
    assert {status for _, _, status, _ in answers} <= {200, 500, 503}
    # What the replica had begun is lost, one request of each client at most.
    assert len([one for one in answers if one[2] != 200]) <= 4
    for _, number, status, content in answers:
        assert status != 200 or content == verdicts[number]


@feature("Prometheus metrics", "Ray Serve")
def test_the_figures_of_all_replicas_are_among_rays_own(ray: Ray, encode: Encode) -> None:
    def counted(status: str) -> float:
        return sum(
            float(line.rpartition(" ")[2])
            for line in ray.figures().splitlines()
            if line.startswith("ray_rampart_requests_total{") and f'status="{status}"' in line
        )

    before, end = counted("415"), time.monotonic() + 30
    for _ in range(20):
        answer = requests.post(f"{ray.root}/predictions/tiny", b"text", headers=OWN, timeout=10)
        assert answer.status_code == 415
    while counted("415") < before + 20:
        assert time.monotonic() < end, ray.figures()[-3000:]
        time.sleep(0.5)
    assert counted("415") == before + 20
