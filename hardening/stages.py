"""A long job in stages: what is done already, from the same inputs, is not done again."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from hardening.data import Folder, Images


class Stages:
    """The stages of one job, each in a folder of its own whose name stands for its inputs.

    So a job whose inputs change leaves what it made from the others where it is. `say` tells the
    user how far the job is.
    """

    def __init__(self, home: Path, count: int, say: Callable[[str], None]) -> None:
        self.home, self.count, self.say = home, count, say
        self.number = 0

    def once(self, name: str, inputs: Mapping[str, object], make: Callable[[Path], object]) -> Path:
        """The folder that `make` has filled from `inputs`, now or before.

        A file among `inputs` stands for its content. An interrupted `make` gets the same folder
        again, and may go on there.
        """
        self.number += 1
        title = f"[{self.number}/{self.count}] {name}"
        known = "".join(f"{key} {digest(value)}\n" for key, value in sorted(inputs.items()))
        folder = self.home / f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
        stamp = folder / "done"
        if stamp.is_file():
            self.say(f"{title}: done before, in {folder}")
            return folder
        self.say(title)
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        stamp.write_text(known)
        return folder


def digest(value: object) -> str:
    """What an input was: the hash of images or of a file, the text of anything else."""
    if isinstance(value, Images | Folder):
        return value.digest()
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()
    return str(value)
