import re
import shlex
from pathlib import Path

import pytest
import typer

from rampart import cli
from rampart.hardening.report import card as report

README = Path(cli.__file__).parents[2] / "README.md"


def test_the_readme_is_finished_and_its_files_exist() -> None:
    text = README.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert (README.parent / target).is_file(), target


def test_the_tables_in_the_readme_are_those_of_the_cards() -> None:
    store = README.parent / "model_store"
    models = [store / "cifar10", *sorted(f for f in store.glob("cifar10-*") if f.is_dir())]
    for model in models:
        report.check_card(report.read_card(model))
    assert report.with_tables(README.read_text(), models) == README.read_text()


def documented() -> list[str]:
    text = README.read_text().replace("\\\n", " ")
    return re.findall(r"^\.venv/bin/rampart (.+)$", text, re.MULTILINE)


def test_the_readme_documents_the_way_from_training_to_serving() -> None:
    verbs = {line.split()[0] for line in documented()}
    assert {"train", "purifier", "calibrate", "evaluate", "archive", "serve", "attack"} <= verbs


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_line_parses(line: str) -> None:
    verb, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(cli.app).commands[verb]
    command.make_context(verb, arguments)
