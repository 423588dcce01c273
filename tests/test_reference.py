"""What the reference lists is what there is."""

import json
import re
from pathlib import Path

import yaml
from documents import ROOT

from rampart.handlers.settings import SETTINGS, VARIABLES

SCHEMA = json.loads((ROOT / "hardening/report/card.schema.json").read_text())


def first_cells(text: str) -> set[str]:
    """The names in the first column of a page's tables."""
    cells = (line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_setting_and_every_variable_has_its_line() -> None:
    text = (ROOT / "docs/reference/settings.md").read_text()
    read = {name for file in python_files() for name in re.findall(r'"(RAMPART_\w+)"', file)}
    internal = {"RAMPART_WORKER", "RAMPART_WORKERS"}  # told to workers by `rampart serve`
    assert set(VARIABLES) < read
    assert first_cells(text) == SETTINGS | (read - internal)


def python_files() -> list[str]:
    """The sources that read the environment."""
    folders = ("handlers", "rampart", "hardening", "export")
    return [file.read_text() for folder in folders for file in (ROOT / folder).rglob("*.py")]


def test_a_card_has_no_entry_without_a_description() -> None:
    figure = SCHEMA["$defs"]["metric"]
    for name, entry in (SCHEMA["properties"] | figure["properties"]).items():
        assert entry["description"], name
    cards = list(Path(ROOT / "model_store").glob("*/card.json"))
    assert len(cards) > 4
    for card in cards:
        assert set(json.loads(card.read_text())) <= set(SCHEMA["properties"]), card


def test_every_field_of_a_verdict_has_its_line() -> None:
    answers = (ROOT / "docs/reference/answers.md").read_text()
    described = yaml.safe_load((ROOT / "deploy/openapi.yaml").read_text())["components"]["schemas"]
    named = {name.removeprefix("detail.") for name in first_cells(answers)}
    for kind in ("Verdict", "SceneVerdict"):
        fields = described[kind]["properties"]
        assert set(fields) - {"detail"} | set(fields["detail"]["properties"]) <= named, kind
