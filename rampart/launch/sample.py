"""Pictures to try an endpoint with, as the archive has them."""

import shlex
import zipfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rampart.hardening.model.files import CAPTION, SAMPLE, SAMPLES

LARGEST, LONGEST = 2**16, 120  # bytes of a picture, characters of its caption
PNG = b"\x89PNG"


class Sample(NamedTuple):
    """A picture, and what it shows, if that is known."""

    file: Path
    caption: str = ""

    def curl(self, options: str, url: str) -> str:
        """A line to paste into a shell, beneath the caption if there is one."""
        line = f"  curl {options}-T {shlex.quote(str(self.file))} {url}"
        return f"{self.caption}:\n{line}" if self.caption else line


ANY = Sample(Path(__file__).parents[1] / "data" / SAMPLE)


def samples_of(archive: Path, folder: Path) -> list[Sample]:
    """An archive's own pictures, written into `folder`, or any."""
    samples = []
    try:
        with zipfile.ZipFile(archive) as content:
            for name in SAMPLES:
                if name in content.namelist():
                    samples += _unpacked(content, name, folder)
    except (zipfile.BadZipFile, OSError, RuntimeError):
        return [ANY]
    return samples or [ANY]


def _unpacked(content: zipfile.ZipFile, name: str, folder: Path) -> list[Sample]:
    with content.open(name) as picture:
        data = picture.read(LARGEST + 1)
    if not data.startswith(PNG) or len(data) > LARGEST:
        return []
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(data)
    return [Sample(file, _caption(file))]


def _caption(file: Path) -> str:
    try:
        with Image.open(file) as picture:
            text = str(picture.info.get(CAPTION, ""))
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return "".join(filter(str.isprintable, text))[:LONGEST]
