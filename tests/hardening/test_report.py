from pathlib import Path

import pytest

from hardening import report
from hardening.attacks import Threat


@pytest.mark.parametrize(
    ("value", "n", "low", "high"),
    # Published Wilson intervals: 0/10, 5/10, 81/263 (Newcombe 1998, table I).
    [(0.0, 10, 0.0, 0.2775), (0.5, 10, 0.2366, 0.7634), (81 / 263, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_match_published_ones(
    value: float, n: int, low: float, high: float
) -> None:
    assert report.wilson(value, n) == pytest.approx((low, high), abs=1e-4)


def test_a_row_carries_threat_count_and_interval() -> None:
    metric = report.Metric("pipeline", "full", "pgd20", 0.5, 100, Threat("Linf", 8 / 255))
    row = report.row(metric, data="test", command="rampart evaluate")
    assert (row["norm"], row["eps"], row["n"]) == ("Linf", "8/255", 100)
    assert row["interval"][0] < 0.5 < row["interval"][1]


def test_a_clean_figure_names_no_threat() -> None:
    row = report.row(report.Metric("classifier", "-", "clean", 0.9, 10), data="", command="")
    assert "eps" not in row
    assert "norm" not in row


def test_new_figures_replace_the_same_ones_and_no_others() -> None:
    threats = (None, Threat("Linf", 8 / 255), Threat("L2", 0.5))
    old = [
        report.row(report.Metric("pipeline", "full", "pgd20", 0.5, 10, t), data="d", command="old")
        for t in threats
    ]
    new = [
        report.row(
            report.Metric("pipeline", "full", "pgd20", 0.4, 10, threats[1]), data="d", command="new"
        )
    ]
    merged = report.merge(old, new)
    assert [(r.get("eps"), r["command"]) for r in merged] == [
        (None, "old"),
        ("0.5", "old"),
        ("8/255", "new"),
    ]


def test_the_table_shows_every_figure_with_its_interval() -> None:
    metric = report.Metric("pipeline", "full", "pgd20", 0.4213, 617, Threat())
    text = report.table([report.row(metric, data="", command="")])
    assert "42.1%" in text
    assert "38.3% to 46.1%" in text
    assert "Linf 8/255" in text


def test_a_card_comes_back_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert report.read_card(tmp_path) == {}
    report.write_card(tmp_path, {"metrics": []})
    assert report.read_card(tmp_path) == {"metrics": []}
