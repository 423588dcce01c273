"""What one connection may send: many requests at once, heads and frames of bodies without end."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from servers import free_port

from rampart.launch.connection import Connection

PING = b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n"
SLOW = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n"
CHUNKED = b"POST /ping HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"

ENDS = (b"host", b",a", b"-encoding", b"\n\r\n")  # of the answers that are asked for here


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """The names of a request's headers, after its body; /slow takes two seconds."""
    if scope["path"] == "/slow":
        await asyncio.sleep(2)
    while (await receive()).get("more_body"):
        pass
    body = b",".join(name for name, _ in scope["headers"])
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(
        answer, port=free_port(), http=Connection, lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield server
    server.should_exit = True
    thread.join()


@pytest.fixture
def client(server: uvicorn.Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.config.port), timeout=20) as connection:
        yield connection


def answers(client: socket.socket, count: int = 1) -> bytes:
    """What comes until there are so many answers; less where the connection ends before."""
    data = b""
    try:
        while data.count(b"HTTP/1.1 200") < count or not data.endswith(
            (b"host", b",a", b"-encoding", b"\n\r\n")
        ):
            if not (more := client.recv(65536)):
                break
            data += more
    except ConnectionError:
        pass
    return data


def is_cut(client: socket.socket, data: bytes) -> bool:
    """Whether the server ends the connection at `data`, and says nothing."""
    try:
        client.sendall(data)
        return client.recv(1) == b""
    except ConnectionError:
        return True


def test_requests_that_come_faster_than_their_answers_are_answered_in_turn(
    client: socket.socket,
) -> None:
    for _ in range(10):
        client.sendall(SLOW.replace(b"/slow", b"/ping") * 90)
        assert answers(client, 90).count(b"200 OK") == 90


def test_a_connection_on_which_too_many_requests_wait_is_closed(
    server: uvicorn.Server, client: socket.socket
) -> None:
    longest = 0
    client.sendall(SLOW + PING * 2000)
    end = time.monotonic() + 10
    while (there := list(server.server_state.connections)) and time.monotonic() < end:
        longest = max([longest, *(len(one.pipeline) for one in there)])
    assert not server.server_state.connections and longest <= 101
    assert answers(client) == b""


def test_a_head_without_end_behind_a_request_at_work_is_cut_off(client: socket.socket) -> None:
    line = b"a: b\r\n"
    client.sendall(SLOW + PING[:-2] + line * 8000)  # 48 kB
    time.sleep(0.3)
    client.sendall(b"\r\n")
    assert answers(client, 2).count(b"200 OK") == 2
    client.sendall(SLOW)
    time.sleep(0.3)
    assert is_cut(client, PING[:-2] + line * 30_000)


def test_a_slow_head_behind_a_request_that_waits_has_its_time_when_it_is_read(
    client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.launch.connection.HEAD_SECONDS", 1.0)
    client.sendall(SLOW + PING + PING[:-2])
    time.sleep(2.5)  # the second is answered, and only now the third is read on
    client.sendall(b"\r\n")
    assert answers(client, 3).count(b"200 OK") == 3
    client.sendall(SLOW + PING[:-2])
    assert answers(client) == b""


@pytest.mark.parametrize("frame", [b"0\r\n" + b"a: b\r\n" * 40_000, b"1;" + b"a" * 200_000])
def test_what_stands_between_and_after_chunks_is_bounded(
    client: socket.socket, frame: bytes
) -> None:
    assert is_cut(client, CHUNKED + frame)


def test_trailers_are_left_out(client: socket.socket) -> None:
    client.sendall(CHUNKED + b"1\r\na\r\n0\r\nb: c\r\n\r\n")
    assert answers(client).endswith(b"\r\n\r\nhost,transfer-encoding")


def test_head_is_answered_at_once_and_the_next_answer_is_the_next_requests(
    client: socket.socket,
) -> None:
    client.sendall(PING.replace(b"GET", b"HEAD"))
    assert answers(client).endswith(b"\r\n\r\n")
    client.sendall(PING.replace(b"host", b"x: y\r\nhost"))
    assert answers(client).count(b"HTTP/1.1") == 1
