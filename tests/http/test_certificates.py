"""A certificate that is replaced while the server runs."""

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest
import requests
from servers import Server, certificate_and_key, free_port
from test_front import wait, workers

feature = pytest.mark.feature


def serials(*ports: int) -> list[str]:
    """The certificates that ports show to a new connection."""
    return [ssl.get_server_certificate(("127.0.0.1", port), timeout=10) for port in ports]


@feature("TLS", "Rampart")
@pytest.mark.slow
def test_a_replaced_certificate_is_shown_without_a_failed_request_and_half_of_one_stops_nobody(
    start: Callable[..., Server],
    tiny_archive: Path,
    pixels: object,
    encode: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    (tmp_path / "new").mkdir()
    pair, port, picture = certificate_and_key(tmp_path), free_port(), encode(pixels)
    trusted = tmp_path / "trusted"
    trusted.write_bytes(pair[0].read_bytes())
    ports = (port, port + 1)
    server = start(tiny_archive, port=port, grpc_port=ports[1], tls=[str(path) for path in pair])
    assert "Rampart is ready" in server.read(), server.lines
    url, old = server.url.replace("http:", "https:"), serials(port)[0]
    assert serials(*ports) == [old, old]

    def ask() -> int:
        return requests.post(url, picture, verify=str(trusted), timeout=20).status_code

    new = certificate_and_key(tmp_path / "new")
    trusted.write_bytes(trusted.read_bytes() + new[0].read_bytes())
    new[1].replace(pair[1])  # its chain is yet to come
    server.read(until="error: ")
    assert server.lines[-1].endswith("the old certificate stays in service")
    (victim,) = workers(server)
    victim.kill()
    wait(lambda: is_back(server, victim, ask), seconds=60)
    assert serials(*ports) == [old, old]

    statuses: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            statuses.append(ask())

    thread = threading.Thread(target=client)
    (worker,) = workers(server)
    thread.start()
    try:
        new[0].replace(pair[0])
        # Until it has ended, it takes connections beside the new one.
        wait(lambda: worker not in workers(server), seconds=60)
    finally:
        stop.set()
        thread.join()
    assert set(statuses) == {200} and len(statuses) > 10
    shown = serials(*ports)
    assert shown[0] == shown[1] and shown[0] in pair[0].read_text()
    trust = grpc.ssl_channel_credentials(pair[0].read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{ports[1]}", trust) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
    assert server.end() == 0


def is_back(server: Server, victim: psutil.Process, ask: Callable[[], int]) -> bool:
    assert server.process.poll() is None, "the whole server ended"
    with suppress(requests.RequestException):
        return victim not in workers(server) and ask() == 200
    return False
