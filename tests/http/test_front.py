"""The whole HTTP server as its users, operators and attackers meet it."""

import base64
import gzip
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import tritonclient.grpc as grpc_triton
import tritonclient.http as triton
from alike import assert_noticed, watchful
from peers import assert_kserves_client_gets
from prometheus_client.parser import text_string_to_metric_families as parse
from sent import half_sent, overload
from servers import Server, free_port

from rampart.export.archive import archive as pack

feature = pytest.mark.feature

Start = Callable[..., Server]
Encode = Callable[..., bytes]


@pytest.fixture
def picture(encode: Encode, pixels: np.ndarray) -> bytes:
    return encode(pixels)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"team {'a' * 20}\n")
    return path


def verdict(answer: requests.Response) -> dict[str, Any]:
    content: dict[str, Any] = answer.json()
    return content


def workers(server: Server) -> list[psutil.Process]:
    """The processes that answer: the launcher has helpers of multiprocessing beside them."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # of which a zombie is one
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def answered(server: Server) -> float:
    """Requests with status 200 by the metrics of all workers."""
    text = requests.get(f"{server.root}/metrics", timeout=10).text
    return sum(
        sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.name == "rampart_requests_total" and sample.labels["status"] == "200"
    )


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_every_path_gives_the_same_verdict(front: Server, picture: bytes) -> None:
    text = base64.b64encode(picture).decode()
    expected = verdict(requests.post(front.url, picture, timeout=10))
    assert expected["decision"] in ("accept", "flag") and expected["model"]["name"] == "tiny"
    assert verdict(requests.put(front.url, picture, timeout=10)) == expected
    assert verdict(requests.post(f"{front.url}/1.0", picture, timeout=10)) == expected
    named = {"image": ("a.png", picture, "image/png")}
    assert verdict(requests.post(front.url, files=named, timeout=10)) == expected
    packed = {"Content-Encoding": "gzip"}
    sent = requests.post(front.url, gzip.compress(picture), headers=packed, timeout=10)
    assert verdict(sent) == expected
    instances = {"instances": [{"b64": text}]}
    v1 = requests.post(f"{front.root}/v1/models/tiny:predict", json=instances, timeout=10)
    assert verdict(v1) == {"predictions": [expected]}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    for path in ("/v2/models/tiny/infer", "/v2/models/tiny/versions/1.0/infer"):
        v2 = requests.post(f"{front.root}{path}", json={"inputs": [tensor]}, timeout=10).json()
        labels = {output["name"]: output["data"] for output in v2["outputs"]}
        assert labels["label"] == [expected["label"]]


def test_tritons_client_finds_its_way(front: Server, picture: bytes) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{front.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("tiny")
    assert metadata["versions"] == ["1.0"]
    image = triton.InferInput(metadata["inputs"][0]["name"], [2], "BYTES")
    image.set_data_from_numpy(np.array([picture, picture], dtype=object))
    result = client.infer("tiny", [image])
    for output in metadata["outputs"]:
        assert result.as_numpy(output["name"]).shape == (2,)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_kserves_own_client(
    front: Server, pixels: np.ndarray, picture: bytes, version: str
) -> None:
    expected = verdict(requests.post(front.url, picture, timeout=10))
    assert_kserves_client_gets(expected, front.root, version, pixels, picture)


@pytest.mark.parametrize(
    ("method", "path", "code", "kind"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/predictions/tiny", 405, "method_not_allowed"),
        ("POST", "/predictions/none", 404, "no_such_model"),
        ("POST", "/predictions/tiny/9", 404, "no_such_model"),
        ("GET", "/v2/models/tiny/versions/9/ready", 404, "no_such_model"),
        ("GET", "/v1/models/%ff%00", 404, "no_such_model"),
        ("POST", "/predictions/tiny", 415, "no_image"),
        ("DELETE", "/", 405, "method_not_allowed"),
        ("GET", "/docs/", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_told_in_our_form(
    front: Server, method: str, path: str, code: int, kind: str
) -> None:
    answer = requests.request(method, front.root + path, timeout=10)
    assert (answer.status_code, answer.json()["type"]) == (code, kind)
    names = {name.lower() for name in answer.headers}
    assert names == {"content-type", "content-length", *({"allow"} if code == 405 else ())}


@feature("Client deadlines", "Rampart")
def test_a_clients_own_deadline_counts_and_what_is_none_harms_nothing(
    front: Server, picture: bytes
) -> None:
    def ask(deadline: str | bytes) -> requests.Response:
        headers = {"X-Request-Timeout-Ms": deadline}
        return requests.post(front.url, picture, headers=headers, timeout=60)

    late = ask("0")
    assert (late.status_code, late.json()["type"]) == (504, "too_late")
    for text in (b"\xb2", b"9" * 5000, b"soon", b""):  # a superscript is a digit, and no number
        assert ask(text).status_code == 200, text


def connected(server: Server, count: int, data: bytes, stack: ExitStack) -> list[socket.socket]:
    out = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        out.append(stack.enter_context(one))
        one.sendall(data)
    return out


def receive(one: socket.socket, until: bytes) -> bytes:
    got = b""
    while until not in got:
        piece = one.recv(65536)
        assert piece, got
        got += piece
    return got


@pytest.mark.slow
def test_a_thousand_slow_clients_hold_up_nobody_and_are_closed(
    front: Server, picture: bytes
) -> None:
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\n"
    with ExitStack() as stack:
        idle = connected(front, 300, b"", stack)
        heads = connected(front, 400, head + b"X: y", stack)
        connected(front, 300, head + b"Content-Length: 5000\r\n\r\nabc", stack)
        for _ in range(5):
            assert requests.post(front.url, picture, timeout=5).status_code == 200
        for one in (idle[0], idle[-1], heads[0], heads[-1]):
            with suppress(ConnectionResetError):
                assert one.recv(1) == b""  # 10 s later


def test_a_head_without_end_is_cut_off(front: Server) -> None:
    with ExitStack() as stack:
        (one,) = connected(front, 1, b"GET /ping HTTP/1.1\r\nX: ", stack)
        with pytest.raises(OSError):
            for _ in range(1000):
                one.sendall(b"x" * 10_000)


def test_a_refused_body_gets_its_answer_though_its_client_still_sends(front: Server) -> None:
    head = b"POST /predictions/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    for name, size, status in ((b"tiny", 9_000_000, b"413"), (b"none", 3_000_000, b"404")):
        with ExitStack() as stack:
            (one,) = connected(front, 1, head % (name, size) + bytes(size), stack)
            got = b""
            while piece := one.recv(65536):  # to the end: the server closes
                got += piece
            assert got.startswith(b"HTTP/1.1 " + status)
            assert b"connection: close" in got and got.endswith(b"}\n")


def test_what_is_not_http_is_told_in_our_form(front: Server) -> None:
    with ExitStack() as stack:
        (one,) = connected(front, 1, b"nonsense\r\n\r\n", stack)
        got = receive(one, b"}")
        assert got.startswith(b"HTTP/1.1 400 ") and b'"type": "no_http"' in got


@pytest.mark.slow
def test_a_connection_is_kept_between_requests(front: Server, picture: bytes) -> None:
    with requests.Session() as session:
        for _ in range(3):
            answer = session.post(front.url, picture, timeout=10)
            assert answer.status_code == 200 and "connection" not in answer.headers
        time.sleep(11)  # longer than a head may take
        (pool,) = session.adapters["http://"].poolmanager.pools._container.values()
        assert session.post(front.url, picture, timeout=10).status_code == 200
        assert pool.num_connections == 1


@pytest.mark.slow
def test_a_client_that_reads_no_answers_is_closed(front: Server) -> None:
    count, ask = 2000, b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"
    size = len(requests.get(f"{front.root}/docs", timeout=10).content)
    with ExitStack() as stack:
        one = socket.socket()
        stack.enter_context(one).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(30)
        one.connect(("127.0.0.1", front.port))
        one.sendall(ask * count)
        time.sleep(25)  # longer than an answer may wait
        got = 0
        with suppress(ConnectionResetError):
            while piece := one.recv(1 << 20):
                got += len(piece)
    assert got < count * size / 4


def test_an_answer_comes_in_one_piece(front: Server, picture: bytes) -> None:
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack:
        (one,) = connected(front, 1, b"", stack)
        for _ in range(20):
            one.sendall(head % len(picture) + picture)
            assert receive(one, b"}\n").startswith(b"HTTP/1.1 200 ")
        (segments,) = struct.unpack_from("I", one.getsockopt(socket.IPPROTO_TCP, 11, 160), 152)
    assert segments == 20  # TCP_INFO's tcpi_data_segs_in


def test_large_bodies_in_one_piece_and_a_head_of_some_size_are_taken(
    front: Server, encode: Encode
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    body, tail = encode(noise), {"X-Long": "y" * 30_000}
    assert len(body) > 1_000_000
    assert requests.post(front.url, body, headers=tail, timeout=20).status_code == 200


def test_pipelined_requests_are_answered_in_order(front: Server) -> None:
    paths = (b"/v2", b"/nothing", b"/ping")
    data = b"".join(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths)
    with ExitStack() as stack:
        (one,) = connected(front, 1, data, stack)
        got = receive(one, b"Healthy")
    assert got.index(b"binary_tensor_data") < got.index(b"not_found") < got.index(b"Healthy")


def settled(server: Server) -> float:
    """Answered requests, once both workers know of each other's."""
    counts = {-1.0, answered(server)}
    while len(counts) > 1:
        time.sleep(1.5)  # a worker leaves its figures once a second
        counts = {answered(server) for _ in range(8)}
    return counts.pop()


