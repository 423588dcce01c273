"""An archive that others may have built: unpacked within bounds, checked against its hashes."""

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import yaml

from rampart.export.archive import NAME
from rampart.handlers.contents import HANDLER, verify
from rampart.hardening.model.card import FILE
from rampart.hardening.model.presence import check_archive

LARGEST = 8_000_000_000  # bytes of an archive's files, unpacked
TEXT = 64_000_000  # bytes of a file to be read as JSON, YAML or code
MANIFEST = "MAR-INF/MANIFEST.json"
# Files that torch-model-archiver adds. Older archives list no hash for them.
ADDED = {MANIFEST, "model-config.yaml", "defended.py"}
SETTINGS = 100_000  # characters of model-config.yaml, whose reader is slow


def unpack(archive: Path, work: Path) -> dict[str, str | None]:
    """Unpack an archive into `work`, checked; returns the SHA-256 that it lists of each file."""
    check_archive(archive)
    try:
        with zipfile.ZipFile(archive) as packed:
            check_entries(archive, packed.infolist())
            packed.extractall(work)
            names = [name for name in packed.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{archive} is not an archive of TorchServe: {error}") from error
    try:
        hashes = verify(work)
    except ValueError as error:
        raise ValueError(f"{archive}: {error}") from error
    if missing := sorted(ADDED - set(names)):
        raise ValueError(f"{archive} has no {missing[0]}: rebuild the archive")
    # TorchServe runs the handler at the root, which has no hash of its own in older archives.
    if (work / "defended.py").read_bytes() != (work / HANDLER).read_bytes():
        raise ValueError(f"{archive}: its defended.py has changed since it was packed")
    return {name: hashes.get(name) for name in names}


def check_entries(archive: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise ValueError for names that lead out of the archive, and for sizes that fill a disk."""
    names = [entry.filename for entry in entries]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"{archive} holds a file named {name!r}: do not trust it")
    if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > LARGEST:
        raise ValueError(f"{archive} contains a file twice, or more than 8 GB: do not trust it")
    for entry in entries:
        if entry.file_size > TEXT and entry.filename.endswith((".json", ".yaml", ".py")):
            raise ValueError(
                f"{archive} holds {entry.filename!r} of more than 64 MB: do not trust it"
            )


def name_of(work: Path) -> str:
    """The model's name in an unpacked archive. Raises ValueError where it is none that we give: it
    becomes a part of paths.
    """
    try:
        name = json.loads((work / MANIFEST).read_text())["model"]["modelName"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} names no model: rebuild the archive") from error
    if not (isinstance(name, str) and re.fullmatch(NAME, name)):
        raise ValueError(f"{MANIFEST} names the model {name!r}: do not trust the archive")
    return name


def card_of(work: Path) -> dict[str, Any]:
    """The card of an unpacked archive. Raises ValueError where it is none."""
    try:
        card = json.loads((work / FILE).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"card.json is not JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("card.json is not a card: rebuild the archive")
    return card


def settings_of(work: Path) -> dict[str, Any]:
    """Our settings in an unpacked archive. ValueError for no YAML, or one that refers to itself."""
    text = (work / "model-config.yaml").read_text(errors="replace")
    if len(text) > SETTINGS:
        raise ValueError("model-config.yaml is too long for settings: rebuild the archive")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("model-config.yaml refers to itself: rebuild the archive")
        return dict((yaml.safe_load(text) or {}).get("rampart") or {})
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"model-config.yaml is not YAML of ours: {error}") from error
