import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml
from documents import block, blocks, run_by_tests
from features import CANNOT, FEATURES, PARTLY, SERVERS, reasons, told

from rampart import cli
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.report import card as report

ROOT = Path(cli.__file__).parents[2]
README = ROOT / "README.md"
GUIDES = [file for file in sorted((ROOT / "docs").glob("*.md")) if file.name != "index.md"]
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CODE_OF_CONDUCT", "SECURITY")]


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda file: file.stem)
def test_files_that_a_document_links_to_exist(document: Path) -> None:
    text = document.read_text()
    assert "@@" not in text
    for target, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", text):
        file = document.parent / target if target else document
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(document: Path) -> set[str]:
    """Where links into a document may lead, by its headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", text).strip().lower().replace(" ", "-") for text in headings}


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    text = README.read_text()
    assert text.count("\n") <= 150
    for document in GUIDES:
        assert f"](docs/{document.name})" in text


def test_the_tables_in_the_documents_are_those_of_the_cards() -> None:
    folders = [file.parent for file in (ROOT / "model_store").glob("*/card.json")]
    models = sorted(folders, key=lambda f: (not f.name.startswith("traffic-signs"), f.name))
    for model in models:
        report.check_card(report.read_card(model))
    text, results = README.read_text(), (ROOT / "docs" / "results.md").read_text()
    assert report.fenced(text, "models", report.model_table(models)) == text
    for name in ("traffic-signs", "cifar10", "blood-cells"):
        assert f"<!-- figures of {name}:" in results
    assert report.with_figures(results, models) == results


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda file: file.stem)
def test_every_block_of_code_is_run_by_a_test_or_says_why_not(document: Path) -> None:
    name = str(document.relative_to(ROOT))
    shown = blocks(name)
    assert document.read_text().count("```") == 2 * len(shown)
    assert {one.language for one in shown} <= {"sh", "python", "json", ""}
    if document != README:  # where it saves lines
        assert not re.search(
            r"^ {4}(\S*bin/\w+|rampart|curl|pip|make) ", document.read_text(), re.M
        )
    run = run_by_tests()
    for one in shown:
        said = re.fullmatch(r"<!-- Not run in CI: (.+)\. -->", one.before)
        assert bool(said) == (one.language in ("sh", "python") and (name, one.text) not in run), one
        for file in re.findall(r"[\w/]+\.py", said[1] if said else ""):
            assert (ROOT / file).is_file(), file


def test_make_knows_every_target_that_a_document_tells_you_to_make() -> None:
    text = "\n".join(document.read_text() for document in [*DOCUMENTS, *OTHERS])
    word = r"(?:[A-Z]+=)?[\w./-]+"
    targets = set(re.findall(rf"(?:^ {{4}}|`|^)make ({word}(?: {word})*)", text, re.M))
    assert {"serve", "serve MODEL=blood-cells", "test", "slow", ".venv/harden"} <= targets
    for target in sorted(targets):
        done = subprocess.run(
            ["make", "-n", *target.split()], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def defined(text: str) -> dict[str, Any]:
    """What a block of Python defines."""
    names: dict[str, Any] = {}
    exec(compile(text, "block", "exec"), names)
    return names


def test_the_detector_that_contributors_are_shown_is_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rampart.hardening.model import detectors

    monkeypatch.setattr(detectors, "DETECTORS", dict(detectors.DETECTORS))
    darkness = defined(block("CONTRIBUTING.md", "class Darkness"))["Darkness"]
    assert detectors.DETECTORS["darkness"] is darkness
    views = SimpleNamespace(x=torch.full((2, 3, 8, 8), 0.25))
    assert darkness(10, 4)(views).tolist() == [0.75, 0.75]


def test_the_attack_that_contributors_are_shown_attacks() -> None:
    from rampart.hardening.attack import ladder

    whitening = defined(block("CONTRIBUTING.md", "def whiten"))["whitening"]
    assert isinstance(whitening, ladder.Attack)
    x, label = torch.full((2, 3, 8, 8), 0.25), torch.zeros(2, dtype=torch.int64)
    attacked = whitening.craft(None, x, label, threat=Threat(eps=0.5), budget=ladder.QUICK)
    assert (attacked == 0.75).all()


def test_the_reference_names_every_error_and_every_metric() -> None:
    errors, metrics = (
        (ROOT / "docs" / "reference" / f"{name}.md").read_text() for name in ("answers", "metrics")
    )
    files = [*(ROOT / "handlers").rglob("*.py"), *(ROOT / "rampart" / "launch").glob("*.py")]
    code = "".join(file.read_text() for file in files)
    kinds = set(re.findall(r'ImageError\(\s*(\d{3}),\s*"(\w+)"', code))
    assert len(kinds) > 35
    assert set(re.findall(r"^\| (\d{3}) \| `(\w+)`", errors, re.MULTILINE)) == kinds
    listed = yaml.safe_load((ROOT / "rampart" / "data" / "metrics.yaml").read_text())
    every = {row["name"] for rows in listed["model_metrics"].values() for row in rows}
    ours = {
        re.sub("_(bucket|sum|count)$", "", name) for name in every if name.startswith("rampart_")
    }
    assert set(re.findall(r"^\| `(rampart_\w+)`", metrics, re.MULTILINE)) == ours


def test_the_site_has_a_place_for_every_document() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for document in DOCUMENTS[1:]:
        assert f": {document.relative_to(ROOT / 'docs')}" in site


def test_the_table_of_servers_says_yes_where_a_test_is_marked_and_nowhere_else() -> None:
    marked = {
        (name, server)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name, servers in re.findall(
            r'^@feature\("(.+?)", (.+)\)$', file.read_text(), re.MULTILINE
        )
        for server in re.findall(r'"(.+?)"', servers)
    }
    lines = (ROOT / "docs" / "servers.md").read_text().splitlines()
    (_, *servers), _, *rows = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")
    ]
    assert tuple(servers) == SERVERS and tuple(row[0] for row in rows) == FEATURES
    assert not marked & CANNOT.keys() and PARTLY.keys() <= marked
    for name, *cells in rows:
        for server, cell in zip(servers, cells, strict=True):
            assert cell == told(name, server, shown=(name, server) in marked), (name, server)
    assert reasons() in (ROOT / "docs" / "servers.md").read_text()


def documented() -> list[str]:
    text = "".join(document.read_text() for document in DOCUMENTS).replace("\\\n", " ")
    return re.findall(r"^\.venv/bin/rampart (.+)$", text, re.MULTILINE)


def test_the_documents_show_the_way_from_training_to_serving() -> None:
    verbs = {line.split()[0] for line in documented()}
    assert {"train", "purifier", "calibrate", "evaluate", "archive", "serve", "attack"} <= verbs


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_line_parses(line: str) -> None:
    verb, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(cli.app).commands[verb]
    command.make_context(verb, arguments)


def test_every_option_that_a_document_names_exists() -> None:
    group = typer.main.get_command(cli.app)
    parameters = [p for verb in (group, *group.commands.values()) for p in verb.params]
    known = {"--help", *(o for p in parameters for o in (*p.opts, *p.secondary_opts))}
    ours = re.compile(rf"(?:--|(?:rampart|{'|'.join(group.commands)}) )")
    for document in [*DOCUMENTS, *OTHERS]:
        for code in re.findall(r"`([^`\n]+)`", document.read_text()):
            if ours.match(code):
                named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
                assert named <= known, f"{document.name}: {code}"
