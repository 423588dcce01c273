"""A test report out of a model's card, laid out as laboratories do, on screen and on paper.

It says what was tested, by which hashes, how, on what, with which uncertainty and within which
limits, as ISO/IEC 17025 (7.8) asks of reports. It states no conformity, and holds nothing that no
command made.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rampart.handlers.engine import sha256
from rampart.hardening.attack import ladder
from rampart.hardening.judge.checks import Check
from rampart.hardening.model.card import FILE, Figure, Row, failed_checks, read_card
from rampart.hardening.model.folder import logged
from rampart.hardening.report import redteam
from rampart.hardening.report.appendix import in_short
from rampart.hardening.report.elements import Table, in_words, title
from rampart.hardening.report.frameworks import (
    FRAMEWORKS,
    NOT_MEASURED,
    Framework,
    rows,
    versions,
)
from rampart.hardening.report.page import template

TESTED = re.compile(r"weights\.safetensors|graph-.*\.onnx|(calibration|ranges)-.*\.json|card\.json")
NOT_LOGGED = "not in the log"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
# Root, as in containers, needs --no-sandbox; the page is our own and loads nothing.
PRINT = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"),
    *("--disable-background-networking", "--disable-component-update"),
)
UNCERTAINTY = (
    "Intervals are of 95% confidence, over the choice of images alone: Wilson score intervals for"
    " shares, bootstrap over images for differences and areas."
    " Random starts of attacks, seeds of training and the choice of data are not in them.",
    "An attack finds images that fool the model and proves nothing of those that it did not fool."
    " Each robust figure bounds the true one from above.",
)
LIMITS = (
    "The figures hold for the files and the threat model of section 1, and the images of section 3."
    " Other norms, larger perturbations, patches, poisoned training data and theft of the model"
    " were not tested unless a row says so.",
    "This report states no conformity with any law, standard or framework. Section 6 says where"
    " figures answer to their terms, and what was not measured.",
)


class Report(NamedTuple):
    """What the page shows: facts as pairs, tables, and words of each section."""

    name: str
    number: str
    date: str
    item: Sequence[tuple[str, str]]
    failed: Sequence[str]
    tables: dict[str, Sequence[Table]]


def evidence(folder: Path) -> str:
    """The report of a model folder as one HTML page.

    Raises ValueError where its card holds no figures.
    """
    card = read_card(folder)
    if not card.get("metrics"):
        raise ValueError(f"{folder / FILE} holds no figures: run rampart evaluate --into-card")
    digests = dict(hashes(folder))
    page = template("evidence.html")
    return page.render(
        report=Report(
            name=card.get("model", folder.name),
            number=digests[FILE][:12],
            date=datetime.now(UTC).date().isoformat(),
            item=list(item(card)),
            failed=failed_checks(card),
            tables={
                "item": [files(digests)],
                "method": list(methods(folder, card)),
                "data": [data(card)],
                "results": list(results(card)),
                "checks": list(checks(card)),
                "frameworks": [answers(card, framework) for framework in FRAMEWORKS],
            },
        ),
        uncertainty=UNCERTAINTY,
        limits=LIMITS,
    )


def write(folder: Path, out: Path) -> Path:
    """Write the report of a model folder to `out`, .html, or .pdf through a browser.

    Raises ValueError where its card holds no figures, the name ends otherwise, or no browser is
    there to print.
    """
    text = evidence(folder)
    if out.suffix == ".html":
        out.write_text(text, encoding="utf-8")
        return out
    if out.suffix != ".pdf":
        raise ValueError(f"{out} must end with .html or .pdf")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ValueError(
            f"{out} needs a browser to print it, one of {', '.join(BROWSERS)}: install one, or"
            f" write {out.with_suffix('.html')} and print that from yours"
        )
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "evidence.html"
        page.write_text(text, encoding="utf-8")
        flags = [*PRINT, f"--user-data-dir={scratch}/profile", f"--print-to-pdf={out.absolute()}"]
        done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True)
    if done.returncode or not out.is_file():
        raise ValueError(f"{browser} did not print {out}: {done.stderr.strip()[-300:]}")
    return out


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file that was tested, with its SHA-256 as it is now."""
    for file in sorted(folder.iterdir()):
        if TESTED.fullmatch(file.name):
            yield file.name, sha256(file)


def item(card: Row) -> Iterator[tuple[str, str]]:
    """What was tested, in pairs."""
    net = card["classifier"]
    yield "network", f"{net['arch']}, width {net['width']:g}, {net['classes']} classes"
    yield "input", f"{net['image_size']} x {net['image_size']} pixels, RGB, 8 bits"
    yield "trained on", card["data"]
    yield "threat model", card.get("threat_model", NOT_MEASURED)
    yield "software", versions(card) or NOT_MEASURED


def files(digests: dict[str, str]) -> Table:
    """The files that were tested."""
    return Table("Files", ("file", "SHA-256, computed for this report"), list(digests.items()))


def methods(folder: Path, card: Row) -> Iterator[Table]:
    """The attacks that figures name, and the commands that ran, with the weights they ran on."""
    named = {figure.name.partition("@")[0] for figure in map(Figure.of, card["metrics"])}
    known = [(title(a.name), a.meaning) for a in ladder.RUNGS if a.name in named]
    yield Table("Attacks", ("attack", "the share counts"), known)
    runs = map(json.loads, logged(folder))
    dates = {run["command"]: f"{run['time'][:10]}, {run['weights'][:12]}" for run in runs}
    commands = dict.fromkeys(row["command"] for row in card["metrics"])
    body = [(dates.get(command, NOT_LOGGED), command) for command in commands]
    yield Table("Commands", ("date, weights", "command"), body)


def data(card: Row) -> Table:
    """The images of each figure, and the digests of the model's own."""
    sizes: dict[str, int] = {}
    for row in card["metrics"]:
        sizes[row["data"]] = max(row["n"], sizes.get(row["data"], 0))
    body = [(name, str(most), "") for name, most in sizes.items()]
    own = card.get("images", {}).items()
    body += [
        (f"{name.replace('_', '-')} images of the model", str(p["count"]), p["sha256"])
        for name, p in own
    ]
    return Table("Images", ("set", "images", "SHA-256 of their pixels"), body)


def results(card: Row) -> Iterator[Table]:
    """Every figure of the card, a table for each set of images."""
    figures = list(map(Figure.of, card["metrics"]))
    for name in dict.fromkeys(figure.data for figure in figures):
        body = [
            (figure.subject.title, title(figure.name), figure.threat or "-", *in_words(figure),
             str(figure.n))
            for figure in figures
            if figure.data == name
        ]  # fmt: skip
        head = ("what was tested", "figure", "threat", "value", "95% interval", "n")
        yield Table(name, head, body)
    yield from redteam.tables(card)


def checks(card: Row) -> Iterator[Table]:
    """The self-checks of the attacks."""
    if found := card.get("checks"):
        body = [
            ("passed" if c.passed else "FAILED", *in_short(c), c.where)
            for c in (Check(**row) for row in found)
        ]
        yield Table("Self-checks of the attacks", ("result", "check", "subject", "seen"), body)


def answers(card: Row, framework: Framework) -> Table:
    """What the card has for each entry of a framework."""
    return Table(
        framework.name, ("entry", "name", "what was measured"), list(rows(framework, card))
    )
