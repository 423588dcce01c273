"""Weights as safetensors, with the config that rebuilds the model in the file's metadata."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rampart.hardening.model.files import FORMAT, read_config


def save(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write the model's state and its building `config` (JSON values) to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch()  # with the rights that the umask leaves; safetensors gives the owner's alone
    mode = partial.stat().st_mode
    # One entry, since safetensors writes several in an order of chance: other bytes each time.
    save_file(state, partial, {"config": json.dumps({"format": FORMAT} | config)})
    partial.chmod(mode)
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state) of a file that `save` wrote. Raises FileNotFoundError or ValueError."""
    config = read_config(path)
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def digest(model: nn.Module) -> str:
    """16 hex digits that stand for the model's weights, and for what its parts were built with."""
    # Normalization is no weight, and yet the same weights answer otherwise under another one.
    built = [repr(part.config) for part in model.modules() if hasattr(part, "config")]
    total = hashlib.sha256(repr(built).encode())
    for tensor in model.state_dict().values():
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()[:16]
