"""Good clients, and hostile ones that do the worst of one kind until they are told to stop.

All of them send to a server of our own on loopback; each is bounded in count, size and time.
"""

import base64
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from io import BytesIO

import grpc
import pytest
import requests
from PIL import Image

from benchmarks.decoding import emptied, encoded, with_text
from benchmarks.fuzz import PREDICT, STREAM, grpc_request

# Two requests a second of each client: what is missing then is a stall, and not a slow machine.
SECONDS, INTERVAL, CLIENTS, LOOKS = 4.0, 0.5, 8, 3
# One attack on each of decoder, parser and connections; an attack takes seconds.
FEW = ("pictures of a million pixels in 88 bytes", "JSON of two million lists", "unfinished bodies")


class Target:
    """Where a server listens."""

    def __init__(self, port: int, grpc_port: int, model: str) -> None:
        self.port, self.grpc, self.model = port, grpc_port, model
        self.url = f"http://127.0.0.1:{port}/predictions/{model}"
        self.infer = f"http://127.0.0.1:{port}/v2/models/{model}/infer"


Attack = Callable[[Target, threading.Event], None]
Making = Callable[[], Attack]  # what it sends is made where it is sent, and not at each import


def good_answers(target: Target, body: bytes) -> int:
    """How many of CLIENTS clients' requests, one each INTERVAL, are answered with 200 in time."""
    end = time.monotonic() + SECONDS

    def client(number: int) -> int:
        right, due = 0, time.monotonic() + INTERVAL * number / CLIENTS
        with requests.Session() as session:
            while (now := time.monotonic()) < end:
                time.sleep(max(0.0, due - now))
                due = max(due + INTERVAL, time.monotonic())
                with suppress(requests.RequestException):
                    right += session.post(target.url, body, timeout=10).status_code == 200
        return right

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, range(CLIENTS)))


def disturbed(attack: Making, target: Target, body: bytes) -> int:
    """As `good_answers`, while `attack` goes on; afterwards one more request must be answered."""
    stop = threading.Event()
    hostile = threading.Thread(target=attack(), args=(target, stop))
    hostile.start()
    try:
        answers = good_answers(target, body)
    finally:
        stop.set()
        hostile.join(timeout=90)
    assert requests.post(target.url, body, timeout=60).status_code == 200
    return answers


def share_answered(attack: Making, target: Target, body: bytes, *, alone: int) -> float:
    """How much of `alone`, the answers without `attack`, is left under it: the best of LOOKS.

    What an attack holds up, it holds up each time. What else runs on this machine comes and goes.
    """
    share = disturbed(attack, target, body) / alone
    for _ in range(LOOKS - 1):
        if share < 0.9:
            alone = good_answers(target, body)
            share = max(share, disturbed(attack, target, body) / alone)
    return share


def posting(body: bytes, kind: str, *, route: str = "url") -> Attack:
    """Sends one body again and again, by one connection."""

    def attack(target: Target, stop: threading.Event) -> None:
        url = getattr(target, route)
        with requests.Session() as session:
            for _ in range(2000):
                if stop.is_set():
                    return
                with suppress(requests.RequestException):
                    session.post(url, body, headers={"Content-Type": kind}, timeout=60)

    return attack


def calling(method: str, inputs: dict[str, bytes], *, streams: bool = False) -> Attack:
    """Calls one method of the gRPC interface again and again."""

    def attack(target: Target, stop: threading.Event) -> None:
        asked = grpc_request(target.model, inputs)
        with grpc.insecure_channel(f"127.0.0.1:{target.grpc}") as channel:
            call = channel.unary_stream(method) if streams else channel.unary_unary(method)
            for _ in range(2000):
                if stop.is_set():
                    return
                with suppress(grpc.RpcError):
                    reply = call(asked, timeout=60)
                    list(reply) if streams else reply

    return attack


def holding(request: bytes, *, connections: int, more: bytes = b"") -> Attack:
    """Opens connections that send the same bytes, read no answer and stay."""

    def attack(target: Target, stop: threading.Event) -> None:
        with suppress(OSError):
            held = [open_with(target.port, request) for _ in range(connections)]
            while not stop.wait(0.2):
                for one in held:
                    with suppress(OSError):
                        one.send(more)
            for one in held:
                one.close()

    return attack