@feature("Prometheus metrics", "Rampart")
def test_counters_of_both_workers_add_up(front: Server, picture: bytes) -> None:
    before = settled(front)
    for _ in range(20):  # each by a connection of its own
        assert requests.post(front.url, picture, timeout=10).status_code == 200
    wait(lambda: answered(front) == before + 20)


def figure(server: Server, name: str) -> float:
    """A figure of the one model, over all workers."""
    text = requests.get(f"{server.root}/metrics", timeout=10).text
    (value,) = [one.value for two in parse(text) for one in two.samples if one.name == name]
    return value


def in_flight(server: Server) -> float:
    """What an autoscaler reads."""
    return figure(server, "rampart_requests_in_flight")


def test_requests_in_flight_are_told_under_load_and_none_before_and_after(
    start: Start, tiny_archive: Path, encode: Encode
) -> None:
    port = free_port()
    server = start(tiny_archive, workers=2, port=port, grpc_port=port + 1)
    assert "Rampart is ready" in server.read(), server.lines
    wait(lambda: in_flight(server) == 0)
    large = encode(np.zeros((1500, 1500, 3), np.uint8), "JPEG")  # which takes long to decode
    stop, seen = threading.Event(), dict[str, list[float]](http=[], grpc=[])

    def over_http() -> None:
        while not stop.is_set():
            assert requests.post(server.url, large, timeout=30).status_code == 200

    def over_grpc() -> None:
        tensor = grpc_triton.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([large], dtype=object))
        with grpc_triton.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            while not stop.is_set():
                client.infer("tiny", [tensor])

    for kind, client in (("http", over_http), ("grpc", over_grpc)):
        stop.clear()
        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(6):
            time.sleep(0.25)
            seen[kind].append(in_flight(server))
        stop.set()
        for thread in threads:
            thread.join()
        wait(lambda: in_flight(server) == 0)
    # Each client has one; another worker's are as of a second ago.
    for kind, counts in seen.items():
        assert 0 < max(counts) <= 16 and sum(counts) / len(counts) > 1, (kind, counts)
    assert server.end() == 0


