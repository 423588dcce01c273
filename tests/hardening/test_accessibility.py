"""Shipped report pages in a real browser, for everybody."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, Pipe, chromium, violations

STORE = Path(__file__).parents[2] / "model_store"
REPORTS = sorted(STORE.glob("*/report.html"))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipe]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as one:
        yield one


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.parent.name)
@pytest.mark.slow
def test_axe_finds_nothing_serious_in_a_report_and_it_scrolls_in_one_direction(
    report: Path, dark: bool, pipe: Pipe
) -> None:
    page = Page(pipe)
    for width in (390, 1100, 1600):
        page.resize(width, dark=dark)
        page.open(report.as_uri())
        assert page.js("document.documentElement.scrollWidth") == width
        assert violations(page) == []


def test_there_are_reports_to_look_at() -> None:
    assert {report.parent.name for report in REPORTS} >= {"cifar10", "traffic-signs"}
