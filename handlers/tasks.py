"""What a model is for: classes of pictures, or objects in them. All else is the same for both."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rampart.handlers.engine import Engine, SceneEngine
from rampart.handlers.image import Fitting, cropped, framed
from rampart.handlers.protocols.open_inference import OUTPUTS, SCENE_OUTPUTS, Output
from rampart.handlers.scenes import SceneJudge
from rampart.handlers.verdict import Judge


class Task(NamedTuple):
    """How a task's graph is run, how its outputs are judged, and what clients see of that."""

    engine: type[Engine] | type[SceneEngine]
    judge: Callable[..., Judge | SceneJudge]
    fitting: Fitting  # how a picture comes to the model's size
    outputs: dict[str, Output]  # of Open Inference Protocol
    terms: tuple[str, ...] = ()  # what the judge takes besides, of the card's own part
    settings: tuple[str, ...] = ()  # of these, what an operator may set


TASKS = {
    "classify": Task(Engine, Judge, cropped, OUTPUTS),
    "detect": Task(
        SceneEngine,
        SceneJudge,
        framed,
        SCENE_OUTPUTS,
        ("min_confidence", "max_overlap"),
        ("min_confidence",),
    ),
}
CLASSIFY = "classify"


def task_of(card: Mapping[str, Any]) -> Task:
    """The task that a card names, by default to classify. Raises ValueError for an unknown one."""
    name = card.get("task", CLASSIFY)
    if name not in TASKS:
        raise ValueError(f"the card's task is {name}: this Rampart supports {', '.join(TASKS)}")
    return TASKS[name]


def terms(card: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a judge takes besides the policy: as the card says, or an operator's settings.

    Raises ValueError for a setting that is of another task.
    """
    task = task_of(card)
    theirs = {name for other in TASKS.values() for name in other.settings} - {*task.settings}
    if strange := sorted(theirs & settings.keys()):
        raise ValueError(f"{strange[0]} is not a setting for this kind of model: leave it out")
    told = {name: card[name] for name in task.terms if name in card}
    return told | {name: settings[name] for name in task.settings if name in settings}
