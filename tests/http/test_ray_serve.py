"""The application of rampart.ray on a real Ray with two nodes."""

import gzip
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from alike import assert_noticed, watchful
from described import assert_described
from peers import assert_kserves_client_gets, assert_tritons_client_gets
from prometheus import assert_well_formed, scraped
from ray_cluster import SLOW, TOKEN, Ray
from sent import Sent, ask
from servers import Server, certificate_and_key

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


def test_clients_that_others_wrote_get_the_verdict(
    ray: Ray, encode: Encode, pixels: np.ndarray, tmp_path: Path
) -> None:
    picture = encode(pixels)
    url = f"{ray.root}/predictions/tiny"
    expected = requests.post(url, picture, headers=OWN, timeout=10).json()
    for version in ("v1", "v2"):
        assert_kserves_client_gets(expected, ray.root, version, pixels, picture, headers=OWN)
    for binary in (True, False):
        assert_tritons_client_gets(expected, ray.port, pixels, binary=binary, headers=OWN)
    (tmp_path / "a.png").write_bytes(picture)
    token = ["-H", f"Authorization: Bearer {TOKEN}"]
    command = ["curl", "-s", "-T", "a.png", *token, url]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == expected


def test_schemathesis_finds_no_answer_that_the_description_does_not_allow(
    ray: Ray, tmp_path: Path
) -> None:
    assert_described(ray.root, tmp_path, "--header", f"Authorization: Bearer {TOKEN}")


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


