from pathlib import Path

import pytest
import torch
from blobs import blobs
from PIL import Image

from hardening import checkpoint
from hardening.attacks import Threat
from hardening.methods import METHODS
from hardening.models import Classifier, ClassifierConfig
from hardening.pipeline import load_classifier
from hardening.train import Recipe, Run, Trainer, accuracy, one_cycle, ramp, train_classifier

CONFIG = ClassifierConfig("resnet10", 10, width=0.125, image_size=16)
RECIPE = Recipe(threat=Threat("Linf", 2 / 255), epochs=2, batch_size=32, lr=0.1, ema=0.5)


def train(folder: Path, recipe: Recipe = RECIPE) -> Path:
    images = blobs(192, size=16), blobs(64, size=16, seed=1)
    torch.manual_seed(recipe.seed)
    return train_classifier(Classifier(CONFIG), recipe, folder, images)


def test_training_learns_to_withstand_the_attack(tmp_path: Path) -> None:
    best = load_classifier(train(tmp_path, RECIPE._replace(epochs=5)))
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.size == (840, 480)
    fresh = blobs(128, size=16, seed=2)
    # Chance is 10%.
    assert accuracy(best, fresh, attack="pgd10", threat=RECIPE.threat) > 0.4


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpoint.read(train(tmp_path / "whole"))[1]
    step, calls = Trainer.step, iter(range(100))

    def interrupted(self: Trainer, *args: object) -> float:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    assert state["epoch"] == 1
    continued = checkpoint.read(train(tmp_path / "cut"))[1]
    for name, tensor in whole.items():
        torch.testing.assert_close(continued[name], tensor, msg=name)


def test_a_run_refuses_to_continue_under_another_recipe(tmp_path: Path) -> None:
    train(tmp_path, RECIPE._replace(epochs=1))
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path, RECIPE._replace(epochs=1, lr=0.3))


def test_a_run_refuses_to_continue_from_other_first_weights(tmp_path: Path) -> None:
    train(tmp_path, RECIPE._replace(epochs=1))
    torch.manual_seed(7)
    other = Classifier(CONFIG)
    images = blobs(64, size=16), blobs(64, size=16)
    with pytest.raises(ValueError, match="other settings"):
        train_classifier(other, RECIPE._replace(epochs=1), tmp_path, images)


def test_the_kept_checkpoint_is_the_epoch_with_the_best_robust_accuracy(tmp_path: Path) -> None:
    kept: list[int] = []
    figures = iter([0.2, 0.5, 0.4])
    run = Run(tmp_path, "settings", {}, torch.Generator())
    run.fit(
        blobs(4),
        lambda *_: 1.0,
        lambda: {"pgd10": next(figures)},
        epochs=3,
        batch_size=2,
        keep=lambda: kept.append(run.epoch),
    )
    assert kept == [0, 1]


def test_an_undefended_control_trains_without_attacks_and_is_chosen_by_clean_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([(0.5, 0.3), (0.7, 0.2), (0.6, 0.4)])
    chosen: list[float] = []
    monkeypatch.setattr(
        "hardening.train.validate",
        lambda *_: dict(zip(("clean", "pgd10"), next(figures), strict=True)),
    )
    monkeypatch.setattr("hardening.train.checkpoint.save", lambda *_: chosen.append(len(chosen)))
    monkeypatch.setattr("hardening.train.ATTACKS", {})
    train(tmp_path, RECIPE._replace(method="standard", epochs=3))
    assert len(chosen) == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_with_all_its_options(method: str, tmp_path: Path) -> None:
    options = {"method": method, "awp": 0.005, "smoothing": 0.1, "ramp": 0.5, "epochs": 4}
    best = load_classifier(train(tmp_path, RECIPE._replace(**options)))
    # Chance is 10%.
    assert accuracy(best, blobs(128, size=16, seed=2), threat=RECIPE.threat) > 0.4


def test_eps_grows_in_a_line_and_then_stays() -> None:
    assert [ramp(progress, 0.5) for progress in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert ramp(0.0, 0.0) == 1.0


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'fsgm': choose one of standard, nfgsm"):
        train(tmp_path, RECIPE._replace(method="fsgm"))


def test_divergence_stops_the_run_and_says_what_to_change(tmp_path: Path) -> None:
    run = Run(tmp_path, "settings", {}, torch.Generator())
    with pytest.raises(FloatingPointError, match="lower --lr"):
        run.fit(blobs(4), lambda *_: float("nan"), dict, epochs=1, batch_size=2, keep=lambda: None)


def test_the_learning_rate_rises_to_one_and_falls_to_zero() -> None:
    rates = [one_cycle(p / 100) for p in range(101)]
    assert rates[0] == 0
    assert rates[-1] == 0
    assert max(rates) == rates[20] == 1
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
