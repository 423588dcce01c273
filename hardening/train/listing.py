"""What lies in a folder of class folders: pictures by class, and what is left out and why."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Pictures of formats that the endpoint refuses as well.
OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ppm")
# What splits are called, as train, Testing, seg_train, train_images.
SPLIT = re.compile(
    r"(seg|data|images?)?[_-]?(train|test|val|valid|validation|dev|eval|pred)(ing)?"
    r"([_-]?(set|data|images?))?"
)
HIDDEN = ("__MACOSX", "@eaDir")  # what macOS and Synology leave beside files, as `.` names are
HIDDEN_REASON, LOOSE_REASON = "hidden", "in no class folder"


class Listing(NamedTuple):
    """The files of each class, sorted; `left_out` counts what is not taken, by reason."""

    classes: dict[str, list[Path]]
    left_out: Counter[str]

    def lines(self) -> list[str]:
        """What was left out, in words."""
        return [f"{count} {reason}" for reason, count in sorted(self.left_out.items())]


def list_classes(path: Path) -> Listing:
    """The pictures under `path`, each class in a folder of its own.

    Raises ValueError where there is none, where the folders are splits, where one folder holds the
    class folders, or where a class has pictures of other formats alone.
    """
    left_out: Counter[str] = Counter()
    found: dict[str, list[Path]] = {}
    for entry in sorted(path.iterdir()):
        if is_hidden(entry.name):
            left_out[HIDDEN_REASON] += 1
        elif entry.is_dir():
            found[entry.name] = list_pictures(entry, left_out)
            check_formats(entry, found[entry.name])
        elif entry.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES):
            left_out[LOOSE_REASON] += 1
    empty = [name for name, files in found.items() if not files]
    if empty:
        left_out[f"without pictures ({', '.join(empty)})"] += len(empty)
    classes = {name: files for name, files in found.items() if files}
    check_layout(path, classes)
    return Listing(classes, left_out)


def check_layout(path: Path, classes: Mapping[str, list[Path]]) -> None:
    """Raise ValueError where the folders in `path` are no classes."""
    if not classes:
        raise ValueError(f"{path} has no pictures: expected {path}/CLASS/NAME.{{jpg,png,webp}}")
    first = next(iter(classes))
    if all(SPLIT.fullmatch(name.lower()) for name in classes):
        train = next((name for name in classes if "train" in name.lower()), first)
        raise ValueError(
            f"{path} holds splits, not classes: pass one of them, such as {path / train}"
        )
    if len(classes) > 1:
        return
    inner = [file.relative_to(path / first).parts[:-1] for file in classes[first]]
    names = sorted({parts[0] for parts in inner if parts})
    if len(names) > 1 and all(inner):
        raise ValueError(
            f"{path} has a single folder, {first}, with the class folders inside"
            f" ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): pass {path / first}"
        )


def check_formats(folder: Path, files: list[Path]) -> None:
    """Raise ValueError where a class has pictures, and none that is read."""
    if files:
        return
    endings = {file.suffix.lower() for file in walk(folder, Counter())} & set(OTHER_SUFFIXES)
    if endings:
        raise ValueError(
            f"{folder} has only pictures in {', '.join(sorted(endings))}: save them as PNG, or"
            " remove the folder"
        )


def pictures_below(folder: Path) -> list[Path]:
    """What is named as a picture at any depth, sorted. Folders that are links are not entered."""
    return list_pictures(folder, Counter())


def list_pictures(folder: Path, left_out: Counter[str]) -> list[Path]:
    """As `pictures_below`, with what is left out counted."""
    files = []
    for file in walk(folder, left_out):
        suffix = file.suffix.lower()
        if suffix in SUFFIXES:
            files.append(file)
        else:
            left_out[f"named {suffix}" if suffix else "without an ending"] += 1
    return sorted(files)


def walk(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The files at any depth, but for hidden ones and those in hidden folders."""
    for home, folders, names in os.walk(folder):
        if hidden := sum(map(is_hidden, (*folders, *names))):
            left_out[HIDDEN_REASON] += hidden
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(home, name) for name in names if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems and notebooks leave behind."""
    return name.startswith(".") or name in HIDDEN
