"""The simulation beside what theory knows, and its sender beside a server of known slowness."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import capacity
from capacity import Sender, Service, poisson, simulated

STEADY = [np.ones(1)] * 2


def service(sizes: list[float], seconds: list[float], beside: float = 0.0) -> Service:
    return Service(np.array(sizes), np.array(seconds), beside, STEADY)


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
    times = simulated(service([1, 3], [1.0, 2.0], 0.5), arrivals, np.random.default_rng(0))
    assert times == pytest.approx([1.5, 3.3, 3.1, 2.9, 1.5])


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
        times, refused = sender.open(np.array([0.0, 0.3]))
        sender.close()
        server.shutdown()
    assert len(times) == 1 and refused == 0.5
    assert 0.05 <= times[0] < 0.25
