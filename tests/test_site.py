"""The documentation site as `make docs` builds it, in a real browser."""

import functools
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pytest
from browser import Page, Pipe, chromium, violations
from documents import ROOT

MKDOCS = ROOT / ".venv" / "docs" / "bin" / "mkdocs"
# One page of each kind: prose, code, long tables, what is made of the code, and no page at all.
KINDS = {
    "home": "",
    "tutorial": "tutorials/photographs/",
    "notebook": "examples/calibrate_and_serve/",
    "guide": "serve/",
    "results": "results/",
    "benchmarks": "benchmarks/",
    "answers": "reference/answers/",
    "command line": "reference/command-line/",
    "python": "reference/python/",
    "nothing": "404.html",
}


class Quiet(SimpleHTTPRequestHandler):
    """A file server that says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address on this machine."""
    if not MKDOCS.is_file():
        pytest.skip("needs mkdocs: `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    build = [MKDOCS, "build", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, env=quiet, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipe]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_serious_on_the_site_and_no_page_scrolls_sideways(
    kind: str, site: str, pipe: Pipe
) -> None:
    page = Page(pipe)
    for width, dark in product((390, 1100), (False, True)):
        page.resize(width, dark=dark)
        page.open(f"{site}/{KINDS[kind]}")
        scheme = page.js("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")
        assert page.js("document.documentElement.scrollWidth") == width
        assert violations(page) == [], (width, dark)


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_its_search_finds_a_page(
    site: str, pipe: Pipe
) -> None:
    page = Page(pipe)
    page.resize(1100)
    page.open(f"{site}/")
    page.click(".md-search__input")
    page.call("Input.insertText", text="quarantine")
    page.wait("document.querySelectorAll('.md-search-result__item').length > 0", 20)
    names = "performance.getEntriesByType('resource').map(one => one.name)"
    loaded = page.js(names)
    assert len(loaded) > 3 and all(name.startswith(site) for name in loaded)
    assert not page.complaints()
