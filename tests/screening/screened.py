"""Stores of pictures, and the tables that are made of them."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import dataset

from rampart.screening import shards
from rampart.screening.parts import Tally
from rampart.screening.worker import Screener


def picture(number: int, format: str = "PNG", size: int = 40, **options: Any) -> bytes:
    """A picture of its own for each number, of structure enough for a fingerprint."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((size, size + 8)).save(out, format, **options)
    return out.getvalue()


def as_png(image: np.ndarray) -> bytes:
    """Pixels (H, W, 3) as a file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def every_kind() -> dict[str, bytes]:
    """Good pictures and bad ones, by name."""
    animated, deep, turned = io.BytesIO(), io.BytesIO(), Image.Exif()
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    turned[0x0112] = 6
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60).save(deep, "PNG")
    return {
        "good.png": picture(1),
        "good.jpg": picture(2, "JPEG", quality=90),
        "large.jpg": picture(3, "JPEG", size=300),
        "good.webp": picture(4, "WEBP"),
        "turned.jpg": picture(5, "JPEG", exif=turned.tobytes()),
        "deep.png": deep.getvalue(),
        "cut.png": picture(6)[:-40],
        "empty.png": b"",
        "words.jpg": b"no picture at all",
        "animated.webp": animated.getvalue(),
        "old.gif": picture(7, "GIF"),
    }


def folder(home: Path, content: Mapping[str, bytes]) -> Path:
    """A folder of files."""
    for name, data in content.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    return home


def pack(file: Path, content: Mapping[str, bytes]) -> Path:
    """A tar file as WebDataset has them."""
    with tarfile.open(file, "w") as packed:
        for name, data in content.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            packed.addfile(about, io.BytesIO(data))
    return file


def table(parts: Path) -> list[dict[str, Any]]:
    """All rows of a folder of parts."""
    return dataset.dataset(parts, format="parquet").to_table().to_pylist()


def rows(
    screener: Screener, source: object, out: Path, column: str | None = None, **changes: Any
) -> tuple[list[dict[str, Any]], Tally]:
    """The verdicts on a store, made in this process, and what was counted."""
    out.mkdir(exist_ok=True)
    screener._setup = screener._setup._replace(out=out, **changes)
    tally = Tally()
    for shard in shards.find(str(source), column).shards:
        tally.add(screener.screen(shard, lambda images: None))
    return table(out), tally