def open_with(port: int, data: bytes) -> socket.socket:
    """A connection on which `data` were sent as far as they were taken."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.settimeout(0.2)
    with suppress(OSError):
        connection.sendall(data)
    return connection


def head(target_model: str, length: int) -> bytes:
    """The head of a request that announces so many bytes."""
    return (
        f"POST /predictions/{target_model} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def instances(picture: bytes, count: int = 32) -> bytes:
    """KServe v1 of the same picture many times."""
    text = base64.b64encode(picture).decode()
    return json.dumps({"instances": [{"b64": text}] * count}).encode()


def million() -> bytes:
    """A million pixels in few bytes."""
    return encoded(Image.new("RGB", (1024, 1024)), "WEBP", lossless=True)


def keyed() -> bytes:
    """Four million pixels with a colour key."""
    noise = Image.effect_noise((2000, 2000), 3).convert("RGB")
    return encoded(noise, "PNG", transparency=(1, 2, 3))


def tags() -> bytes:
    """EXIF of megabytes, packed."""
    return zlib.compress(b"Raw profile type exif\0" + b"49492a00" * 90_000, 9)


def attacks() -> Iterator[tuple[str, Making]]:
    """Every kind, by name."""
    small = Image.new("RGB", (32, 32), (9, 99, 199))
    png, jpeg = encoded(small, "PNG"), encoded(small, "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + bytes(62_000)
    tensor = {"name": "i", "datatype": "BYTES", "shape": [1], "data": ["aGk="]}
    numbers = b'{"inputs":[{"name":"i","datatype":"UINT8","shape":[1,9,9,3],"data":['
    part = b'--b\r\nContent-Disposition: form-data; name="p%d"\r\n\r\nv\r\n'

    yield "gRPC calls that stream", lambda: calling(STREAM, {"data": png}, streams=True)
    yield "gRPC of 20,000 keys", lambda: calling(PREDICT, {f"k{i}": b"" for i in range(20_000)})
    yield (
        "an id of 2 MB",
        lambda: posting(
            json.dumps({"id": "é" * 1_000_000, "inputs": [tensor]}).encode(),
            "application/json",
            route="infer",
        ),
    )
    yield (
        "EXIF of megabytes, packed",
        lambda: posting(instances(with_text(png, b"zTXt", b"a\0\0" + tags())), "application/json"),
    )
    yield (
        "EXIF of thousands of tags",
        lambda: posting(instances(encoded(small, "JPEG", exif=exif), 32), "application/json"),
    )
    yield "pictures of a million pixels in 88 bytes", lambda: posting(million(), "image/webp")
    yield "32 of these in one JSON", lambda: posting(instances(million()), "application/json")
    yield "a PNG of four million pixels with a colour key", lambda: posting(keyed(), "image/png")
    yield (
        "JPEG scans without data",
        lambda: posting(
            emptied(encoded(Image.new("RGB", (1024, 1024)), "JPEG", progressive=True), 12),
            "image/jpeg",
        ),
    )
    yield (
        "JSON of half a million numbers, which are read",
        lambda: posting(numbers + b"15," * 500_000 + b"1]}]}", "application/json"),
    )
    yield (
        "JSON of a million numbers",
        lambda: posting(numbers + b"1.5," * 1_000_000 + b"1]}]}", "application/json"),
    )
    yield (
        "JSON of two million lists",
        lambda: posting(b'{"instances":[' + b"[]," * 2_000_000 + b"[]]}", "application/json"),
    )
    yield (
        "multipart of 5,000 parts",
        lambda: posting(
            b"".join(part % i for i in range(5000)) + b"--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
    )
    yield (
        "unfinished bodies",
        lambda: holding(head("tiny", 6_000_000) + bytes(2_000_000), connections=50),
    )
    yield "bodies that trickle", lambda: holding(head("tiny", 6_000_000), connections=50, more=b"x")
    yield "idle connections", lambda: holding(b"", connections=400)
    yield "broken pictures", lambda: posting(jpeg[: len(jpeg) // 2], "image/jpeg")


def every_attack(*, grpc: bool = True) -> pytest.MarkDecorator:
    """A test for each attack, all but a few `slow`; without `grpc` those over HTTP alone."""
    return pytest.mark.parametrize(
        "attack",
        [
            pytest.param(attack, id=name, marks=() if name in FEW else pytest.mark.slow)
            for name, attack in attacks()
            if grpc or not name.startswith("gRPC")
        ],
    )


def form_fields(count: int) -> bytes:
    """A form of `count` fields."""
    return b"a&" * count


def pipelined(target: Target, count: int) -> list[bytes]:
    """Answers to `count` requests that one connection sends before it reads."""
    body = encoded(Image.new("RGB", (32, 32)), "PNG")
    request = head(target.model, len(body)) + body
    with closing(socket.create_connection(("127.0.0.1", target.port), timeout=20)) as connection:
        connection.sendall(request * count)
        data = BytesIO()
        with suppress(OSError):
            while data.getvalue().count(b"HTTP/1.1 ") < count:
                data.write(connection.recv(65536))
    return data.getvalue().split(b"HTTP/1.1 ")[1:]
