"""Pictures of a query attack, and an archive whose servers notice one."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.data import data_dir

from rampart.export.archive import archive
from rampart.handlers.image import decode

REJECTING = {"on_query_attack": "reject", "false_alarm_rate": 0}


def crops() -> np.ndarray:
    """The 60 crops of a photograph with most in them, uint8 (60, 32, 32, 3)."""
    cat = decode((Path(data_dir) / "chelsea.png").read_bytes())
    found = [cat[y : y + 32, x : x + 32] for y in range(0, 288, 32) for x in range(0, 448, 32)]
    return np.stack(sorted(found, key=lambda crop: -crop.std())[:60])


def nudged(images: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """The images with one value in fifty changed a little, as an attack does."""
    change = noise.integers(-8, 9, images.shape) * (noise.random(images.shape) < 0.02)
    return np.clip(images + change, 0, 255).astype(np.uint8)


def watchful(
    model: Path, folder: Path, name: str = "tiny", version: str = "1.0", **settings: object
) -> Path:
    """An archive NAME.mar in `folder` that rejects what looks like a step of a query attack."""
    out = folder / f"{name}.mar"
    own = {"rampart": REJECTING | settings}
    archive(model, out, variant="lean", version=version, settings=own)
    return out


def assert_noticed(decide: Callable[[bytes], str]) -> None:
    """Each step of an attack is rejected, and no other picture; `decide` asks the server."""
    photos, noise = crops(), np.random.default_rng(0)

    def decisions(images: np.ndarray) -> list[str]:
        encoded = []
        for image in images:
            out = BytesIO()
            Image.fromarray(image).save(out, "PNG")
            encoded.append(out.getvalue())
        return [decide(picture) for picture in encoded]

    assert decisions(photos[:4]) == ["accept"] * 4
    assert decisions(nudged(np.repeat(photos[:1], 12, 0), noise)) == ["reject"] * 12
    assert decisions(photos[4:6]) == ["accept"] * 2
