"""What a run needs to go on after it was cut off, as one file."""

from pathlib import Path
from typing import Any

import torch

FILE = "state.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` into `folder`. A crash in between leaves the state before intact."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "state.partial"
    torch.save(state, partial)
    partial.replace(folder / FILE)


def unfinished(folder: Path) -> bool:
    """Whether there is a state in `folder` to go on from."""
    return (folder / FILE).is_file()


def read(folder: Path) -> dict[str, Any] | None:
    """What `save` wrote last, on the CPU, or None. ValueError for an unreadable or older state."""
    file = folder / FILE
    if not file.is_file():
        if pieces := sorted(folder.glob("state-*")):
            raise ValueError(
                f"{pieces[-1]} is the state of a run of an older Rampart: finish it with that"
                " version, or choose another --out"
            )
        return None
    try:
        # As the format's reader, so that a file cut short is told from a missing one.
        state: dict[str, Any] = torch.load(file, "cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged: copy it again, or delete it") from error
    return state
