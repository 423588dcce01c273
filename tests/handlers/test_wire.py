"""What TorchServe's front end sends its worker, read by ours and by TorchServe's own reader."""

import socket
import struct
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest

from rampart.handlers.defended import incoming
from rampart.handlers.protocols.choice import read
from rampart.handlers.wire import MAX_PARTS, TOO_MANY, Reader, install

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)
    from ts.protocol import otf_message_handler as torchserve

END = struct.pack(">i", -1)
Part = tuple[bytes, bytes, bytes]


def text(value: bytes) -> bytes:
    return struct.pack(">i", len(value)) + value


def message(requests: list[tuple[bytes, list[tuple[bytes, bytes]], list[Part]]]) -> bytes:
    out = b""
    for name, headers, parts in requests:
        out += text(name)
        out += b"".join(text(key) + text(value) for key, value in headers) + END
        out += b"".join(text(piece) for part in parts for piece in part) + END
    return out + END


def sent(data: bytes) -> socket.socket:
    """The end of a connection on which `data` arrive."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs:
            theirs.sendall(data)

    threading.Thread(target=send, daemon=True).start()
    return ours


def parts_of(data: bytes) -> list[dict[str, Any]]:
    with sent(data) as connection:
        (request,) = Reader(connection).batch()
    parts: list[dict[str, Any]] = request["parameters"]
    return parts


def test_a_batch_reads_as_torchserve_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    draw = np.random.default_rng(0)
    batch = []
    for number in range(5):
        headers = [(f"h{i}".encode(), draw.bytes(i * 7).hex().encode()) for i in range(number)]
        parts = [
            (f"p{i}".encode(), b"image/png" if i % 2 else b"", draw.bytes(int(size)))
            for i, size in enumerate(draw.integers(0, 300_000, number))
        ]
        batch.append((str(number).encode(), headers, parts))
    with sent(message(batch)) as ours, sent(message(batch)) as theirs:
        assert Reader(ours).batch() == torchserve._retrieve_inference_msg(theirs)


def test_messages_that_follow_each_other_are_told_apart() -> None:
    first = message([(b"1", [], [(b"body", b"", b"x" * 10)])])
    second = message([(b"2", [], [(b"body", b"", b"y")])])
    with sent(b"I" + first + b"I" + second) as connection:
        reader = Reader(connection)
        names = []
        for _ in range(2):
            assert reader.take(1) == b"I"
            names.append(reader.batch()[0]["requestId"])
    assert names == [b"1", b"2"]


def test_a_worker_that_is_bound_reads_so_and_keeps_what_came_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_retrieve_buffer", "_retrieve_inference_msg"):
        monkeypatch.setattr(torchserve, name, getattr(torchserve, name))
    assert install()
    batches = [message([(name, [], [(b"a", b"", b"")] * 100)]) for name in (b"1", b"2")]
    with sent(b"".join(b"I" + batch for batch in batches)) as connection:
        for name in (b"1", b"2"):
            command, (request,) = torchserve.retrieve_msg(connection)
            assert command == b"I" and request["requestId"] == name
            assert request["parameters"][-1]["name"] == TOO_MANY


@pytest.mark.parametrize("size", [0, 1, 15, 16, 70_000])
def test_what_comes_after_the_parts_that_are_kept_is_passed_over(size: int) -> None:
    parts = [(b"%d" % i, b"", b"v") for i in range(MAX_PARTS)]
    more = [(b"n" * min(size, 20), b"", b"v" * size)] * 40
    data = message([(b"1", [], parts), (b"2", [], parts + more), (b"3", [], [])])
    with sent(data) as connection:
        requests = Reader(connection).batch()
    assert [len(request["parameters"]) for request in requests] == [MAX_PARTS, MAX_PARTS + 1, 0]
    assert requests[1]["parameters"][-1]["name"] == TOO_MANY


def test_two_million_parts_are_passed_over_in_seconds() -> None:
    part = text(b"a") + text(b"") + text(b"")
    data = text(b"1") + END + part * 2_000_000 + END + END
    began = time.process_time()
    assert parts_of(data)[-1]["name"] == TOO_MANY
    assert time.process_time() - began < 5  # TorchServe's own reader takes half a minute


def test_a_request_of_too_many_parts_is_413() -> None:
    parts = parts_of(message([(b"1", [], [(b"%d" % i, b"", b"") for i in range(100)])]))
    fields = {part["name"]: part["value"] for part in parts}
    (error,) = read(incoming(fields, {})).images
    assert (error.code, error.type) == (413, "too_many_parts")  # type: ignore[union-attr]


def test_the_worker_ends_when_the_front_end_has_gone() -> None:
    with sent(text(b"1") + b"\0\0") as connection, pytest.raises(SystemExit):
        Reader(connection).batch()
