"""Weights as safetensors, with the config that rebuilds the model in the file's metadata."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rampart.hardening.model import wrapping
from rampart.hardening.model.files import FORMAT, read_config

ANSWERS = "answers"  # in the config: what a network of your own does, which no weights tell


def save(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write the model's state and its building `config` (JSON values) to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if own := own_answers(model):
        config = config | {ANSWERS: own}
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


def own_answers(model: nn.Module) -> list[list[float]]:
    """What the network of your own in a model does; empty where it has none."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "head", ""):
            return wrapping.answers(part, config.image_size)
    return []


def check_answers(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ValueError where a network of your own does not do what it did when `path` was
    written: its name may stand for other code by now. Older files do not say.
    """
    if config.get(ANSWERS) and not wrapping.same(config[ANSWERS], own_answers(model)):
        name = config["classifier"]["arch"]
        raise ValueError(
            f"{path}: the network registered as {name} answers otherwise than the one that was"
            " saved, with the same weights: register or wrap that one again, and pass"
            " Classifier.wrap a `name` for each"
        )


def digest(model: nn.Module) -> str:
    """16 hex digits that stand for the model's weights, and for what its parts were built with."""
    # Normalization is no weight, and yet the same weights answer otherwise under another one.
    built = [repr(part.config) for part in model.modules() if hasattr(part, "config")]
    total = hashlib.sha256(repr(built).encode())
    for tensor in model.state_dict().values():
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()[:16]
