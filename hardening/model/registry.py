"""Networks that are not ours, by name: checkpoints import nothing, you `register` a factory."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

Factory = Callable[[], nn.Module]
_FACTORIES: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """From now on `factory` builds the networks that checkpoints know by `name`."""
    _FACTORIES[name] = factory


def network(name: str) -> nn.Module:
    """A new network of `name`. Raises ValueError where nobody has said what that is."""
    if name not in _FACTORIES:
        raise ValueError(
            f"the checkpoint's network is your own, {name}, and no checkpoint imports code: name"
            f" its factory again, with --arch {name}, rampart.register or Classifier.wrap"
        )
    return _FACTORIES[name]()


def is_factory(arch: str) -> bool:
    """Whether `arch` names a factory, as package.module:factory."""
    module, colon, function = arch.partition(":")
    return bool(colon) and function.isidentifier() and module not in ("", "timm")


def import_factory(arch: str) -> None:
    """Register package.module:factory, of the working folder or installed. ValueError without."""
    module, _, function = arch.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ValueError(f"--arch {arch}: no module {error.name} in {here} or installed") from error
    except AttributeError as error:
        raise ValueError(f"--arch {arch}: {module} has no {function}") from error
    register(arch, factory)
