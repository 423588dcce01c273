import json
from pathlib import Path
from typing import Any

import pytest

from rampart.handlers.summary import FIGURES, summary

CARDS = sorted(Path(__file__).parents[2].glob("model_store/*/card.json"))


def row(value: float, **entries: object) -> dict[str, Any]:
    known = {"subject": "pipeline", "variant": "full", "name": "robust", "norm": "Linf", "n": 10}
    known |= {"eps": "8/255", "interval": [0, 1], "data": "test", "command": "c", "attack": "a"}
    return known | {"value": value} | entries


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.parent.name)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("variant", ["full", "lean"])
def test_the_summary_of_a_shipped_card_is_short(file: Path, precision: str, variant: str) -> None:
    hashes = dict.fromkeys((*"abcdefghijklmnopqrst", "graph.onnx", "calibration.json"), "0" * 64)
    served = {"name": "n", "variant": variant, "precision": precision, "sha256": hashes}
    made = summary(served | json.loads(file.read_text()))
    assert len(json.dumps(made, indent=1)) < 8_000
    assert set(made["sha256"]) == {"graph.onnx", "calibration.json"}
    assert not {"commands", "training", "history", "versions"} & set(made)
    names = {figure["name"] for figure in made["metrics"]}
    assert names <= set(FIGURES)
    if file.parent.name == "cifar10":
        assert {"clean", "robust", "robust_with_rejection@1%"} <= {
            r["name"] for r in made["metrics"]
        }


def test_figures_are_those_of_what_is_served_the_strongest_attack_and_the_usual_rate() -> None:
    rows = [row(0.5), row(0.4, attack="b"), row(0.45, attack="c"), row(0.1, rate=0.05)]
    rows += [row(0.2, subject="graph:int8"), row(0.3, variant="lean"), row(0.6, data="validation")]
    rows += [row(0.9, name="clean", norm=None, eps=None), row(0.7, name="auroc:pgd20")]
    made = summary({"variant": "full", "metrics": rows})
    assert [(r["name"], r["data"], r["value"]) for r in made["metrics"]] == [
        ("robust", "test", 0.4),
        ("robust", "validation", 0.6),
        ("clean", "test", 0.9),
    ]
    assert set(made["metrics"][0]) == {"name", "norm", "eps", "value", "n", "interval", "data"}
    (figure,) = summary({"variant": "full", "precision": "int8", "metrics": rows})["metrics"]
    assert figure["value"] == 0.2


def test_a_card_that_was_never_evaluated_has_a_summary() -> None:
    assert summary({"name": "n"}) == {"name": "n", "metrics": [], "sha256": {}}
