"""The version stands in pyproject.toml; what repeats it for people and machines says the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def test_the_newest_release_of_the_changelog_is_the_one_to_cite() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    unreleased, newest, *_ = re.findall(r"^## \[(.+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert unreleased == ("Unreleased", "")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == (VERSION, str(citation["date-released"]))
    assert str(citation["version"]) == VERSION
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("docs/serve.md", r"rampart_endpoint-(\d[\w.]*)-py3"),
        ("docs/screen.md", r"rampart_endpoint-(\d[\w.]*)-py3"),
        ("docs/harden.md", r"rampart_endpoint-(\d[\w.]*)-py3"),
        ("deploy/kubernetes/kustomization.yaml", r'newTag: "(.+)"'),
        ("deploy/kserve/runtime.yaml", r"example/rampart:(\S+)"),
        ("deploy/ray/rayservice.yaml", r"example/rampart-ray:(\S+)"),
        ("deploy/ray/train.yaml", r"example/rampart-train:(\S+)"),
    ],
)
def test_what_is_deployed_is_this_version(file: str, pattern: str) -> None:
    assert set(re.findall(pattern, (ROOT / file).read_text())) == {VERSION}


def test_the_badges_are_local_and_say_what_the_project_file_says() -> None:
    least, below = re.findall(r"3\.\d+", PROJECT["requires-python"])
    newest = f"3.{int(below.removeprefix('3.')) - 1}"
    said = {
        "version": f"Version: {VERSION}",
        "python": f"Python: {least} to {newest}",
        "licence": f"Licence: {PROJECT['license']}",
    }
    shown = re.findall(r"\[!\[(.+?)\]\((.+?)\)\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert [(words, file) for words, file, _ in shown] == [
        (words, f"docs/badges/{name}.svg") for name, words in said.items()
    ]
    for words, file, target in shown:
        left, right = words.split(": ")
        texts = re.findall(r"<text .+>(.+)</text>", (ROOT / file).read_text())
        assert [text.capitalize() for text in texts] == [left, right]
        assert (ROOT / target).is_file()
