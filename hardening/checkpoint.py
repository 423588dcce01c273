"""Weights as safetensors, with the config that rebuilds the model in the file's metadata."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "rampart-1"
PIECE = 16_000_000  # bytes; small enough for services that pass files on


def save(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write the model's state and its building `config` (JSON values) to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    save_file(state, partial, {"format": FORMAT, "config": json.dumps(config)})
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, state) of a file written by `save`.

    Raises FileNotFoundError, or ValueError where the file is not one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: make one with `rampart train`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} carries no Rampart config: only files of `rampart train` load")
    return json.loads(metadata["config"]), state


def digest(model: nn.Module) -> str:
    """16 hex digits that stand for the model's weights, and for what its parts were built with."""
    # Normalization is no weight, and yet the same weights answer otherwise under another one.
    built = [repr(part.config) for part in model.modules() if hasattr(part, "config")]
    total = hashlib.sha256(repr(built).encode())
    for tensor in model.state_dict().values():
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what a run needs to go on, as pieces of at most 16 MB in a new folder of `folder`.

    A crash in between leaves the state before intact.
    """
    data = io.BytesIO()
    torch.save(state, data)
    view = data.getbuffer()
    partial = folder / "state.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = -(-len(view) // PIECE)
    for i in range(count):
        name = f"{i + 1:04}-of-{count:04}"
        (partial / name).write_bytes(view[i * PIECE : (i + 1) * PIECE])
    before = sorted(folder.glob("state-*"))
    number = int(before[-1].name.removeprefix("state-")) + 1 if before else 0
    partial.rename(folder / f"state-{number:06}")
    for older in before:
        shutil.rmtree(older)


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state that `save_state` wrote last, on the CPU; None where there is none.

    Raises ValueError where pieces are missing.
    """
    states = sorted(folder.glob("state-*"))
    if not states:
        return None
    pieces = sorted(states[-1].iterdir())
    count = int(pieces[0].name.rpartition("-")[2]) if pieces else 0
    if not pieces or len(pieces) != count:
        raise ValueError(f"{states[-1]} has {len(pieces)} of {count} pieces: copy them all there")
    data = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    state: dict[str, Any] = torch.load(data, "cpu", weights_only=True)
    return state
