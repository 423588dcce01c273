"""What is attacked answers as what is deployed; the other victims are seen in test_evaluate."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from rampart.export.quantize import quantize
from rampart.handlers.engine import Engine
from rampart.handlers.verdict import Calibration
from rampart.hardening.attack import victims
from rampart.hardening.attack.ladder import Budget
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge import evaluate as evaluation
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import Defended, DefendedClassifier
from rampart.hardening.model.pixels import to_float, to_uint8


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, tiny_graph: Path, tiny_images: Images
) -> Engine:
    folder, image = tmp_path_factory.mktemp("int8"), tiny_images.image.numpy()
    return Engine(quantize(tiny_graph, folder / "ranges.json", folder / "int8.onnx", image))


def test_an_attack_sees_the_values_of_the_int8_graph_and_the_gradients_of_the_float_one(
    engine: Engine, tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    image = tiny_images.image[:6]
    x = to_float(image).requires_grad_(True)
    seen = victims.StraightThrough(tiny_pipeline, engine).defend(x)
    own = engine.run(image.numpy())
    np.testing.assert_allclose(seen.logits.detach(), own.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.scores.detach(), own.scores, rtol=1e-5, atol=1e-6)
    smooth = tiny_pipeline.defend(x)
    assert not torch.equal(smooth.logits, seen.logits)
    for after, before in ((seen.logits, smooth.logits), (seen.scores, smooth.scores)):
        sums = after.sum(), before.sum()
        own, float_one = (torch.autograd.grad(s, x, retain_graph=True)[0] for s in sums)
        torch.testing.assert_close(own, float_one)


def test_the_label_of_the_int8_graph_has_the_gradients_of_the_float_label(
    engine: Engine, tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    made = victims.StraightThrough(tiny_pipeline, engine)
    x = to_float(tiny_images.image[:6]).requires_grad_(True)
    seen, smooth = made.label_logits(x), tiny_pipeline.label_logits(x)
    torch.testing.assert_close(seen, made.graph(x).logits)
    own, float_one = (torch.autograd.grad(logits[:, 0].sum(), x)[0] for logits in (seen, smooth))
    torch.testing.assert_close(own, float_one)


def test_without_gradients_the_int8_graph_alone_is_run(engine: Engine, tiny_images: Images) -> None:
    nothing = torch.nn.Module()  # it has no `defend` and no `label_logits` to call
    made = victims.StraightThrough(cast(Defended, nothing), engine)
    image = tiny_images.image[:6]
    x, own = to_float(image).requires_grad_(True), engine.run(image.numpy())
    with torch.no_grad():
        for out in (made.defend(x), made.defend(x.detach())):
            for seen, expected in zip(out[:3], own[:3], strict=True):
                np.testing.assert_array_equal(seen, expected)
            np.testing.assert_array_equal(to_uint8(out.purified), own.purified)
        np.testing.assert_array_equal(made.label_logits(x), own.logits)


@pytest.mark.slow
def test_the_int8_graph_is_a_victim_of_its_own(
    engine: Engine,
    tiny_pipeline: DefendedClassifier,
    tiny_calibration: Calibration,
    tiny_images: Images,
    tmp_path: Path,
) -> None:
    few = tiny_images[slice(3)]
    label = torch.from_numpy(engine.run(few.image.numpy()).logits.argmax(1))
    few = Images(few.image, label, few.classes)
    plain = victims.label_victim("classifier", tiny_pipeline.classifier, "c")
    full = victims.pipeline_victim(tiny_pipeline, tiny_calibration, "f", rate=0.1)
    graph = victims.StraightThrough(tiny_pipeline, engine)
    int8 = victims.pipeline_victim(
        graph, tiny_calibration, "q", precision="int8", rate=0.1, engine=engine
    )
    budget = Budget(steps=2, targets=1, queries=5, standard=False)
    done = evaluation.evaluate(
        [plain, full, int8], few, Threat(), budget, rate=0.1, folder=tmp_path, only=[]
    )
    seen = done.records["graph:int8 full"]
    assert seen.own("pgd20")[0].victim is int8  # attacked itself, and not through another
    values = {m.name: m.value for m in done.metrics if m.subject.text == "graph:int8"}
    assert values["clean"] == 1
    assert values["robust"] <= values["pgd20"]
    assert {"max_softmax full", "max_softmax:int8 full"} <= set(done.records)
