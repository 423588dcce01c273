"""What people and programs read about the server, on the server itself."""

import re
from html import unescape
from itertools import product
from pathlib import Path

import pytest
import requests
from browser import Page, chromium, violations
from described import assert_described
from servers import Server

from rampart.handlers.http import pages


def test_the_page_at_the_root_names_the_model_and_its_links_lead_somewhere(front: Server) -> None:
    text = requests.get(front.root, timeout=10).text
    assert "<b>tiny</b> 1.0" in text and "/predictions/tiny/1.0" in text
    links = re.findall(r'href="([^"]+)"', text)
    assert "/docs" in links
    for link in links:
        assert requests.get(front.root + link, timeout=10).status_code == 200, link


def test_the_manual_shows_every_operation_and_loads_nothing_from_elsewhere(front: Server) -> None:
    answer = requests.get(f"{front.root}/docs", timeout=10)
    paths = requests.get(f"{front.root}/openapi.json", timeout=10).json()["paths"]
    assert {"/predictions/{model}", "/v2/models/{model}/infer", "/v2/health/ready"} <= set(paths)
    text = unescape(answer.text)
    assert all(path in text for path in paths)
    assert '"enum": [\n   "tiny"\n  ]' in text
    assert not re.search(r"<script|src=|href=|@import|url\(", text)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_models_name_is_text_and_no_html() -> None:
    assert "<i>" not in pages.overview([("<i>", "<i>")])


@pytest.mark.slow
@pytest.mark.server
def test_axe_finds_nothing_serious_and_no_page_scrolls_sideways(
    front: Server, tmp_path: Path
) -> None:
    with chromium(tmp_path / "profile") as pipe:
        page = Page(pipe)
        for address, width, dark in product(("/", "/docs"), (390, 1100), (False, True)):
            page.resize(width, dark=dark)
            page.open(front.root + address)
            assert page.js("document.documentElement.scrollWidth") == width
            assert page.js("getComputedStyle(document.body).colorScheme") == "light dark"
            assert violations(page) == []


@pytest.mark.slow
@pytest.mark.server
def test_schemathesis_finds_no_answer_that_the_own_description_does_not_allow(
    front: Server, tmp_path: Path
) -> None:
    assert_described(front.root, tmp_path)