def counted(ray: Ray, name: str, label: str = "") -> float:
    """A counter of all replicas among Ray's own figures, where it has a label."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in ray.figures().splitlines()
        if line.startswith(f"ray_rampart_{name}{{") and label in line
    )


@feature("Prometheus metrics", "Ray Serve")
def test_the_figures_of_all_replicas_are_among_rays_own(ray: Ray, encode: Encode) -> None:
    def refused() -> float:
        return counted(ray, "requests_total", 'status="415"')

    before, end = refused(), time.monotonic() + 30
    for _ in range(20):
        answer = requests.post(f"{ray.root}/predictions/tiny", b"text", headers=OWN, timeout=10)
        assert answer.status_code == 415
    while refused() < before + 20:
        assert time.monotonic() < end, ray.figures()[-3000:]
        time.sleep(0.5)
    assert refused() == before + 20


def test_prometheus_reads_every_node(ray: Ray, tmp_path: Path) -> None:
    targets = {f"node {number}": target for number, target in enumerate(ray.targets())}
    assert len(targets) == 2
    # Of a node whose replica has had no request there is nothing of ours to sum.
    assert scraped(tmp_path, targets, "sum by (job) (up)") == dict.fromkeys(targets, 1)
    for target in targets.values():
        text = requests.get(f"http://{target}/metrics", timeout=10).text
        assert_well_formed(text, histograms=False)


@feature("Compressed bodies", "Ray Serve")
def test_a_compressed_body_gets_the_same_answer(
    ray: Ray, requests_of_all_kinds: dict[str, Sent]
) -> None:
    for name in ("png", "v1 of many", "v2", "text"):
        path, body, headers = requests_of_all_kinds[name]
        packed = (path, gzip.compress(body), headers | OWN | {"Content-Encoding": "gzip"})
        assert ask(ray.root, packed) == ask(ray.root, (path, body, headers | OWN)), name


@feature("Client deadlines", "Ray Serve")
def test_a_clients_own_deadline_counts(ray: Ray, encode: Encode, pixels: np.ndarray) -> None:
    headers = OWN | {"X-Request-Timeout-Ms": "0"}
    late = requests.post(f"{ray.root}/predictions/tiny", encode(pixels), headers=headers)
    assert (late.status_code, late.json()["type"]) == (504, "too_late")


@feature("Rate limits per token", "Ray Serve")
def test_a_token_sends_no_more_than_its_rate_to_each_replica(
    ray: Ray, encode: Encode, pixels: np.ndarray
) -> None:
    url, slow = f"{ray.root}/predictions/tiny", {"Authorization": f"Bearer {SLOW}"}
    answers = [requests.post(url, encode(pixels), headers=slow, timeout=10) for _ in range(40)]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and 5 <= statuses.count(200) <= 10
    last = next(answer for answer in answers if answer.status_code == 429)
    assert last.json()["type"] == "too_many_requests" and int(last.headers["retry-after"]) >= 1
    assert requests.post(url, encode(pixels), headers=OWN, timeout=10).status_code == 200


@feature("Batches across clients", "Ray Serve")
def test_requests_of_several_clients_share_runs_of_the_graph(
    ray: Ray, encode: Encode, pixels: np.ndarray
) -> None:
    def images_and_runs() -> np.ndarray:
        time.sleep(3.5)  # figures are handed over once a second, and Ray's once a second
        return np.array([counted(ray, f"batch_images_{part}_total") for part in ("sum", "count")])

    before, body = images_and_runs(), encode(np.tile(pixels, (20, 20, 1)), "JPEG")
    with ThreadPoolExecutor(16) as pool:
        url = f"{ray.root}/predictions/tiny"
        tasks = [pool.submit(requests.post, url, body, headers=OWN, timeout=60) for _ in range(200)]
        assert {task.result().status_code for task in tasks} == {200}
    images, runs = images_and_runs() - before
    assert images == 200 and runs < 150


@pytest.fixture(scope="module")
def renewed(
    ray: Ray,
    tiny_shipped: Path,
    tmp_path_factory: pytest.TempPathFactory,
    encode: Encode,
    pixels: np.ndarray,
) -> Counter[str]:
    """Ray with a version 2.0 that explains and notices query attacks, and another model beside it.

    Counts the answers of a client meanwhile by their version, or by their status where it is not
    200.
    """
    folder, seen, ends = tmp_path_factory.mktemp("renewed"), Counter[str](), threading.Event()
    own = {"explain": True, "query_store": str(folder / "queries")}
    archives = [watchful(tiny_shipped, folder, version="2.0", **own)]
    archives.append(watchful(tiny_shipped, folder, "other"))
    picture = encode(pixels)

    def load() -> None:
        while not ends.is_set():
            url = f"{ray.root}/predictions/tiny"
            answer = requests.post(url, picture, headers=OWN, timeout=60)
            well = answer.status_code == 200
            seen[answer.json()["model"]["version"] if well else str(answer.status_code)] += 1

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        ray.deploy(*archives)
        end = time.monotonic() + 60
        while seen["2.0"] < 100:
            assert time.monotonic() < end, seen
            time.sleep(0.1)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    return seen


@feature("A new version without a restart", "Ray Serve")
@feature("Graceful shutdown: requests received are answered", "Ray Serve")
def test_replicas_of_a_new_version_take_over_without_a_failed_request(
    renewed: Counter[str],
) -> None:
    assert set(renewed) == {"1.0", "2.0"} and renewed["1.0"] > 10


@feature("Several models or versions", "Ray Serve")
def test_another_model_is_an_application_of_its_own(
    ray: Ray, renewed: Counter[str], encode: Encode, pixels: np.ndarray
) -> None:
    answer = requests.post(f"{ray.root}/other/predictions/other", encode(pixels), timeout=60)
    assert answer.json()["model"] == {"name": "other", "version": "1.0"}
    assert requests.get(f"{ray.root}/other/v1/models", timeout=10).json() == {"models": ["other"]}


@feature("Explanations", "Ray Serve")
def test_a_verdict_is_explained_to_who_asks(
    ray: Ray, renewed: Counter[str], encode: Encode, pixels: np.ndarray
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, pixels.shape, dtype=np.uint8)
    url = f"{ray.root}/explanations/tiny"
    content = requests.post(url, encode(noise), headers=OWN, timeout=60).json()
    assert np.array(content["explanation"]["label"]["effect"]).shape == (8, 8)


@feature("Query attacks are noticed", "Ray Serve")
def test_replicas_share_what_they_have_seen_so_that_query_attacks_are_noticed(
    ray: Ray, renewed: Counter[str]
) -> None:
    def decide(picture: bytes) -> str:
        answer = requests.post(f"{ray.root}/predictions/tiny", picture, headers=OWN, timeout=60)
        return str(answer.json()["decision"])

    assert_noticed(decide)
    end = time.monotonic() + 30
    alerts, stores = 0.0, 0.0  # of each replica its own store
    while alerts < 12 or stores != 2:
        assert time.monotonic() < end, (alerts, stores, ray.figures()[-3000:])
        time.sleep(0.5)
        alerts = counted(ray, "query_alerts_total", 'response="reject"')
        stores = counted(ray, "query_store_up")


@feature("TLS", "Ray Serve")
def test_ray_serves_by_tls(
    ray: Ray, tiny_archive: Path, tmp_path: Path, encode: Encode, pixels: np.ndarray
) -> None:
    ray.again(tiny_archive, certificate_and_key(tmp_path))
    url, end = f"https://127.0.0.1:{ray.port}", time.monotonic() + 120

    def post() -> requests.Response | None:
        with suppress(requests.RequestException):
            path, picture = f"{url}/predictions/tiny", encode(pixels)
            trusted = str(tmp_path / "c.pem")
            return requests.post(path, picture, headers=OWN, verify=trusted, timeout=10)
        return None

    while (answer := post()) is None or answer.status_code != 200:
        assert time.monotonic() < end, ray.log()
        time.sleep(0.5)
    assert answer.json()["model"] == {"name": "tiny", "version": "1.0"}
    with pytest.raises(requests.RequestException):
        requests.get(f"{ray.root}/v2/health/ready", timeout=5).raise_for_status()
