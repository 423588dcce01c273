"""German traffic signs (GTSRB, Stallkamp et al. 2012), fetched by torchvision, as arrays."""

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image

from rampart.hardening.model.arrays import Pixels
from rampart.hardening.train.fetching import fetching

SIZE = 32
ARCHIVES = ("GTSRB-Training_fixed.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip")
PAGE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/published-archive.html"
FRAMES, HELD = 2, 5  # every second frame of a track, and every fifth track held out
CLASSES = (
    "speed limit 20",
    "speed limit 30",
    "speed limit 50",
    "speed limit 60",
    "speed limit 70",
    "speed limit 80",
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for trucks",
    "right of way at next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "danger",
    "bend to the left",
    "bend to the right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice or snow",
    "wild animals crossing",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "ahead or right",
    "ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
)


def download(folder: Path) -> dict[str, int]:
    """Write train.npz, held.npz and test.npz into `folder`; returns how many images each has.

    A track is one sign on up to 30 pictures, so whole tracks are held out. Archives that lie in
    `folder` are taken. Raises OSError that says what to fetch by hand, and then writes nothing.
    """
    words = (
        f"get {', '.join(ARCHIVES)} from {PAGE} by hand, put them into {folder}, and run this again"
    )
    with fetching(folder, "GTSRB", words) as scratch:
        home = scratch / "gtsrb"
        home.mkdir()
        for name in ARCHIVES:
            if (folder / name).is_file():
                shutil.copy(folder / name, home)
        for split in ("train", "test"):
            torchvision.datasets.GTSRB(str(scratch), split, download=True)
        counts = {part: write(home, part, scratch) for part in ("train", "held", "test")}
        for part in counts:
            (scratch / f"{part}.npz").replace(folder / f"{part}.npz")
    return counts


def write(home: Path, part: str, out: Path) -> int:
    """Write one part of torchvision's folder `home` as an array file of `out`.

    Tracks stay in one piece, in an order of chance: so what is held out can be divided in order, as
    `split` does, and its parts show other signs.
    """
    if part == "test":
        test = torchvision.datasets.GTSRB(str(home.parent), "test")
        pairs = [(resized(image), label) for image, label in test]
    else:
        files = sorted((home / "GTSRB" / "Training").glob("*/*.ppm"))
        found = [file for file in files if is_of(file, held=part == "held")]
        tracks = [list(track) for _, track in itertools.groupby(found, key=track_of)]
        random.Random(0).shuffle(tracks)
        mine = [file for track in tracks for file in track]
        pairs = [(resized(Image.open(file)), int(file.parent.name)) for file in mine]
    image, label = zip(*pairs, strict=True)
    names = np.array(CLASSES)
    np.savez_compressed(out / f"{part}.npz", image=np.stack(image), label=label, classes=names)
    return len(image)


def track_of(file: Path) -> tuple[str, str]:
    """Class and number of the track of a picture TRACK_FRAME.ppm."""
    return file.parent.name, file.stem.partition("_")[0]


def is_of(file: Path, *, held: bool) -> bool:
    """Whether a picture TRACK_FRAME.ppm is one that is taken, and of the part asked for."""
    track, frame = map(int, file.stem.split("_"))
    return frame % FRAMES == 0 and (track % HELD == 0) == held


def resized(image: Image.Image) -> Pixels:
    """A picture as uint8 (SIZE, SIZE, 3)."""
    with image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
