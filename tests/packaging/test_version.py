"""The version stands in pyproject.toml; what repeats it for people and machines says the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


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
        ("deploy/kubernetes/kustomization.yaml", r'newTag: "(.+)"'),
        ("deploy/kserve/runtime.yaml", r"example/rampart:(\S+)"),
        ("deploy/ray/rayservice.yaml", r"example/rampart-ray:(\S+)"),
        ("deploy/ray/train.yaml", r"example/rampart-train:(\S+)"),
    ],
)
def test_what_is_deployed_is_this_version(file: str, pattern: str) -> None:
    assert set(re.findall(pattern, (ROOT / file).read_text())) == {VERSION}
