"""Where a figure or a file comes from, in words that a card keeps."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

PYTHON = "in Python, with rampart.Model"  # stands where no command line was typed


def command_line() -> str:
    """The command as typed, for the card; folders of this machine are cut from its paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["rampart", *words])


def versions() -> dict[str, str]:
    """Versions of what computes, by package."""
    import onnxruntime
    import torch

    return {
        "rampart": version("rampart-endpoint"),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
