"""A request over HTTP, and what a client makes of its answer; many at once, too many, too late."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests

Sent = tuple[str, bytes, dict[str, str]]  # path, body, headers


def ask(root: str, sent: Sent) -> tuple[int, Any, dict[str, str | None]]:
    """Status, content and the headers that count."""
    path, body, headers = sent
    answer = requests.post(root + path, body, headers=headers, timeout=60)
    kept = ("content-type", "retry-after", "traceparent")
    return answer.status_code, answer.json(), {name: answer.headers.get(name) for name in kept}


def overload(url: str, body: bytes, worker: psutil.Process, **options: Any) -> list[Any]:
    """The answers to 200 requests that come while `worker` sleeps."""
    answers: list[requests.Response] = []

    def one() -> None:
        answers.append(requests.post(url, body, timeout=60, **options))

    worker.suspend()
    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    port, end = urlsplit(url).port, time.monotonic() + 60
    while connections(port) + len(answers) < 200:  # some may be refused already
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1)  # what they send is on its way
    worker.resume()
    for thread in threads:
        thread.join()
    return answers


def connections(port: int | None) -> int:
    """How many clients a server on this machine has, whether it knows of them or not."""
    near = (one for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port)
    return sum(one.status == psutil.CONN_ESTABLISHED for one in near)


def half_sent(port: int, path: str, body: bytes, meanwhile: Callable[[], object]) -> bytes:
    """The first line of the answer to a picture whose last byte is sent after `meanwhile`."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        one.sendall(head.encode() + body[:-1])
        time.sleep(0.3)
        meanwhile()
        time.sleep(0.7)
        one.sendall(body[-1:])
        return one.recv(65536).partition(b"\r\n")[0]
