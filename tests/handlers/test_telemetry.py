"""Figures for Prometheus, most of them read off a real TorchServe."""

import logging
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml
from conftest import Server

from handlers import telemetry
from handlers.launch import METRICS
from handlers.telemetry import Metrics, declared
from handlers.verdict import Verdict

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
    deadline = time.monotonic() + 15
    while (now := read(server)).get(key, 0) < value and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def test_requests_images_errors_and_p_values_are_counted(
    server: Server, pixels: np.ndarray, encode: Callable[..., bytes]
) -> None:
    time.sleep(2.5)  # of earlier tests
    before = read(server)
    good, decisions = encode(pixels), []
    for body in (good, good, b"hello", good, b""):
        answer = requests.post(server.url, data=body, timeout=60).json()
        decisions.append(answer.get("decision", "error"))
    count = ("rampart_p_value_count", "")
    after = settled(server, count, before.get(count, 0) + 3)
    more = {key: value - before.get(key, 0) for key, value in after.items()}
    assert more["rampart_requests_total", "200"] == 3
    assert more["rampart_requests_total", "415"] == more["rampart_requests_total", "422"] == 1
    for decision in set(decisions):
        assert more["rampart_images_total", decision] == decisions.count(decision)
    assert more["rampart_errors_total", "unsupported_format"] == 1
    assert more["rampart_errors_total", "empty_body"] == 1
    p = requests.post(server.url, data=good, timeout=60).json()["detail"]["p_value"]
    assert more["rampart_p_value_sum", ""] == pytest.approx(3 * p, rel=1e-3)
    for bound in (*telemetry.BOUNDS["rampart_p_value"], float("inf")):
        le = "+Inf" if bound == float("inf") else f"{bound:g}"
        assert more["rampart_p_value_bucket", le] == 3 * (p <= bound)
    assert more["rampart_batch_images_count", ""] == 3
    for stage in ("decode", "graph", "response"):
        assert more["rampart_stage_seconds_count", stage] == 5
        assert 0 < more["rampart_stage_seconds_sum", stage] < 5
    assert after["rampart_engine_info", "cpu,fp32,full"] == 1
    assert after["rampart_false_alarm_rate", ""] == 0.01


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
        assert names.items() <= entries.items()


def cache(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves it open
        made = MetricsCacheYamlImpl(str(file))
        made.initialize_cache()
    return made


def verdict(p_value: float) -> Verdict:
    return Verdict("cat", 3, 0.5, "accept", (), {}, None, p_value, False, False)


def test_drift_is_told_of_a_hundred_images_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    figures = Metrics(cache(METRICS), "m", 900)
    for number in range(99):
        figures.judged(verdict((number + 1) / 200))  # below 0.5, where half should be above
    figures.hand_over()
    assert "rampart_drift" not in caplog.text
    figures.judged(verdict(0.5))
    figures.hand_over()
    assert "rampart_drift.Count:0.5|#model:m" in caplog.text
    assert "rampart_drift_limit.Count:0.143357|#model:m" in caplog.text
    caplog.clear()
    figures.hand_over()
    assert not caplog.text  # nothing new


def test_shadows_and_failures_of_the_defence_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    figures = Metrics(cache(METRICS), "m", 900)
    figures.judged(replace(verdict(0.001), detected=True))
    figures.judged(replace(verdict(0.001), detected=True, decision="flag"))
    figures.judged(replace(verdict(1.0), failed=True))
    figures.hand_over()
    assert "rampart_p_value_count.Count:2.0|" in caplog.text  # the third has none that counts
    for decision in ("shadow", "flag", "accept"):
        assert f"rampart_images_total.Count:1|#model:m,decision:{decision}|" in caplog.text
    assert "rampart_errors_total.Count:1|#model:m,type:defence_failure|" in caplog.text


def test_a_batch_that_never_ends_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Metrics(cache(METRICS), "m", 900)
    assert figures.alive()
    with figures.busy():
        assert figures.alive()
        monkeypatch.setattr(telemetry, "STUCK", 0.0)
        assert not figures.alive()
    assert figures.alive()


def test_without_our_metrics_a_line_says_so_once_and_nothing_breaks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)  # of which TorchServe's lines of metrics are
    for without in (cache(DEFAULT), None):
        caplog.clear()
        figures = Metrics(without, "m", 900)
        assert caplog.text.count("metrics_config=deploy/metrics.yaml") == 1
        figures.judged(verdict(0.5))
        figures.hand_over()
        assert "[METRICS]" not in caplog.text
