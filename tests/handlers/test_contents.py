"""What an archive holds, and that it is what was packed."""

import json
from pathlib import Path

import pytest

from rampart.handlers.contents import PARTS, SOURCES, verify


def test_an_archive_carries_every_needed_file_with_its_hash(unpacked: Path) -> None:
    listed = json.loads((unpacked / "sha256.json").read_text())
    assert {*PARTS, *SOURCES} <= set(listed)
    assert {"rampart/__init__.py", "rampart/handlers/queries/watch.py"} <= set(SOURCES)
    verify(unpacked)


@pytest.mark.parametrize("name", [*PARTS, *SOURCES])
def test_a_changed_file_is_named(unpacked: Path, name: str) -> None:
    path = unpacked / name
    original = path.read_bytes()
    try:
        path.write_bytes(original + b" ")
        with pytest.raises(ValueError, match=f"{name} is not the file that was packed"):
            verify(unpacked)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing from the archive"):
            verify(unpacked)
    finally:
        path.write_bytes(original)


def test_an_unlisted_needed_file_is_named(unpacked: Path) -> None:
    path = unpacked / "sha256.json"
    original = path.read_text()
    listed = json.loads(original)
    try:
        path.write_text(json.dumps({key: listed[key] for key in listed if key != "graph.onnx"}))
        with pytest.raises(ValueError, match=r"graph\.onnx is not listed in sha256\.json"):
            verify(unpacked)
        path.unlink()
        with pytest.raises(ValueError, match=r"sha256\.json is missing"):
            verify(unpacked)
    finally:
        path.write_text(original)


def test_code_of_an_archive_without_a_hash_is_named(unpacked: Path) -> None:
    added = unpacked / "rampart" / "handlers" / "added.py"
    added.write_text("")
    try:
        with pytest.raises(ValueError, match=r"handlers/added\.py is not listed in sha256\.json"):
            verify(unpacked)
    finally:
        added.unlink()
