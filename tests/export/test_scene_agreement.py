"""The gate of an object detector's int8 graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import boxed

from rampart.export.scene_agreement import SceneAgreement, agree, average_precision, check_close
from rampart.handlers.engine import SceneEngine, SceneOutputs
from rampart.handlers.verdict import Calibration
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.calibrate import load_variant
from rampart.scenes import SceneModel, drawn

SAME = SceneAgreement("int8", 20, (0.9, 0.9), (0.4, 0.4), (0.0, 0.0), 20, 0.05, "PGD-10")


class Worse:
    """A graph whose boxes are a third of a box too far to the right."""

    def __init__(self, engine: SceneEngine) -> None:
        self._engine = engine
        self.device, self.image_shape = engine.device, engine.image_shape

    def run(self, images: np.ndarray) -> SceneOutputs:
        out = self._engine.run(images)
        width = out.boxes[..., 2:3] - out.boxes[..., :1]
        shift = np.concatenate([width, 0 * width, width, 0 * width], axis=-1) / 3
        return out._replace(boxes=out.boxes + shift)


@pytest.fixture(scope="module")
def graph(scene_folder: Path) -> tuple[SceneEngine, Calibration]:
    return SceneEngine(scene_folder / "graph-lean.onnx"), load_variant(scene_folder, "lean")


def test_a_point_of_precision_may_go_clean_or_attacked_and_no_more() -> None:
    assert SAME.holds and SAME._replace(map50=(0.9, 0.891)).holds
    assert not SAME._replace(map50=(0.9, 0.88)).holds
    assert not SAME._replace(attacked=(0.4, 0.38)).holds
    assert not SAME._replace(flagged=(0.0, 0.5)).holds
    assert SAME._replace(flagged=(0.5, 0.5)).holds  # pictures unlike the calibration's


def test_a_graph_agrees_with_itself_and_an_attack_hurts_both(
    graph: tuple[SceneEngine, Calibration], scenes: SceneModel
) -> None:
    some = boxed(12, seed=5)
    few = drawn(some.image, some.classes)
    found = agree(graph, graph, scenes.detector, some, few, threat=Threat(), rate=0.05)
    assert found.holds and found.map50[0] == found.map50[1] > 0.5
    assert found.attacked[0] == found.attacked[1] < found.map50[0] - 0.1
    assert "of 12 (promised: 5.00%)" in str(found)


def test_boxes_elsewhere_fail_the_gate(
    graph: tuple[SceneEngine, Calibration], scenes: SceneModel
) -> None:
    some, worse = boxed(12, seed=5), Worse(graph[0])
    overlap = scenes.detector.net.iou
    right, wrong = (
        average_precision(engine, some.image, some, overlap) for engine in (graph[0], worse)
    )
    assert wrong < right / 2
    assert "agrees with the fp32 one on 100% of" in check_close(graph, graph, some.image)
    with pytest.raises(RuntimeError, match="only agrees"):
        check_close(graph, (worse, graph[1]), some.image)


def test_numbers_that_are_none_fail_it(graph: tuple[SceneEngine, Calibration]) -> None:
    image = boxed(2, seed=5).image

    class Broken(Worse):
        def run(self, images: np.ndarray) -> SceneOutputs:
            out = super().run(images)
            return out._replace(scores=np.full_like(out.scores, np.nan))

    with pytest.raises(RuntimeError, match="not finite"):
        check_close(graph, (Broken(graph[0]), graph[1]), torch.as_tensor(image))
