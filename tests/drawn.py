"""Drawn scenes: discs and squares on grey, written in the layouts of VOC and COCO."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from rampart.handlers.image import Placement
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.scenes import Boxed

CLASSES = ("disc", "square")
Object = tuple[int, int, int, int, int]  # label, and the box


def objects(draws: np.random.Generator, side: int, count: int) -> list[Object]:
    """Some objects that do not overlap."""
    found: list[Object] = []
    while len(found) < count:
        size = int(draws.integers(side // 5, side // 3))
        left, top = (int(draws.integers(0, side - size)) for _ in range(2))
        apart = all(
            left + size <= x1 or left >= x2 or top + size <= y1 or top >= y2
            for _, x1, y1, x2, y2 in found
        )
        if apart:
            found.append((int(draws.integers(2)), left, top, left + size, top + size))
    return found


def picture(draws: np.random.Generator, width: int, height: int, found: list[Object]) -> np.ndarray:
    """Pixels (height, width, 3) of a scene: reddish discs, bluish squares."""
    noise = draws.integers(150, 170, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    pen = ImageDraw.Draw(image)
    for label, x1, y1, x2, y2 in found:
        box = (x1, y1, x2 - 1, y2 - 1)
        if label:
            pen.rectangle(box, fill=(120, 120, 200))
        else:
            pen.ellipse(box, fill=(200, 120, 120))
    return np.array(image)


def boxed(count: int, side: int = 128, *, seed: int = 0, most: int = 3) -> Boxed:
    """Scenes in memory, the first of them empty."""
    draws = np.random.default_rng(seed)
    images, truth = [], []
    for number in range(count):
        own = objects(draws, side, 0 if number == 0 else int(draws.integers(1, most + 1)))
        images.append(torch.from_numpy(picture(draws, side, side, own)))
        boxes = torch.tensor([one[1:] for one in own], dtype=torch.float32).reshape(-1, 4)
        truth.append(Truth(boxes, torch.tensor([one[0] for one in own], dtype=torch.int64)))
    names = tuple(f"{number:03}.png" for number in range(count))
    places = (Placement(1.0, 0, 0),) * count
    return Boxed(torch.stack(images), tuple(truth), CLASSES, names, places)


def annotation(
    file: str, width: int, height: int, found: list[tuple[str, int, int, int, int]]
) -> str:
    """One of VOC's XML files, its boxes as given."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    items = ""
    for name, *box in found:
        corners = "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True)
        )
        items += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{file}</filename>{size}{items}</annotation>"


def write_voc(
    home: Path, count: int, *, parts: dict[str, range] | None = None, seed: int = 0
) -> Path:
    """`count` scenes of 96x80 pixels in VOC's layout; the first is empty."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (home / name).mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    for number in range(count):
        own = objects(draws, 80, 0 if number == 0 else int(draws.integers(1, 4)))
        file = home / "JPEGImages" / f"s{number:03}.png"
        Image.fromarray(picture(draws, 96, 80, own)).save(file)
        found = [(CLASSES[label], x1 + 1, y1 + 1, x2, y2) for label, x1, y1, x2, y2 in own]
        text = annotation(file.name, 96, 80, found)
        (home / "Annotations" / f"s{number:03}.xml").write_text(text)
    for part, rows in (parts or {}).items():
        lines = "".join(f"s{row:03}\n" for row in rows)
        (home / "ImageSets" / "Main" / f"{part}.txt").write_text(lines)
    return home


def write_coco(home: Path, count: int, *, part: str = "train") -> Path:
    """The scenes of `write_voc` with the same seed, in COCO's layout."""
    (home / "annotations").mkdir(parents=True, exist_ok=True)
    (home / part).mkdir(exist_ok=True)
    draws = np.random.default_rng(0)
    images, items = [], []
    for number in range(count):
        own = objects(draws, 80, 0 if number == 0 else int(draws.integers(1, 4)))
        name = f"s{number:03}.png"
        Image.fromarray(picture(draws, 96, 80, own)).save(home / part / name)
        images.append({"id": number, "file_name": name, "width": 96, "height": 80})
        for label, x1, y1, x2, y2 in own:
            box = [x1, y1, x2 - x1, y2 - y1]
            items.append(
                {"image_id": number, "category_id": 7 + label, "bbox": box, "id": len(items)}
            )
    content = {
        "images": images,
        "annotations": items,
        "categories": [{"id": 7 + index, "name": name} for index, name in enumerate(CLASSES)],
    }
    (home / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return home
