"""A long job in stages: what is done already, from the same inputs, is not done again."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rampart.handlers.engine import sha256
from rampart.hardening.model.images import Images
from rampart.hardening.train.data import Folder


class Stages:
    """The stages of one job, each in a folder whose name stands for its inputs."""

    def __init__(self, home: Path, bar: "tqdm[Any]") -> None:
        self.home, self.bar = home, bar

    def once(self, name: str, inputs: Mapping[str, object], make: Callable[[Path], object]) -> Path:
        """The folder that `make` fills from `inputs`, once; a file stands for its content."""
        title = f"[{self.bar.n + 1}/{self.bar.total}] {name}"
        self.bar.set_description(name)
        text = "".join(f"{key} {digest(value)}\n" for key, value in sorted(inputs.items()))
        folder = self.home / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        stamp = folder / "done"
        if stamp.is_file():
            tqdm.write(f"{title}: done before, in {folder}")
        else:
            tqdm.write(title)
            folder.mkdir(parents=True, exist_ok=True)
            make(folder)
            stamp.write_text(text)
        self.bar.update()
        return folder


@contextmanager
def stages(home: Path, count: int) -> "Iterator[Stages]":
    """`count` stages in `home`, under one bar."""
    layout = "{desc} {bar:20} {n_fmt}/{total_fmt} stages, {elapsed}"
    with tqdm(total=count, bar_format=layout) as bar:
        yield Stages(home, bar)


def digest(value: object) -> str:
    """What an input was: the hash of images or of a file, the text of anything else."""
    if isinstance(value, Images | Folder):
        return value.digest()
    if isinstance(value, Path):
        return sha256(value)
    return str(value)
