"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998), as arrays."""

from pathlib import Path

import numpy as np
from PIL import Image


def write(folder: Path) -> dict[str, int]:
    """Write train.npz, held.npz and test.npz, 32x32; returns how many images each has."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    gray = (bunch.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    large = [Image.fromarray(one).resize((32, 32)).convert("RGB") for one in gray]
    image = np.stack([np.asarray(one) for one in large])
    order = np.random.default_rng(0).permutation(len(image))
    parts = dict(zip(("train", "held", "test"), np.split(order, (1097, 1497)), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(name) for name in bunch.target_names]
    for part, rows in parts.items():
        label = bunch.target[rows]
        np.savez_compressed(folder / f"{part}.npz", image=image[rows], label=label, classes=names)
    return {part: len(rows) for part, rows in parts.items()}
