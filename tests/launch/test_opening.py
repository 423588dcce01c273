"""An archive that cannot be opened: the message says which, and what to do."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from full_disk import full

from rampart.handlers.telemetry import Metrics
from rampart.launch.opening import open_archive

Repack = Callable[[Path, Mapping[str, bytes | None]], Path]


@pytest.mark.parametrize(
    "changes",
    [
        {"MAR-INF/MANIFEST.json": None},
        {"MAR-INF/MANIFEST.json": b"no JSON"},
        {"MAR-INF/MANIFEST.json": b"\xff"},
        {"MAR-INF/MANIFEST.json": b"[]"},
        {"MAR-INF/MANIFEST.json": b'{"model": 5}'},
        {"model-config.yaml": None},
        {"model-config.yaml": b"[: no YAML"},
        {"model-config.yaml": b"- a list"},
    ],
)
def test_what_is_no_archive_of_ours_is_named(
    changes: dict[str, bytes | None], repack: Repack, tmp_path: Path
) -> None:
    archive = repack(tmp_path, changes)
    with pytest.raises(ValueError) as caught:
        open_archive(archive, Metrics())
    assert str(caught.value) == f"{archive} is not a Rampart archive: rebuild it"


def test_an_archive_that_is_not_there_or_finds_no_room_is_not_called_broken(
    tiny_archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"none\.mar cannot be .*: No such file or directory"):
        open_archive(tmp_path / "none.mar", Metrics())
    told = r"tiny\.mar cannot be .*: File too large.*TMPDIR"
    with full(10_000), pytest.raises(ValueError, match=told):
        open_archive(tiny_archive, Metrics())
