"""Pictures that the playground offers: drawn, or photographs that Rampart carries."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rampart.hardening.model.files import SAMPLE
from rampart.hardening.model.pixels import as_file
from rampart.model import Model
from rampart.samples import PHOTOGRAPHS, SIGNS, sample
from rampart.scenes import SceneModel


class Offer(NamedTuple):
    """A picture that may be picked: a file out of a seed, which tells drawn ones apart."""

    file: Callable[[int], bytes]
    drawn: bool


FEW = 3  # signs that a model must know to be shown signs


def offered(model: Model | SceneModel, own: Path | None = None) -> dict[str, Offer]:
    """What one may pick, by name; `own` is a picture file that stands first.

    An object detector's sample comes next, since it may find nothing in the others.
    """
    found: dict[str, Offer] = {}
    if own is not None:
        found[own.name] = always(own)
    sampled = {}
    if model.folder is not None and (model.folder / SAMPLE).is_file():
        sampled = {"the model's sample": always(model.folder / SAMPLE)}
    if isinstance(model, SceneModel):
        found |= sampled
    signs = [name for name in SIGNS if name in model.classes]
    if len(signs) >= FEW:
        found |= {name: Offer(partial(sign, name), True) for name in signs}
    else:
        found |= {name: always(file) for name, file in PHOTOGRAPHS.items()}
    return found | sampled | {"noise": Offer(noise, True)}


def always(file: Path) -> Offer:
    """The same file whatever the seed."""
    return Offer(lambda _: file.read_bytes(), False)


def sign(name: str, seed: int) -> bytes:
    """A traffic sign as a PNG."""
    return as_file(sample(name, seed))


def noise(seed: int) -> bytes:
    """Nothing that any model knows, as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return as_file(Image.fromarray(pixels))
