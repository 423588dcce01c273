"""Pictures with boxes as data sets lay them out: Pascal VOC's XML files, and COCO's JSON.

VOC counts pixels from 1 and names the last one that a box holds (Everingham et al. 2010, annotation
guidelines); here a box ends where its last pixel does, counted from 0.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from rampart.handlers.errors import ImageError
from rampart.hardening.objects.places import PARTS, coco_files, part_of, voc_home
from rampart.hardening.train.data import fault_lines
from rampart.hardening.train.decoding import open_picture
from rampart.hardening.train.listing import SUFFIXES

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
SLACK = 1.0  # pixels that a box may reach beyond its picture: tools round in their own ways


class Annotation(NamedTuple):
    """One picture with its objects as a file lists them, unchecked."""

    source: str  # the file that tells, and where in it
    picture: Path
    boxes: list[Box]
    names: list[str]
    size: tuple[int, int] | None = None  # as annotated


class Layout(NamedTuple):
    """What a data set says: its classes, and the annotations of each part that it has."""

    classes: tuple[str, ...]
    parts: dict[str, list[Annotation]]  # "" where it is not divided


class Scene(NamedTuple):
    """One picture and its objects, checked; boxes in pixels of the upright picture."""

    picture: Path
    boxes: list[Box]
    labels: list[int]


def read_layout(path: Path) -> Layout:
    """What lies at `path`. Raises FileNotFoundError or ValueError with the remedy."""
    if not path.is_dir():
        raise FileNotFoundError(f"no data at {path}: pass a folder in the layout of VOC or COCO")
    if home := voc_home(path):
        return read_voc(home)
    if files := coco_files(path):
        return read_coco(path, files)
    raise ValueError(
        f"{path} has no boxes: expected {path}/Annotations/NAME.xml beside JPEGImages (VOC), or"
        f" {path}/annotations/instances_train.json (COCO)"
    )


def read_voc(home: Path) -> Layout:
    """VOC: Annotations/NAME.xml, JPEGImages/NAME.jpg, and ImageSets/Main/PART.txt if there are."""
    files = sorted((home / "Annotations").glob("*.xml"))
    every = {file.stem: voc_annotation(file, home / "JPEGImages") for file in files}
    classes = sorted({name for annotation in every.values() for name in annotation.names})
    parts: dict[str, list[Annotation]] = {}
    for file in sorted((home / "ImageSets" / "Main").glob("*.txt")):
        if file.stem not in PARTS:  # as trainval, and lists for one class
            continue
        names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        if missing := [name for name in names if name not in every]:
            raise ValueError(
                f"{file} names {len(missing)} pictures without an annotation ({missing[0]}): add"
                f" {home / 'Annotations' / missing[0]}.xml, or take the line out"
            )
        parts[PARTS[file.stem]] = [every[name] for name in names]
    return Layout(tuple(classes), parts or {"": list(every.values())})


def voc_annotation(file: Path, pictures: Path) -> Annotation:
    """What one of VOC's files tells. Raises ValueError where it is none."""
    try:
        root = ElementTree.parse(file).getroot()
        objects = root.findall("object")
        boxes = [voc_box(item) for item in objects]
        names = [(item.findtext("name") or "").strip() for item in objects]
        sides = [root.findtext(f"size/{side}") for side in ("width", "height")]
        width, height = (int(side) if side else 0 for side in sides)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is not a VOC annotation ({error}): save it again") from error
    name = (root.findtext("filename") or "").strip()
    choices = (pictures / name, *(pictures / f"{file.stem}{suffix}" for suffix in SUFFIXES))
    picture = next((choice for choice in choices if choice.is_file()), choices[0])
    return Annotation(str(file), picture, boxes, names, (width, height) if width else None)


def voc_box(item: ElementTree.Element) -> Box:
    """The box of one object."""
    left, top, right, bottom = (
        float(item.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")
    )
    return left - 1, top - 1, right, bottom


def read_coco(path: Path, files: dict[str, list[Path]]) -> Layout:
    """COCO: one file for each part, pictures by name in any folder beside; crowds are left out.

    Classes are those of all parts, first of the one that trains, in the order of their numbers.
    """
    classes: dict[str, None] = {}
    parts: dict[str, list[Annotation]] = {}
    found = pictures_by_name(path)
    for part, some in sorted(files.items(), key=lambda item: item[0] != "train"):
        if len(some) > 1:
            raise ValueError(
                f"{path} has {len(some)} files for its part {part}"
                f" ({', '.join(file.name for file in some)}): keep the one with the boxes there"
            )
        file = some[0]
        try:
            content = json.loads(file.read_text())
            named = {item["id"]: item["name"] for item in content["categories"]}
            drafts = list(coco_annotations(file, content, named))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a COCO file with boxes ({error}): it needs images, annotations and"
                " categories"
            ) from error
        classes |= dict.fromkeys(named[index] for index in sorted(named))
        parts[part] = [
            one._replace(picture=coco_picture((path, file), one.picture, found)) for one in drafts
        ]
    return Layout(tuple(classes), parts)


