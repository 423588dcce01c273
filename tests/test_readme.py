import re
import shlex
from pathlib import Path

import pytest
import typer
from features import FEATURES, SERVERS

from rampart import cli
from rampart.hardening.report import card as report

ROOT = Path(cli.__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_files_that_a_document_links_to_exist(document: Path) -> None:
    text = document.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^):#]+)[^)]*\)", text):
        assert (document.parent / target).is_file(), target


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    text = README.read_text()
    assert text.count("\n") <= 150
    for document in DOCUMENTS[1:]:
        assert f"](docs/{document.name})" in text


def test_the_tables_in_the_documents_are_those_of_the_cards() -> None:
    store = ROOT / "model_store"
    models = [store / "cifar10", *sorted(f for f in store.glob("cifar10-*") if f.is_dir())]
    for model in models:
        report.check_card(report.read_card(model))
    text, results = README.read_text(), (ROOT / "docs" / "results.md").read_text()
    assert report.fenced(text, "models", report.model_table(models)) == text
    figures = report.markdown(report.read_card(models[0]))
    assert report.fenced(results, "figures", figures) == results


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
    told = {
        (name, server): cell
        for name, *cells in rows
        for server, cell in zip(servers, cells, strict=True)
    }
    assert {place for place, cell in told.items() if cell} == marked
    assert {cell for cell in told.values() if cell} == {"yes"}


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
