"""The simulation beside what theory knows, and its sender beside a server of known slowness."""

import asyncio
import re
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from rampart.handlers import service as services
from rampart.handlers.errors import ImageError
from rampart.handlers.http.lane import Lane
from rampart.handlers.telemetry import Metrics
from rampart.handlers.types import Incoming, Reply

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import capacity
from capacity import Sender, Service, poisson, simulated

STEADY = np.zeros(1)


def service(sizes: list[float], seconds: list[float]) -> Service:
    return Service(np.array(sizes), np.array(seconds), STEADY)


@pytest.mark.parametrize("load", [0.5, 0.9])
def test_batches_of_one_wait_as_long_as_pollaczek_and_khinchine_say(
    load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "LARGEST", 1)
    draws = np.random.default_rng(0)
    times = simulated(service([1, 2], [0.01, 0.02]), poisson(load / 0.01, 400_000, draws), draws)
    assert times.mean() == pytest.approx(0.01 + 0.01 * load / (2 * (1 - load)), rel=0.05)


def test_what_came_while_a_batch_ran_is_the_next_one() -> None:
    arrivals = np.array([0.0, 0.2, 0.4, 0.6, 5.0])
    times = simulated(service([1, 3], [1.0, 2.0]), arrivals, np.random.default_rng(0))
    assert times == pytest.approx([1.0, 2.8, 2.6, 2.4, 1.0])


def test_no_batch_is_larger_than_the_servers_largest() -> None:
    arrivals = np.concatenate([[0.0], np.full(40, 0.5)])
    times = simulated(service([1, 2], [1.0, 1.0]), arrivals, np.random.default_rng(0))
    assert len(set(np.round(times, 6))) == 3  # one, 32 and the 8 that are left


def test_the_sender_counts_from_when_a_request_was_due_and_tells_what_was_refused() -> None:
    status = {b"a": 200, b"b": 503}

    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.05)
            self.send_response(status[body])
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    # One thread: it answers a connection until that is closed.
    with HTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        sender = Sender(url, [b"a", b"b"])
        times, refused = sender.open(np.array([-1.0, 0.3]))  # the first is late
        sender.close()
        server.shutdown()
    assert len(times) == 1 and refused == 0.5
    assert times[0] >= 0.99  # it was due 0.95 s before, and takes 0.05


class Known:
    """A server with the real queue, whose batches take a known time; what it counts is at /metrics.

    Sleep needs no core, so that it takes as long on a machine that others use.
    """

    def __init__(self) -> None:
        self.runs = self.images = 0
        self.lane = Lane(cast(services.Service, self), Metrics())
        self.root, self.loop = "", asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,))
        self.thread.start()
        ready.wait()

    def answer(self, batch: Sequence[Incoming]) -> list[Reply]:
        time.sleep(0.03 + 0.001 * len(batch))
        self.runs, self.images = self.runs + 1, self.images + len(batch)
        return [Reply(200, {}, b"ok")] * len(batch)

    def refuse(self, incoming: Incoming, error: ImageError) -> Reply:
        return Reply(error.code, {}, b"busy")

    def _run(self, ready: threading.Event) -> None:
        server = self.loop.run_until_complete(asyncio.start_server(self._talk, "127.0.0.1", 0))
        self.root = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        self.loop.run_forever()
        server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                if length:
                    body = await reader.readexactly(int(length[1]))
                    reply = await self.lane.answer(Incoming({}, [body]), seconds=30)
                    status, body = reply.status, reply.body
                else:
                    status, body = 200, self._figures().encode()
                start = f"HTTP/1.1 {status} .\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(start.encode() + body)
        writer.close()

    def _figures(self) -> str:
        return (
            f'rampart_batch_images_count{{model="m"}} {self.runs}\n'
            f'rampart_batch_images_sum{{model="m"}} {self.images}\n'
        )

    def end(self) -> None:
        self.lane.close()
        time.sleep(0.2)  # for connections that are closed
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.mark.slow
def test_what_is_measured_of_a_server_predicts_its_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "HANDED_OVER", 0.0)
    server = Known()
    sender = Sender(f"{server.root}/x", [b"a" * 100])
    _, found = capacity.one_round(sender, server.root, 1)
    sender.close()
    server.end()
    for share, row in found.items():
        assert row.refused == 0
        assert row.predicted[0] == pytest.approx(row.seen[0], rel=0.2), (share, row)
        assert row.predicted[1] == pytest.approx(row.seen[1], rel=0.2), (share, row)
