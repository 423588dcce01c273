"""Decoded training pictures in a file: each is decoded once, whatever the number of epochs."""

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPARE = 0.5  # of the free disk that a store may fill


class Store:
    """Pixels uint8 (N, S, S, 3) in a file that processes share, and which of them are there.

    A row is written before it is marked, so what a killed process left behind is decoded anew.
    """

    def __init__(self, file: Path, count: int, size: int) -> None:
        self.file, self.shape = file, (count, size, size, 3)
        length = count * size * size * 3
        with file.open("ab") as opened:  # made by whoever comes first
            if opened.tell() != length + count:
                os.truncate(file, length + count)
        whole = np.memmap(file, np.uint8, "r+", shape=(length + count,))
        self.pixels: NDArray[np.uint8] = whole[:length].reshape(self.shape)
        self.marks: NDArray[np.uint8] = whole[length:]  # (N,) 1 where a row is there

    def has(self, rows: NDArray[np.int64]) -> bool:
        """Whether all of these rows are there."""
        return bool(self.marks[rows].all())

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """These rows (B, S, S, 3), which must be there."""
        return self.pixels[rows]

    def keep(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Write one row (S, S, 3)."""
        self.pixels[row] = pixels
        self.marks[row] = 1


def fits(folder: Path, count: int, size: int) -> bool:
    """Whether the disk has room for a store of `count` pictures."""
    return count * (size * size * 3 + 1) <= SPARE * shutil.disk_usage(folder).free
