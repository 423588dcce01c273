"""Figures of several workers as one, in Prometheus's own format."""

import json
import os
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families as parse

from rampart.handlers.http.exposition import Exposition
from rampart.handlers.telemetry import Metrics

MODEL = ("model", "tiny")


def samples(exposition: Exposition) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = exposition.text().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def figures() -> Metrics:
    metrics = Metrics()
    metrics.count("rampart_requests_total", "200")
    metrics.observe("rampart_batch_images", 3)
    metrics.set("rampart_false_alarm_rate", 0.01)
    metrics.set("rampart_query_store_up", 1)
    return metrics


def other(folder: Path, pid: int, *rows: list[object]) -> None:
    (folder / f"{pid}.json").write_text(json.dumps(rows))


def test_every_kind_of_figure_reads_back(tmp_path: Path) -> None:
    read = samples(Exposition([("tiny", figures())], tmp_path))
    assert read["rampart_requests_total", frozenset({MODEL, ("status", "200")})] == 1
    assert read["rampart_batch_images_bucket", frozenset({MODEL, ("le", "4")})] == 1
    assert read["rampart_batch_images_bucket", frozenset({MODEL, ("le", "2")})] == 0
    assert read["rampart_batch_images_sum", frozenset({MODEL})] == 3
    assert read["rampart_false_alarm_rate", frozenset({MODEL})] == 0.01


def test_counters_of_all_workers_add_up_also_of_those_that_have_ended(tmp_path: Path) -> None:
    alive, dead = os.getppid(), 2**22 + 1  # above the largest pid
    for pid, count in ((alive, 10), (dead, 100)):
        other(tmp_path, pid, ["tiny", "rampart_requests_total", ["200"], count])
    read = samples(Exposition([("tiny", figures())], tmp_path))
    assert read["rampart_requests_total", frozenset({MODEL, ("status", "200")})] == 111


def test_gauges_tell_of_the_worst_worker_that_lives(tmp_path: Path) -> None:
    alive, dead = os.getppid(), 2**22 + 1
    drift: list[object] = ["tiny", "rampart_drift", [], 0.7]
    other(tmp_path, alive, ["tiny", "rampart_query_store_up", [], 0.0], drift)
    other(tmp_path, dead, ["tiny", "rampart_false_alarm_rate", [], -1.0])
    metrics = figures()
    metrics.set("rampart_drift", 0.2)
    read = samples(Exposition([("tiny", metrics)], tmp_path))
    assert read["rampart_query_store_up", frozenset({MODEL})] == 0
    assert read["rampart_drift", frozenset({MODEL})] == 0.7
    assert read["rampart_false_alarm_rate", frozenset({MODEL})] == 0.01


def test_drift_and_its_limit_are_of_the_worker_that_is_furthest_beyond_its_own(
    tmp_path: Path,
) -> None:
    few = (["tiny", "rampart_drift", [], 0.13], ["tiny", "rampart_drift_limit", [], 0.14])
    other(tmp_path, os.getppid(), *few)  # no further than chance, of few images
    metrics = Metrics()
    metrics.set("rampart_drift", 0.12)
    metrics.set("rampart_drift_limit", 0.06)
    read = samples(Exposition([("tiny", metrics)], tmp_path))
    assert read["rampart_drift", frozenset({MODEL})] == 0.12
    assert read["rampart_drift_limit", frozenset({MODEL})] == 0.06


def test_requests_in_flight_are_those_of_all_workers_that_live_together(tmp_path: Path) -> None:
    alive, dead = os.getppid(), 2**22 + 1
    for pid, count in ((alive, 4.0), (dead, 50.0)):
        other(tmp_path, pid, ["tiny", "rampart_requests_in_flight", [], count])
    metrics = figures()
    metrics.set("rampart_requests_in_flight", 3)
    read = samples(Exposition([("tiny", metrics)], tmp_path))
    assert read["rampart_requests_in_flight", frozenset({MODEL})] == 7


def test_two_versions_of_a_model_share_their_figures_and_a_worker_does_not_read_its_own_file(
    tmp_path: Path,
) -> None:
    exposition = Exposition([("tiny", figures()), ("tiny", figures())], tmp_path)
    exposition.save()
    read = samples(exposition)
    assert read["rampart_requests_total", frozenset({MODEL, ("status", "200")})] == 2
    assert [file.name for file in tmp_path.iterdir()] == [f"{os.getpid()}.json"]