def pictures_by_name(path: Path) -> dict[str, list[Path]]:
    """The picture files below `path` by their own name."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            found.setdefault(file.name, []).append(file)
    return found


def coco_annotations(
    file: Path, content: dict[str, Any], named: dict[int, str]
) -> Iterator[Annotation]:
    """The pictures that one of COCO's files tells of, by their names there."""
    objects: dict[int, list[dict[str, Any]]] = {}
    for item in content["annotations"]:
        if not item.get("iscrowd"):
            objects.setdefault(item["image_id"], []).append(item)
    for image in content["images"]:
        own = objects.get(image["id"], [])
        corners = [tuple(map(float, item["bbox"])) for item in own]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in corners]
        names = [named.get(item["category_id"], f"category {item['category_id']}") for item in own]
        name = image["file_name"]
        size = (image["width"], image["height"])
        yield Annotation(f"{file}: {name}", Path(name), boxes, names, size)


def coco_picture(places: tuple[Path, Path], name: Path, found: dict[str, list[Path]]) -> Path:
    """The picture that the second of two `places`, a data set and a file of it, calls `name`.

    Folders of the name count, then one that speaks of the part. Raises ValueError where several
    are left.
    """
    path, file = places
    same = found.get(name.name, [])
    for choice in (path / name, file.parent / name):
        if choice.is_file():
            return choice
    ends = name.parts
    some = [entry for entry in same if entry.parts[-len(ends) :] == ends] or same
    part = part_of(file.stem)
    near = [entry for entry in some if part_of(str(entry.parent.relative_to(path))) == part]
    some = near or some
    if len(some) > 1:
        raise ValueError(
            f"{file}: {name} may be {some[0]} or {some[1]}: say in file_name which folder it is in"
        )
    return some[0] if some else file.parent / name


def checked(
    layout: Layout, *, classes: Sequence[str] | None = None, skip_bad: bool = False
) -> tuple[dict[str, list[Scene]], list[str]]:
    """The scenes of each part, and what was left out. Raises ValueError that lists all faults.

    With `classes` no other class may occur; `skip_bad` leaves out bad boxes, and pictures that
    cannot be read.
    """
    known = {name: index for index, name in enumerate(classes or layout.classes)}
    faults: list[str] = []
    parts = {
        part: [scene for one in some if (scene := check(one, known, faults.append))]
        for part, some in layout.parts.items()
    }
    if faults and not skip_bad:
        raise ValueError(
            f"{len(faults)} boxes or pictures to put right (--skip-bad leaves them out):\n"
            f"  {fault_lines(faults)}"
        )
    return parts, faults


def check(
    annotation: Annotation, known: dict[str, int], fault: Callable[[str], None]
) -> Scene | None:
    """The scene of one picture without its bad boxes, each of which `fault` is told of."""
    source, picture = annotation.source, annotation.picture
    try:
        opened = open_picture(picture, 1)
        opened.check_opaque()
    except (OSError, ValueError, ImageError) as error:
        fault(f"{source}: {error}" if str(picture) in str(error) else f"{picture}: {error}")
        return None
    size = opened.sides
    if annotation.size and annotation.size != size:
        width, height = annotation.size
        fault(
            f"{source}: drawn on a picture of {width}x{height}, but {picture.name} has"
            f" {size[0]}x{size[1]} pixels"
        )
        return None
    scene = Scene(picture, [], [])
    for number, (box, name) in enumerate(zip(annotation.boxes, annotation.names, strict=True), 1):
        if wrong := box_fault(box, size) or ("" if name in known else "is of an unknown class"):
            corners = ", ".join(f"{corner:g}" for corner in box)
            fault(f"{source}: box {number}, {name} ({corners}), {wrong}")
            continue
        left, top, right, bottom = box
        inside = (max(0.0, left), max(0.0, top), min(right, size[0]), min(bottom, size[1]))
        scene.boxes.append(inside)
        scene.labels.append(known[name])
    return scene


def box_fault(box: Box, size: tuple[int, int]) -> str:
    """What is wrong with a box on a picture of `size` (width, height); "" for nothing."""
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        return "is not finite"
    # VOC's box of one pixel ends where it begins.
    if right - left <= SLACK or bottom - top <= SLACK:
        return "is empty"
    if min(left, top) < -SLACK or right > size[0] + SLACK or bottom > size[1] + SLACK:
        return f"reaches beyond the picture of {size[0]}x{size[1]}"
    return ""
