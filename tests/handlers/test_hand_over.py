"""Figures on their way through TorchServe to Prometheus."""

import logging
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import yaml
from servers import Server

from rampart.handlers.defended import seat
from rampart.handlers.hand_over import HandOver
from rampart.handlers.telemetry import Metrics, declared
from rampart.handlers.verdict import Verdict
from rampart.launch.java import METRICS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

DEFAULT = Path(ts.__file__).parent / "configs" / "metrics.yaml"
LINE = re.compile(r"(rampart_\w+){(.*)} (\S+)")


def read(server: Server) -> dict[tuple[str, str], float]:
    """Rampart's figures by name and labels, `le` among them, less the model's."""
    text = requests.get(f"http://127.0.0.1:{server.port + 2}/metrics", timeout=30).text
    found = {}
    for name, labels, value in LINE.findall(text):
        known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert known.pop("model") == "tiny" and known.pop("Hostname")
        found[name, ",".join(known[key] for key in sorted(known))] = float(value)
    return found


def settled(server: Server, key: tuple[str, str], value: float) -> dict[tuple[str, str], float]:
    """The figures once `key` has come to `value`: they are handed over once a second."""
    deadline = time.monotonic() + 60
    while (now := read(server)).get(key, 0) < value and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def quiet(server: Server) -> dict[tuple[str, str], float]:
    """The figures once those of earlier tests have come."""
    deadline, before = time.monotonic() + 60, None
    while True:
        now = read(server)
        counted = {key: now[key] for key in now if key[0].endswith("_total")}
        if counted == before:
            return now
        assert time.monotonic() < deadline
        before = counted
        time.sleep(2.5)


def test_figures_of_requests_and_images_arrive(
    server: Server, pixels: np.ndarray, encode: Callable[..., bytes]
) -> None:
    before = quiet(server)
    for body in (encode(pixels), b"hello", encode(pixels)):
        requests.post(server.url, data=body, timeout=60)
    count = ("rampart_p_value_count", "")
    after = settled(server, count, before.get(count, 0) + 2)
    more = {key: value - before.get(key, 0) for key, value in after.items()}
    assert more["rampart_requests_total", "200"] == 2 and more["rampart_requests_total", "415"] == 1
    assert more["rampart_errors_total", "unsupported_format"] == 1
    assert more["rampart_p_value_bucket", "+Inf"] == more[count] == 2
    assert more["rampart_stage_seconds_count", "graph"] == 3
    assert after["rampart_engine_info", "cpu,fp32,full,9000"] == 1
    assert after["rampart_false_alarm_rate", "9000"] == 0.01
    assert after["rampart_heartbeat_seconds", "9000"] > 0


def test_torchserves_own_figures_stay(server: Server) -> None:
    text = requests.get(f"http://127.0.0.1:{server.port + 2}/metrics", timeout=30).text
    assert re.search(r'^ts_inference_requests_total{.*model_name="tiny"', text, re.M)


def test_the_file_declares_all_of_ours_and_all_that_torchserve_has_by_default() -> None:
    ours, default = (yaml.safe_load(file.read_text()) for file in (METRICS, DEFAULT))
    for part in ("ts_metrics", "model_metrics"):
        for kind, entries in default[part].items():
            assert {entry["name"] for entry in entries} <= {e["name"] for e in ours[part][kind]}
    for kind, names in declared().items():
        entries = {
            entry["name"]: tuple(entry["dimensions"]) for entry in ours["model_metrics"][kind]
        }
        more = ("worker",) if kind == "gauge" else ()
        assert {name: (*labels, *more) for name, labels in names.items()}.items() <= entries.items()


def cache(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves it open
        made = MetricsCacheYamlImpl(str(file))
        made.initialize_cache()
    return made


def verdict(p_value: float) -> Verdict:
    return Verdict("cat", 3, 0.5, "accept", (), {}, None, p_value, False, False)


def test_what_has_changed_is_handed_over_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    figures = Metrics()
    hand_over = HandOver(figures, cache(METRICS), "m", worker="9000")
    figures.count_verdict(verdict(0.5))
    figures.count_verdict(verdict(0.5))
    hand_over.run_once()
    assert "rampart_p_value_count.Count:2.0|#model:m" in caplog.text
    assert "rampart_images_total.Count:2|#model:m,decision:accept|" in caplog.text
    caplog.clear()
    hand_over.run_once()
    assert not caplog.text  # nothing new


def test_a_gauge_is_of_its_worker_and_comes_again_where_it_would_be_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    figures = Metrics()
    hand_over = HandOver(figures, cache(METRICS), "m", worker="9001", forgets=True)
    figures.set("rampart_query_store_up", 1)
    figures.count("rampart_requests_total", "200")
    gauge = "rampart_query_store_up.Count:1|#model:m,worker:9001|"
    for asked in (1, 0):
        hand_over.run_once()
        assert caplog.text.count(gauge) == 1
        assert caplog.text.count("rampart_requests_total.Count:1|#model:m,status:200|") == asked
        caplog.clear()


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (
            ["ts", "--sock-type", "unix", "--sock-name", "/tmp/a.b/sock.9001", "--c", "d"],
            "9001",
        ),
        (["ts", "--port", "9002"], "9002"),
        (["other"], ""),
    ],
)
def test_a_worker_goes_by_the_number_of_its_socket(words: list[str], number: str) -> None:
    assert seat(words) == number


@pytest.mark.slow
def test_gauges_of_two_workers_stand_side_by_side(
    launch: Callable[..., Server], tiny_archive: Path
) -> None:
    server = launch(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    end = time.monotonic() + 20
    while len(beats := beats_of(server)) < 2:
        assert time.monotonic() < end, beats
        time.sleep(0.5)
    one = psutil.Process(server.worker_pids()[0])
    one.suspend()
    time.sleep(3)
    late = beats_of(server)
    one.resume()
    ages = sorted(late[worker] - beats[worker] for worker in beats)
    assert ages[0] <= 1 and ages[1] >= 2, (beats, late)  # one stands still, and can be seen
    assert server.end() == 0


def beats_of(server: Server) -> dict[str, float]:
    """The last sign of life of each worker, by its number."""
    return {key[1]: at for key, at in read(server).items() if key[0] == "rampart_heartbeat_seconds"}


def test_without_our_metrics_a_line_says_so_once_and_nothing_breaks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)  # of which TorchServe's lines of metrics are
    for without in (cache(DEFAULT), None):
        caplog.clear()
        figures = Metrics()
        hand_over = HandOver(figures, without, "m")
        assert caplog.text.count("metrics_config=deploy/metrics.yaml") == 1
        figures.count_verdict(verdict(0.5))
        hand_over.run_once()
        assert "[METRICS]" not in caplog.text
