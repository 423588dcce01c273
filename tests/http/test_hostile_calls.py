"""Many gRPC calls whose messages never end: memory stays bounded, and others are answered."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from servers import Server, free_port
from tritonclient.utils import InferenceServerException

CONNECTIONS, STREAMS, MESSAGE = 12, 40, 6_000_000
DATA, HEADERS, RST, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def field(name: str, value: str) -> bytes:
    """A header as HPACK's literal without indexing (RFC 7541, section 6.2.2), below 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Endless:
    """A connection of many calls; each sends of its message what the windows allow, but the end."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._window, self._initial = 65_535, 65_535
        self._streams: dict[int, list[int]] = {}  # window, bytes that are left
        self._next = 1
        self._buffer = b""
        self.sent = 0

    def run(self, stop: threading.Event) -> None:
        with suppress(OSError), self._socket:
            self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b""))
            self._socket.settimeout(0.02)
            while not stop.is_set():
                while len(self._streams) < STREAMS:
                    self._open()
                self._read()
                self._send()

    def _open(self) -> None:
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/inference.GRPCInferenceService/ModelInfer",
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(field(*item) for item in headers.items())
        self._socket.sendall(frame(HEADERS, 4, self._next, block))
        self._streams[self._next] = [self._initial, MESSAGE - 1]
        self._next += 2

    def _send(self) -> None:
        for stream, state in list(self._streams.items()):
            size = min(self._window, state[0], 16_384, state[1])
            if size <= 0:
                continue
            first = state[1] == MESSAGE - 1
            data = (struct.pack(">BI", 0, MESSAGE) + bytes(size))[:size] if first else bytes(size)
            self._socket.settimeout(10)
            self._socket.sendall(frame(DATA, 0, stream, data))
            self._socket.settimeout(0.02)
            self.sent += size
            self._window -= size
            state[0] -= size
            state[1] -= size

    def _read(self) -> None:
        with suppress(TimeoutError):
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise OSError("closed")
            self._buffer += piece
        while len(self._buffer) >= 9:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + length:
                return
            kind, flags, stream = struct.unpack(">BBI", self._buffer[3:9])
            self._take(kind, flags, stream, self._buffer[9 : 9 + length])
            self._buffer = self._buffer[9 + length :]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & 1:
            for at in range(0, len(payload), 6):
                number, value = struct.unpack(">HI", payload[at : at + 6])
                if number == 4:
                    for state in self._streams.values():
                        state[0] += value - self._initial
                    self._initial = value
            self._socket.sendall(frame(SETTINGS, 1, 0, b""))
        elif kind == PING and not flags & 1:
            self._socket.sendall(frame(PING, 1, 0, payload))
        elif kind == WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream == 0:
                self._window += more
            elif stream in self._streams:
                self._streams[stream][0] += more
        elif kind == RST or (kind == HEADERS and flags & 1):
            self._streams.pop(stream, None)


@pytest.fixture(scope="module")
def spoken(start: Callable[..., Server], tiny_archive: Path) -> Server:
    port = free_port()
    server = start(tiny_archive, port=port, grpc_port=port + 1)
    assert "Rampart is ready" in server.read(), server.lines
    return server


@pytest.mark.slow
def test_messages_without_end_take_bounded_memory_and_good_calls_are_answered(
    spoken: Server, encode: Callable[..., bytes], pixels: np.ndarray
) -> None:
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([encode(pixels)], dtype=object))
    stop, hostile = threading.Event(), [Endless(spoken.grpc) for _ in range(CONNECTIONS)]
    threads = [threading.Thread(target=one.run, args=(stop,)) for one in hostile]
    with triton.InferenceServerClient(f"127.0.0.1:{spoken.grpc}") as client:
        client.infer("tiny", [image])
        before = sum(process.memory_info().rss for process in spoken.family())
        for thread in threads:
            thread.start()
        try:
            held, took, start = 0, 10.0, time.monotonic()
            # For six seconds; on a busy machine longer, until a call is answered as if alone.
            while (spent := time.monotonic() - start) < 6 or (took > 1.5 and spent < 60):
                began, took = time.monotonic(), 10.0
                with suppress(InferenceServerException):
                    client.infer("tiny", [image], client_timeout=10)
                    took = time.monotonic() - began
                held = max(held, sum(process.memory_info().rss for process in spoken.family()))
                time.sleep(0.1)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert sum(one.sent for one in hostile) > 20e6  # they were let send
    assert held - before < 250e6
    assert took < 1.5
    assert spoken.process.poll() is None and psutil.pid_exists(spoken.process.pid)
