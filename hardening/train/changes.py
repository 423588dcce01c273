"""What changed in the images of a run since it began, picture by picture."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rampart.hardening.model.images import Images
from rampart.hardening.model.provenance import fingerprints
from rampart.hardening.train.data import Folder
from rampart.hardening.train.shards import size_of

FILE = "images.json"
NAMED = 3  # pictures that are named of each kind
Listing = dict[str, str]  # what stands for the content of each image, by its name


def listing(parts: Iterable[Images | Folder]) -> Listing:
    """All images of a run: by name, or by their pixels where they have none."""
    found: Listing = {}
    for images in parts:
        names = images.paths or ("",) * len(images)
        if isinstance(images, Folder):
            stamps = [str(size_of(file)) for file in images.files]
        else:
            stamps = [f"{print_:016x}" for print_ in fingerprints(images.image).tolist()]
        labels = [images.classes[label] for label in images.label.tolist()]
        each = zip(names, stamps, labels, strict=True)
        found |= {name or stamp: f"{stamp} {label}" for name, stamp, label in each}
    return found


def note(folder: Path, parts: Iterable[Images | Folder]) -> None:
    """Write down in `folder` which images a run begins with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(listing(parts)))


def since(folder: Path, parts: Iterable[Images | Folder]) -> str:
    """What is new, missing or other than the images that `folder` notes; empty for nothing."""
    file = folder / FILE
    if not file.is_file():
        return ""
    return in_words(json.loads(file.read_text()), listing(parts))


def in_words(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """How `new` images differ from `old` ones; empty where they do not."""
    kinds = {
        "new": [name for name in new if name not in old],
        "missing": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    found = {kind: names for kind, names in kinds.items() if names}
    return ", ".join(f"{len(names):,} {kind} ({named(names)})" for kind, names in found.items())


def named(names: list[str]) -> str:
    """The first of some pictures."""
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
