import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blobs import blobs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import methods

from rampart.hardening.attack.ladder import QUICK
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Recipe, Trainer
from rampart.hardening.train.methods import METHODS

pytestmark = pytest.mark.training
RECIPE = Recipe(threat=Threat("Linf", 2 / 255), batch_size=128, lr=0.1)


def lesson(home: Path) -> methods.Lesson:
    validation = blobs(20, size=16, seed=1)
    return methods.Lesson(home, blobs(256, size=16), validation, RECIPE.threat, 0.03, QUICK)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A tenth of a second of CPU time for each step; the losses of all steps."""
    seconds, losses = [0.0], list[float]()
    step: Callable[[Trainer, Batch, float], Tensor] = Trainer.step

    def timed(trainer: Trainer, batch: Batch, progress: float) -> Tensor:
        loss = step(trainer, batch, progress)
        seconds[0] += 0.1
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr(methods.time, "process_time", lambda: seconds[0])
    return losses


def test_a_network_gets_its_minutes_and_one_that_is_fine_tuned_a_third(
    tmp_path: Path, fast: list[float]
) -> None:
    entries = [methods.Entry("standard", RECIPE._replace(method="standard"))]
    entries += [methods.Entry("fine-tuned", RECIPE, share=methods.SHARE, init="standard")]
    rows = [methods.figures(entry, lesson(tmp_path)) for entry in entries]
    assert [row["steps"] for row in rows] == [18, 6]
    assert [row["seconds"] for row in rows] == pytest.approx([1.8, 0.6])
    assert [row["epochs"] for row in rows] == [9, 3]
    assert fast[18] < fast[0] - 0.5  # it goes on from the weights of the first
    for row in rows:
        right = [torch.tensor(row["right"][name]) for name in ("clean", "pgd10", "autoattack")]
        assert all(len(one) == 20 for one in right)
        assert not (right[1] & ~right[0]).any() and not (right[2] & ~right[1]).any()
    again = [methods.figures(entry, lesson(tmp_path)) for entry in entries]
    assert again == rows and len(fast) == 24  # nothing is done twice


def test_a_killed_run_goes_on_with_the_time_that_is_left(
    tmp_path: Path, fast: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = methods.Entry("nfgsm", RECIPE)
    methods.train(entry, lesson(tmp_path / "whole"))
    whole = fast.copy()
    monkeypatch.setattr(methods, "SAVED", 0.25)
    step = Trainer.step

    def cut(trainer: Trainer, batch: Batch, progress: float) -> Tensor:
        if trainer.run.steps == 10:
            raise KeyboardInterrupt
        return step(trainer, batch, progress)

    monkeypatch.setattr(Trainer, "step", cut)
    fast.clear()
    with pytest.raises(KeyboardInterrupt):
        methods.train(entry, lesson(tmp_path / "cut"))
    monkeypatch.setattr(Trainer, "step", step)
    begun = len(fast)
    found = methods.train(entry, lesson(tmp_path / "cut"))
    assert begun == 10 and found["steps"] == 18
    assert fast[begun:] == pytest.approx(whole[9:], abs=1e-6)  # saved after the ninth step


def test_every_method_has_a_row_after_those_that_it_needs() -> None:
    every = list(methods.entries(RECIPE._replace(smoothing=0.1)))
    names = [entry.name for entry in every]
    assert set(METHODS) <= set(names)
    for position, entry in enumerate(every):
        assert {entry.init, entry.teacher} - {""} <= set(names[:position])
        assert entry.recipe.method != "rslad" or not entry.recipe.smoothing


def test_shares_have_intervals_and_fine_tuning_is_compared_on_the_same_images() -> None:
    def row(*right: bool) -> dict[str, object]:
        figures = {"clean": [True] * 4, "pgd10": list(right), "autoattack": list(right)}
        return {"seconds": 60.0, "epochs": 2.5, "right": figures}

    rows = {"nfgsm": row(True, True, False, False), "fine-tuned": row(True, True, True, False)}
    lines = methods.table(rows)
    assert lines[0] == "| method | CPU minutes | epochs | clean | PGD-10 | AutoAttack |"
    share = "50.0% (15.0% to 85.0%)"
    assert lines[2] == f"| nfgsm | 1.00 | 2.5 | 100.0% (51.0% to 100.0%) | {share} | {share} |"
    clean, attacked = methods.claims_of(rows, "here")
    assert (clean["ratio"], attacked["ratio"]) == (0.0, 0.25)
    assert attacked["target"] == -0.02 and attacked["low"] < 0 and not attacked["holds"]
