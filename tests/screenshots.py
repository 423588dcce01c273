"""Screenshots for the documentation.

.venv/bin/python tests/screenshots.py     # docs/{attack,play,play-objects,report}.png
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import Page, chromium
from PIL import Image

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "model_store" / "traffic-signs" / "report.html"
COLOURS = 128  # keeps each file below 250 kB


def shown(selector: str) -> str:
    """Whether an element is visible, in JavaScript."""
    return f"document.querySelector('{selector}').checkVisibility()"


def save(page: Page, file: Path, *, selector: str = "body", height: int = 10_000) -> None:
    """A part of a page, from its top, in few colours."""
    page.resize(1100, page.js("document.documentElement.scrollHeight"))
    find = f"document.querySelector('{selector}').getBoundingClientRect()"
    box = page.js(f"(({{left, top, right, bottom}}) => [left, top, right, bottom])({find})")
    left, top, right, bottom = map(round, box)
    page.screenshot(file, whole=False)
    small = io.BytesIO()
    with Image.open(file) as shot:
        part = shot.convert("RGB").crop((left, top, right, min(bottom, top + height)))
        part.quantize(COLOURS).save(small, "PNG", optimize=True)
    file.write_bytes(small.getvalue())


def play(page: Page, file: Path, model: str, *, height: int = 10_000) -> None:
    """The playground of a shipped model after an attack on its first sample, from its top."""
    words = [sys.executable, "-m", "rampart", "play", "--no-browser", "--port", "0"]
    words += ["--model", str(ROOT / "model_store" / model)]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(word for word in server.stdout.readline().split() if "http" in word)
        page.resize(1100)
        page.open(address)
        page.wait(f"{shown('#said')} && {shown('#picture')}", 300)
        page.click("#go")
        page.wait(shown("#outcome"), 600)
        save(page, file, selector="#attack", height=height)
    finally:
        server.terminate()
        server.wait()


def attack(folder: Path, file: Path) -> None:
    """A sign and an attack on it, beside the first photograph of `rampart samples`."""
    rampart = [sys.executable, "-m", "rampart"]
    subprocess.run([*rampart, "samples", folder], cwd=ROOT, check=True)
    words = ["attack", "--also", folder / "cat.jpg", "--out", folder]
    subprocess.run([*rampart, *words], cwd=ROOT, check=True)
    shutil.copy(folder / "panel.png", file)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder) / "profile") as pipe:
        attack(Path(folder) / "signs", ROOT / "docs" / "attack.png")
        page = Page(pipe)
        page.resize(1100)
        page.open(REPORT.as_uri())
        save(page, ROOT / "docs" / "report.png", height=800)
        play(page, ROOT / "docs" / "play.png", "traffic-signs")
        play(page, ROOT / "docs" / "play-objects.png", "blood-cells", height=990)


if __name__ == "__main__":
    main()