def test_a_workers_gauge_does_not_hide_that_of_one_that_stands_still(
    start: Start, tiny_archive: Path
) -> None:
    server = start(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(), server.lines

    def age() -> float:
        return time.time() - figure(server, "rampart_heartbeat_seconds")

    wait(lambda: age() < 3)
    still, _ = workers(server)
    still.suspend()
    wait(lambda: age() > 5)  # though the other one has a new heartbeat each second
    still.resume()
    wait(lambda: age() < 3)
    assert server.end() == 0


def test_a_delay_lets_a_request_wait_for_the_next_one(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    server = start(tiny_archive, delay=2.0)
    assert "Rampart is ready" in server.read(), server.lines
    batches, images = "rampart_batch_images_count", "rampart_batch_images_sum"
    before = figure(server, batches), figure(server, images)
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(requests.post, server.url, picture, timeout=60)
        wait(lambda: in_flight(server) == 1)  # it waits
        second = requests.post(server.url, picture, timeout=60)
        assert [first.result().status_code, second.status_code] == [200, 200]
    assert (figure(server, batches), figure(server, images)) == (before[0] + 1, before[1] + 2)
    assert server.end() == 0


def test_connections_that_one_worker_has_alone_are_soon_shared_with_the_others(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    server = start(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(), server.lines
    one, other = workers(server)
    other.suspend()
    sessions = [requests.Session() for _ in range(16)]

    def ask() -> set[int]:
        return {session.post(server.url, picture, timeout=10).status_code for session in sessions}

    def clients(worker: psutil.Process) -> int:
        near = [link for link in worker.net_connections("tcp") if link.laddr.port == server.port]
        return sum(link.status == psutil.CONN_ESTABLISHED for link in near)

    assert ask() == {200} and clients(one) == 16
    other.resume()

    def shared() -> bool:
        assert ask() == {200}
        return clients(one) <= 12 and clients(other) >= 4

    wait(shared)
    for session in sessions:
        session.close()
    assert server.end() == 0


@feature("Dead workers are replaced", "Rampart")
def test_a_killed_worker_is_replaced_and_its_counters_stay(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    server = start(tiny_archive, workers=2)
    server.read()
    for _ in range(10):
        assert requests.post(server.url, picture, timeout=10).status_code == 200
    before = settled(server)
    assert before >= 11  # ten, and the launcher's own
    victim, other = workers(server)
    victim.kill()
    victim.wait(10)
    wait(lambda: len(workers(server)) == 2 and other in workers(server))
    wait(lambda: requests.post(server.url, picture, timeout=10).status_code == 200)
    assert answered(server) > before
    assert server.end() == 0


def test_only_what_a_killed_worker_held_fails(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    server = start(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(), server.lines
    stop, clients = threading.Event(), 8
    answers: list[tuple[float, int, str]] = []

    def client() -> None:
        while not stop.is_set():
            try:
                answer = requests.post(server.url, picture, timeout=20)
                code, says = answer.status_code, answer.text
            except requests.RequestException as fault:  # it was that worker's
                code, says = 0, str(fault)
            answers.append((time.monotonic(), code, says))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    victim = workers(server)[0]
    victim.kill()
    victim.wait(10)
    killed = time.monotonic()
    wait(lambda: len(workers(server)) == 2)
    wait(lambda: any(code == 200 and when > killed + 0.5 for when, code, _ in answers))
    stop.set()
    for thread in threads:
        thread.join()
    failed = [(code, says) for _, code, says in answers if code != 200]
    assert len(failed) <= clients and not any(code for code, _ in failed), failed
    assert server.end() == 0


@feature("Overload is refused at once with 503 and Retry-After", "Rampart")
def test_where_more_come_than_can_wait_the_rest_is_told_at_once_when_to_come_again(
    start: Start, tiny_archive: Path, encode: Encode
) -> None:
    server = start(tiny_archive)
    assert "Rampart is ready" in server.read(), server.lines
    large = encode(np.zeros((1500, 1500, 3), np.uint8), "JPEG")  # which takes long to decode
    (worker,) = workers(server)
    answers = overload(server.url, large, worker)
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["type"] == "busy"
    assert sum(answer.ok for answer in answers) >= 100
    assert workers(server) == [worker]
    assert server.end() == 0


def test_a_worker_that_dies_while_the_launcher_waits_for_it_is_replaced_at_once(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    server = start(tiny_archive, workers=1)
    server.read()
    (victim,) = workers(server)
    victim.suspend()
    time.sleep(2)  # the launcher has asked it by now
    victim.kill()
    begin = time.monotonic()
    wait(lambda: [worker for worker in workers(server) if worker != victim])
    wait(lambda: requests.post(server.url, picture, timeout=10).status_code == 200)
    assert time.monotonic() - begin < 30  # not only after the 60 s of a worker that hangs
    assert server.end() == 0


def test_workers_end_with_a_launcher_that_was_killed_and_leave_nothing(
    start: Start, tiny_archive: Path
) -> None:
    server = start(tiny_archive, workers=2)
    server.read()
    orphans = workers(server)
    assert list(server.temp.iterdir())
    server.process.kill()
    wait(lambda: not any(orphan.is_running() for orphan in orphans))
    wait(lambda: not list(server.temp.iterdir()))
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.root}/v2/health/live", timeout=10)


@pytest.fixture
def archive_with_news(tiny_archive: Path, tiny_shipped: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of an archive, and a newer one that promises another rate."""
    archive, news = Path(shutil.copy(tiny_archive, tmp_path)), tmp_path / "news" / "tiny.mar"
    news.parent.mkdir()
    pack(tiny_shipped, news, settings={"rampart": {"false_alarm_rate": 0.07}})
    return archive, news


@feature("A new version without a restart", "Rampart")
@pytest.mark.slow
def test_a_replaced_archive_is_served_without_a_failed_request(
    start: Start, archive_with_news: tuple[Path, Path], picture: bytes
) -> None:
    archive, news = archive_with_news
    server = start(archive)
    server.read()
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(requests.post(server.url, picture, timeout=10).status_code)

    client = threading.Thread(target=ask)
    client.start()
    try:
        news.replace(archive)
        rate = 'rampart_false_alarm_rate{model="tiny"} 0.07'
        wait(lambda: rate in requests.get(f"{server.root}/metrics", timeout=10).text)
        archive.write_bytes(b"broken")  # the old one is served on
        time.sleep(4)
    finally:
        stop.set()
        client.join()
    assert set(statuses) == {200} and len(statuses) > 20
    assert requests.post(server.url, picture, timeout=10).status_code == 200
    assert server.end() == 0


@pytest.mark.slow
def test_a_broken_archive_stops_nobody_though_workers_die_and_the_next_good_one_is_taken(
    start: Start, archive_with_news: tuple[Path, Path], picture: bytes
) -> None:
    archive, news = archive_with_news
    server = start(archive, workers=2)
    server.read()
    expected = verdict(requests.post(server.url, picture, timeout=10))

    def answer() -> dict[str, Any] | None:
        with suppress(requests.RequestException):  # it went to a worker that was killed
            return verdict(requests.post(server.url, picture, timeout=10))
        return None

    def is_back(old: list[psutil.Process]) -> bool:
        assert server.process.poll() is None
        return not set(old) & set(workers(server)) and answer() == expected

    def killed_and_back() -> None:
        old = workers(server)
        for worker in old:
            worker.kill()
        wait(lambda: is_back(old), seconds=150)

    archive.write_bytes(b"broken")
    killed_and_back()  # perhaps before the launcher has looked at the archive
    server.read(until=str(archive))
    assert f"{archive} is not taken: the old archive stays in service" in server.lines
    assert f"error: {archive} is not a Rampart archive: rebuild it" in server.lines
    killed_and_back()
    news.replace(archive)
    rate = 'rampart_false_alarm_rate{model="tiny"} 0.07'
    wait(lambda: rate in requests.get(f"{server.root}/metrics", timeout=10).text, seconds=150)
    assert server.end() == 0


@feature("Graceful shutdown: requests received are answered", "Rampart")
def test_a_request_that_has_come_is_answered_before_the_end(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    server = start(tiny_archive)
    server.read()
    line = half_sent(server.port, "/predictions/tiny", picture, server.process.terminate)
    assert line == b"HTTP/1.1 200 OK"
    assert server.end() == 0


def test_a_request_on_a_connection_of_before_is_answered_while_the_server_ends(
    start: Start, tiny_archive: Path
) -> None:
    server = start(tiny_archive)
    server.read()
    ask = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        fresh, kept = connected(server, 2, b"", stack)
        kept.sendall(ask)
        receive(kept, b"}")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        for one in (fresh, kept):
            one.sendall(ask)
            got = receive(one, b"}")
            assert got.startswith(b"HTTP/1.1 200") and b"connection: close" in got
    assert server.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_ctrl_c_and_the_end_of_the_terminal_end_it_as_sigterm_does(
    start: Start, tiny_archive: Path, number: signal.Signals
) -> None:
    server = start(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(), server.lines
    family = server.family()
    assert server.end(number) == 0
    wait(lambda: not any(process.is_running() for process in family))


def test_under_nohup_the_end_of_the_terminal_changes_nothing(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    server = start(tiny_archive, first=ignoring)
    assert "Rampart is ready" in server.read(), server.lines
    server.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert requests.post(server.url, picture, timeout=10).status_code == 200
    assert server.end() == 0


def test_it_ends_while_it_is_still_starting(start: Start, tiny_archive: Path) -> None:
    server = start(tiny_archive, workers=2)
    wait(lambda: bool(workers(server)))
    family = server.family()
    assert server.end() in (0, 1)  # it may have become ready just then
    wait(lambda: not any(process.is_running() for process in family))


@feature("Tokens", "Rampart")
def test_tokens_are_wanted_and_may_change(
    start: Start, tiny_archive: Path, picture: bytes, tokens: Path
) -> None:
    server = start(tiny_archive, tokens=str(tokens), host="0.0.0.0")
    assert "Rampart is ready" in server.read(until="  curl")
    assert "aaaa" not in "".join(server.lines)
    good, new = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    assert requests.post(server.url, picture, timeout=10).status_code == 401
    assert requests.get(f"{server.root}/metrics", timeout=10).json()["type"] == "no_token"
    assert requests.get(f"{server.root}/v2/health/ready", timeout=10).status_code == 200
    assert requests.post(server.url, picture, headers=good, timeout=10).status_code == 200
    assert requests.post(server.url, picture, headers=new, timeout=10).status_code == 401
    tokens.write_text(f"other {'b' * 20}\n")
    wait(lambda: requests.post(server.url, picture, headers=new, timeout=10).status_code == 200)
    assert requests.post(server.url, picture, headers=good, timeout=10).status_code == 401
    assert server.end() == 0


def test_tokens_may_come_from_the_environment_and_no_process_shows_them(
    start: Start, tiny_archive: Path, picture: bytes
) -> None:
    given = f"one {'a' * 20},two {'b' * 20} 100 50"
    server = start(tiny_archive, environment={"RAMPART_TOKENS": given}, host="0.0.0.0")
    assert "Rampart is ready" in server.read(until="  curl"), server.lines
    for letter, code in (("a", 200), ("b", 200), ("c", 401)):
        headers = {"Authorization": f"Bearer {letter * 20}"}
        assert requests.post(server.url, picture, headers=headers, timeout=10).status_code == code
    assert "aaaa" not in "".join(server.lines)
    _, *workers = server.family()
    assert workers and not any("RAMPART_TOKENS" in worker.environ() for worker in workers)
    assert {file.stat().st_mode & 0o777 for file in server.temp.glob("rampart-*/tokens")} == {0o600}
    assert server.end() == 0


@feature("Rate limits per token", "Rampart")
def test_a_token_sends_no_more_than_its_rate_to_all_workers_together(
    start: Start, tiny_archive: Path, picture: bytes, tokens: Path
) -> None:
    tokens.write_text(f"slow {'a' * 20} 0.01 12\nfree {'b' * 20}\n")
    server = start(tiny_archive, workers=2, tokens=str(tokens))
    assert "Rampart is ready" in server.read(until="  curl")
    slow, free = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    answers = [requests.post(server.url, picture, headers=slow, timeout=10) for _ in range(20)]
    statuses = [answer.status_code for answer in answers]
    assert sorted(set(statuses)) == [200, 429] and statuses == sorted(statuses)
    assert statuses.count(200) == 12  # the launcher has shown the other
    last = answers[-1]
    assert last.json()["type"] == "too_many_requests" and int(last.headers["retry-after"]) >= 1
    assert requests.get(f"{server.root}/v2/health/ready", timeout=10).status_code == 200
    for _ in range(20):
        assert requests.post(server.url, picture, headers=free, timeout=10).status_code == 200
    line = f'rampart_requests_total{{model="",status="429"}} {statuses.count(429)}.0'
    wait(lambda: line in requests.get(f"{server.root}/metrics", headers=free, timeout=10).text)
    assert server.end() == 0


def refused(start: Start, *archives: Path, **options: object) -> str:
    """The one line that a server which cannot start prints."""
    server = start(*archives, **options)
    assert server.finish() == 1
    (line,) = [line for line in server.lines if line.startswith("error: ")]
    return line


def test_what_cannot_be_served_is_told_in_a_line(
    start: Start,
    front: Server,
    tiny_archive: Path,
    repack: Callable[..., Path],
    tmp_path: Path,
) -> None:
    assert "pass a token file" in refused(start, tiny_archive, host="0.0.0.0")
    assert "there is no archive" in refused(start, tmp_path / "none.mar")
    assert "cannot be used" in refused(start, tiny_archive, port=front.port)
    (tmp_path / "text.mar").write_text("text")
    assert "rebuild it" in refused(start, tmp_path / "text.mar")
    changed = repack(tmp_path, {"labels.json": b"[]"})
    assert "labels.json is not the file that was packed" in refused(start, changed)


@feature("Several models or versions", "Rampart")
def test_several_models_and_versions_are_served_together(
    start: Start, tiny_archive: Path, tiny_shipped: Path, picture: bytes, tmp_path: Path
) -> None:
    second = tmp_path / "tiny.mar"
    pack(tiny_shipped, second, version="2.0")
    server = start(tiny_archive, second)
    server.read()
    for path, version in (("", "1.0"), ("/1.0", "1.0"), ("/2.0", "2.0")):
        answer = requests.post(server.url + path, picture, timeout=10)
        assert answer.json()["model"] == {"name": "tiny", "version": version}
    assert requests.get(f"{server.root}/v1/models", timeout=10).json() == {"models": ["tiny"]}
    versions = requests.get(f"{server.root}/v2/models/tiny", timeout=10).json()["versions"]
    assert versions == ["1.0", "2.0"]
    assert server.end() == 0


COMMAND_LINE = """
import json, sys
from rampart.__main__ import main
sys.argv[1:] = ["serve", "--server", "http", "--workers", "2", "--archive", sys.argv[1],
                "--port", str(json.loads(sys.argv[2])["port"])]
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "traffic-signs"])
def test_launcher_and_two_workers_take_little_memory_with_what_we_ship(
    launch: Start, picture: bytes, tmp_path: Path, name: str
) -> None:
    served = tmp_path / f"{name}.mar"
    pack(Path("model_store") / name, served, variant="lean", precision="int8")
    server = launch(served, code=COMMAND_LINE)
    assert "Rampart is ready" in server.read(), server.lines
    with ThreadPoolExecutor(16) as clients:
        url = f"{server.root}/predictions/{name}"
        answers = clients.map(lambda _: requests.post(url, picture, timeout=60), range(200))
        assert {answer.status_code for answer in answers} == {200}
    held = [process.memory_info().rss for process in server.family()]
    assert sum(held) < 290e6, held


@feature("Query attacks are noticed", "Rampart")
def test_workers_share_what_they_have_seen_so_that_query_attacks_are_noticed(
    start: Start, tiny_shipped: Path, tmp_path: Path
) -> None:
    archive = watchful(tiny_shipped, tmp_path)
    server = start(archive, workers=2, query_store=str(tmp_path / "queries"))
    assert "Rampart is ready" in server.read(), server.lines

    def decide(picture: bytes) -> str:  # each by a connection of its own
        decision: str = requests.post(server.url, picture, timeout=10).json()["decision"]
        return decision

    assert_noticed(decide)

    def figures() -> str:
        return requests.get(f"{server.root}/metrics", timeout=10).text

    wait(lambda: 'rampart_query_alerts_total{model="tiny",response="reject"} 12.0' in figures())
    assert 'rampart_query_store_up{model="tiny"} 1.0' in figures()
    assert server.end() == 0


def test_launcher_and_workers_take_little_memory(start: Start, tiny_archive: Path) -> None:
    server = start(tiny_archive)
    server.read()
    held = sum(process.memory_info().rss for process in server.family())
    assert held < 300e6
    assert server.end() == 0
