"""A picture that kills each process that opens it, as one may that crashes a decoder."""

from collections.abc import Sequence
from pathlib import Path

from screened import folder, picture

from rampart.screening.shards import PIECE

NAME = "deadly.png"
# As sitecustomize.py, which Python runs before all else.
CODE = f"""
import os, signal, sys
def watch(event, words):
    if event == "open" and str(words[0]).endswith({NAME!r}):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""


def listed(home: Path, pictures: int = 10) -> tuple[Path, Sequence[str]]:
    """A list of three shards, in the second of which it is; the names in the others."""
    folder(home, {f"{n}.png": picture(n) for n in range(pictures)} | {NAME: picture(0)})
    names = [f"{home}/{n % pictures}.png" for n in range(2 * PIECE + 100)]
    lines = [*names[: PIECE + 50], f"{home}/{NAME}", *names[PIECE + 51 :]]
    (home / "all.txt").write_text("\n".join(lines))
    return home / "all.txt", names[:PIECE] + names[2 * PIECE :]
