"""Where data sets of boxes keep what they tell; known without torch."""

from pathlib import Path

PARTS = {"train": "train", "val": "validation", "valid": "validation", "test": "test"}
ARCHITECTURES = ("ssdlite", "ssd", "fasterrcnn")  # of object detectors
HEAD = 4096  # bytes at either end of a JSON file that are looked at


def has_boxes(path: Path) -> bool:
    """Whether `path` is laid out as VOC or COCO is."""
    return path.is_dir() and bool(voc_home(path) or coco_files(path))


def voc_home(path: Path) -> Path | None:
    """The folder at or right below `path` that holds VOC's Annotations."""
    homes = (path, *sorted(inner for inner in path.iterdir() if inner.is_dir()))
    return next((home for home in homes if (home / "Annotations").is_dir()), None)


def coco_files(path: Path) -> dict[str, list[Path]]:
    """COCO's files of boxes at `path` by the part of the data that they tell of: instances_*.json
    where there are such, for COCO has captions and keypoints of people beside them.
    """
    files = sorted((*path.glob("*.json"), *path.glob("annotations/*.json")))
    files = [file for file in files if tells_boxes(file)]
    files = [file for file in files if "instances" in file.stem] or files
    if len(files) == 1:
        return {"": files}
    named = {
        part: [file for file in files if part_of(file.stem) == part] for part in PARTS.values()
    }
    return {part: some for part, some in named.items() if some}


def part_of(name: str) -> str:
    """The part of a data set that a name speaks of; "" for none."""
    return next((part for word, part in PARTS.items() if word in name.lower()), "")


def tells_boxes(file: Path) -> bool:
    """Whether a JSON file has what COCO's have, by its beginning and end: some have 500 MB."""
    with file.open("rb") as stream:
        head = stream.read(HEAD)
        stream.seek(max(0, file.stat().st_size - HEAD))
        ends = head + stream.read()
    return any(word in ends for word in (b'"categories"', b'"annotations"', b'"images"'))


def splits_name(arch: str) -> tuple[str, str]:
    """(object detector, its ResNet) of a name as ssd-resnet34; ResNet-18 where it names none."""
    name, _, backbone = arch.partition("-")
    return name, backbone or "resnet18"
