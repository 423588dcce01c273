"""A long job in stages: what is done already, from the same inputs, is not done again."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rampart.handlers.engine import sha256
from rampart.hardening.model.images import Images
from rampart.hardening.train import changes
from rampart.hardening.train.data import Folder

INPUTS = "inputs"  # a file with a line for each


class Stages:
    """The stages of one job, each in a folder whose name stands for its inputs."""

    def __init__(self, home: Path, bar: "tqdm[Any]") -> None:
        self.home, self.bar = home, bar

    def place(self, name: str, inputs: Mapping[str, object]) -> Path:
        """The folder of a stage."""
        digest = hashlib.sha256(inputs_text(inputs).encode()).hexdigest()
        return self.home / f"{name}-{digest[:12]}"

    def done(self, name: str, inputs: Mapping[str, object]) -> bool:
        """Whether a stage is done."""
        return (self.place(name, inputs) / "done").is_file()

    def once(self, name: str, inputs: Mapping[str, object], make: Callable[[Path], object]) -> Path:
        """The folder that `make` fills from `inputs`, once; a file stands for its content."""
        title = f"[{self.bar.n + 1}/{self.bar.total}] {name}"
        self.bar.set_description(name)
        folder, text = self.place(name, inputs), inputs_text(inputs)
        stamp = folder / "done"
        if stamp.is_file():
            tqdm.write(f"{title}: done before, in {folder}")
        else:
            tqdm.write(title)
            if not folder.is_dir() and (why := self.why_anew(name, inputs)):
                tqdm.write(why)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / INPUTS).write_text(text)
            changes.note(folder, images_among(inputs))
            make(folder)
            stamp.write_text(text)
        self.bar.update()
        return folder

    def why_anew(self, name: str, inputs: Mapping[str, object]) -> str:
        """What is other than when the stage was last begun, if it was, and how to go on there."""
        earlier = [file.parent for file in self.home.glob(f"{name}-*/{INPUTS}")]
        if not earlier:
            return ""
        last = max(earlier, key=lambda folder: (folder / INPUTS).stat().st_mtime)
        old = set((last / INPUTS).read_text().splitlines())
        other = [line.split()[0] for line in inputs_text(inputs).splitlines() if line not in old]
        pictures = changes.since(last, images_among(inputs))
        if pictures:
            other = [key for key in other if not isinstance(inputs[key], Images | Folder)]
            other.append(f"images: {pictures}")
        return (
            f"  starting again: the run in {last} began with other {', '.join(other)}; restore"
            " those and run the same command to resume it"
        )


@contextmanager
def stages(home: Path, count: int) -> "Iterator[Stages]":
    """`count` stages in `home`, under one bar."""
    layout = "{desc} {bar:20} {n_fmt}/{total_fmt} stages, {elapsed}"
    with tqdm(total=count, bar_format=layout) as bar:
        yield Stages(home, bar)


def inputs_text(inputs: Mapping[str, object]) -> str:
    """A line for each input of a stage."""
    return "".join(f"{key} {digest(value)}\n" for key, value in sorted(inputs.items()))


def images_among(inputs: Mapping[str, object]) -> list[Images | Folder]:
    """The images that a stage is made from."""
    return [value for value in inputs.values() if isinstance(value, Images | Folder)]


def digest(value: object) -> str:
    """What an input was: the hash of images or of a file, the text of anything else."""
    if isinstance(value, Images | Folder):
        return value.digest()
    if isinstance(value, Path):
        return sha256(value)
    return str(value)
