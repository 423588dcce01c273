"""From a task's weights to its graph, and what holds that to torch and to the float32 one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rampart.export import parity, scene_agreement, scenes, to_onnx
from rampart.export.shipped import AnyParity
from rampart.handlers.engine import Engine, SceneEngine
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.objects import defended


class Way(NamedTuple):
    """How the graph of one task is made and checked."""

    load: Callable[..., Any]
    to_onnx: Callable[..., Path]
    engine: Callable[..., Any]
    compare: Callable[..., AnyParity]  # with torch
    check_close: Callable[..., object]  # of a lower precision, rebuilt, with float32


WAYS = {
    "classify": Way(pipelines.load, to_onnx.to_onnx, Engine, parity.compare, parity.check_close),
    "detect": Way(
        defended.load, scenes.to_onnx, SceneEngine, scenes.compare, scene_agreement.check_close
    ),
}
