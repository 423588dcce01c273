"""Models by what they are for, where a command takes those of any task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rampart import assembly, objects, scenes, studies, training
from rampart.calibrated import WEIGHTS
from rampart.handlers.tasks import CLASSIFY
from rampart.hardening.model.files import read_config
from rampart.hardening.objects.detector import TASK
from rampart.model import Model
from rampart.scenes import SceneModel

MODELS: dict[str, type[Model] | type[SceneModel]] = {CLASSIFY: Model, TASK: SceneModel}
ASSEMBLIES: dict[str, Callable[..., Model | SceneModel]] = {
    CLASSIFY: assembly.assemble,
    TASK: scenes.assemble,
}
PURIFIERS: dict[str, Callable[..., Path]] = {
    CLASSIFY: training.train_purifier_from,
    TASK: objects.train_purifier_from,
}
GUARDS: dict[str, Callable[..., None]] = {
    CLASSIFY: assembly.add_guarded,
    TASK: scenes.add_guarded,
}
QUANTIZERS: dict[str, Callable[..., studies.Outcome]] = {
    CLASSIFY: studies.quantize,
    TASK: objects.quantize,
}


def task_of(weights: Path) -> str:
    """What the network in a file of weights is for. Raises FileNotFoundError or ValueError."""
    return str(read_config(weights).get("task", CLASSIFY))


def load(folder: Path) -> Model | SceneModel:
    """The model of a folder, whatever its task. Raises FileNotFoundError or ValueError."""
    return MODELS[task_of(folder / WEIGHTS)].load(folder)


def assemble(folder: Path, source: Any, weights: Path, *parts: Any, **more: Any) -> Any:
    """Put what training wrote together as a calibrated model, as the task of its weights asks."""
    return ASSEMBLIES[task_of(weights)](folder, source, weights, *parts, **more)


def train_purifier(source: Any, weights: Path, *what: Any, **more: Any) -> Path:
    """Train a purifier in front of the network of a file, as the task of its weights asks."""
    return PURIFIERS[task_of(weights)](source, weights, *what, **more)


def add_guarded(folder: Path, source: Any, *, command: str) -> None:
    """Calibrate a finished model as the variant guarded too; its other files stay."""
    GUARDS[task_of(folder / WEIGHTS)](folder, source, command=command)


def quantize(folder: Path, *what: Any, **more: Any) -> studies.Outcome:
    """Make a model folder's forms in lower precision, as the task of its weights asks."""
    return QUANTIZERS[task_of(folder / WEIGHTS)](folder, *what, **more)
