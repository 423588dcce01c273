import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from blobs import blobs
from PIL import Image
from torch import Tensor
from trajectory import interrupted, trajectory

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.train import state as states
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import (
    Precision,
    Recipe,
    Run,
    Trainer,
    accuracy,
    fast_precision,
    one_cycle,
    ramp,
    train_classifier,
    validate,
)
from rampart.hardening.train.methods import METHODS

pytestmark = pytest.mark.training

CONFIG = ClassifierConfig("resnet10", 10, width=0.125, image_size=16)
RECIPE = Recipe(threat=Threat("Linf", 2 / 255), epochs=2, batch_size=32, lr=0.1, ema=0.5)


def train(folder: Path, recipe: Recipe = RECIPE) -> Path:
    images = blobs(192, size=16), blobs(64, size=16, seed=1)
    torch.manual_seed(recipe.seed)
    return train_classifier(Classifier(CONFIG), recipe, folder, images)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_to_withstand_the_attack(precision: Precision, tmp_path: Path) -> None:
    best = load_classifier(train(tmp_path, RECIPE._replace(epochs=5, precision=precision)))
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.size == (840, 480)
    fresh = blobs(128, size=16, seed=2)
    # Chance is 10%.
    assert accuracy(best, fresh, threat=RECIPE.threat) > 0.4


@pytest.mark.parametrize(
    ("device", "features", "precision"),
    [
        ("cuda", {"avx2"}, "bf16"),
        ("cpu", {"avx512f", "avx512_bf16"}, "bf16"),
        ("cpu", {"asimd", "bf16"}, "bf16"),
        ("cpu", {"avx2", "avx512f"}, "fp32"),
        ("cpu", set(), "fp32"),
    ],
)
def test_bfloat16_is_for_hardware_that_computes_in_it(
    device: str, features: set[str], precision: Precision
) -> None:
    assert fast_precision(torch.device(device), features) == precision


@pytest.mark.parametrize(("arch", "method"), [("resnet10", "trades"), ("squeezenet1_1", "nfgsm")])
@pytest.mark.slow
def test_a_run_killed_within_an_epoch_takes_up_its_trajectory(
    arch: str, method: str, tmp_path: Path
) -> None:
    whole = trajectory(tmp_path / "whole", arch, method)
    cut = trajectory(tmp_path / "cut", arch, method, kill_at=8)
    rest = trajectory(tmp_path / "cut", arch, method)
    assert min(rest) in (8, 9)  # the ninth step was perhaps not saved
    assert list(whole) == sorted(cut | rest)
    assert cut | rest == pytest.approx(whole, abs=1e-6)
    histories = [states.read(tmp_path / name)["history"] for name in ("whole", "cut")]
    for row, other in zip(*histories, strict=True):
        assert row.pop("minutes") > 0
        assert other.pop("minutes") > 0
        assert other == pytest.approx(row, abs=1e-6)


@pytest.mark.slow
def test_a_run_that_ctrl_c_ends_ten_times_makes_each_step_once_and_as_if_undisturbed(
    tmp_path: Path,
) -> None:
    whole = trajectory(tmp_path / "whole", "resnet10", "nfgsm", batch_size=4)
    losses = interrupted(tmp_path / "cut", "resnet10", times=10, seed=0)
    assert [step for step, _ in losses] == list(whole)
    assert dict(losses) == pytest.approx(whole, abs=1e-6)
    histories = [states.read(tmp_path / name)["history"] for name in ("whole", "cut")]
    for row, other in zip(*histories, strict=True):
        assert other["pgd10"] == pytest.approx(row["pgd10"], abs=1e-6)


@pytest.mark.parametrize("crafting", [True, False], ids=["crafting", "descending"])
def test_ctrl_c_in_the_middle_of_a_step_loses_nothing_of_it(crafting: bool, tmp_path: Path) -> None:
    def losses(folder: Path, *, press_at: int) -> list[float]:
        torch.manual_seed(0)
        trainer = Trainer(Classifier(CONFIG), RECIPE, folder)
        out: list[float] = []

        def press(module: torch.nn.Module, *_: object) -> None:
            if trainer.run.steps == press_at and trainer.model.training is not crafting:
                pressed.append(trainer.run.steps)
                hook.remove()
                signal.raise_signal(signal.SIGINT)

        def step(batch: Batch, progress: float) -> Tensor:
            out.append(float(loss := trainer.step(batch, progress)))
            return loss

        hook = trainer.model.head.register_forward_hook(press)
        data, seen = blobs(192, size=16), blobs(64, size=16, seed=1)
        evaluate = partial(validate, trainer.ema, threat=RECIPE.threat)
        size = {"epochs": 2, "batch_size": 32}
        try:
            trainer.run.fit(data, step, evaluate, chosen_on=seen, keep=lambda: None, **size)
        except KeyboardInterrupt:
            assert press_at >= 0
        return out

    pressed: list[int] = []
    whole = losses(tmp_path / "whole", press_at=-1)
    cut = losses(tmp_path / "cut", press_at=7)
    rest = losses(tmp_path / "cut", press_at=-1)
    assert pressed == [7] and len(cut) == 8 and len(whole) == 12
    assert cut + rest == pytest.approx(whole, abs=1e-6)


def test_ctrl_c_amid_a_validation_keeps_the_steps_of_its_epoch(tmp_path: Path) -> None:
    losses: list[Tensor] = []

    def step(*_: object) -> Tensor:
        losses.append(torch.tensor(1.0))
        return losses[-1]

    def fit(evaluate: Callable[[Images], dict[str, float]]) -> Run:
        run = Run(tmp_path, "settings", {})
        run.fit(
            blobs(4),
            step,
            evaluate,
            chosen_on=blobs(2),
            epochs=1,
            batch_size=2,
            keep=lambda: None,
        )
        return run

    def press(_: Images) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit(press)
    run = fit(lambda _: {"pgd10": 0.5, "clean": 0.5})
    assert len(losses) == 2  # none was made again
    assert [row["pgd10"] for row in run.history] == [0.5]


def test_a_run_refuses_to_continue_on_other_images(tmp_path: Path) -> None:
    train(tmp_path, RECIPE._replace(epochs=1))
    images = blobs(191, size=16), blobs(64, size=16, seed=1)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="other settings or images"):
        train_classifier(Classifier(CONFIG), RECIPE._replace(epochs=1), tmp_path, images)


def test_weights_without_a_state_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "classifier.safetensors").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="choose another --out"):
        train(tmp_path)
    assert (tmp_path / "classifier.safetensors").read_bytes() == b"somebody's"


def test_label_smoothing_is_refused_where_a_teacher_gives_the_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not work with rslad"):
        train(tmp_path, RECIPE._replace(method="rslad", smoothing=0.1))


def test_a_state_is_written_when_its_time_has_come(tmp_path: Path) -> None:
    folders = []
    for every in (0.0, 1000.0):
        trainer = Trainer(Classifier(CONFIG), RECIPE, tmp_path / str(every))
        trainer.run.save_every = every
        trainer.run.pass_over(blobs(64, size=16), trainer.step, epochs=1, batch_size=32)
        folders.append(int((tmp_path / str(every) / "state.pt").is_file()))
    assert folders == [1, 0]


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


def test_the_history_of_earlier_runs_stays_with_the_weights(tmp_path: Path) -> None:
    before = [{"clean": 0.3, "pgd10": 0.2, "minutes": 1.0}]
    images = blobs(64, size=16), blobs(32, size=16)
    recipe = RECIPE._replace(epochs=1)
    file = train_classifier(Classifier(CONFIG), recipe, tmp_path, images, earlier=[before])
    history = checkpoint.read(file)[0]["history"]
    assert history[0] == before
    assert [row["epoch"] for row in history[1]] == [1]
    assert 0 < history[1][0]["minutes"] < 1


def test_the_kept_checkpoint_is_the_most_robust_epoch_and_of_equals_the_most_accurate(
    tmp_path: Path,
) -> None:
    kept: list[int] = []
    figures = iter([(0.2, 0.9), (0.5, 0.6), (0.5, 0.7), (0.5, 0.65), (0.4, 0.9)])
    run = Run(tmp_path, "settings", {})
    run.fit(
        blobs(4),
        lambda *_: torch.tensor(1.0),
        lambda _: dict(zip(("pgd10", "clean"), next(figures), strict=True)),
        chosen_on=blobs(2),
        epochs=5,
        batch_size=2,
        keep=lambda: kept.append(run.epoch),
    )
    assert kept == [0, 1, 2]


def test_an_undefended_control_trains_without_attacks_and_is_chosen_by_clean_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([(0.5, 0.3), (0.7, 0.2), (0.6, 0.4)])
    chosen: list[float] = []
    monkeypatch.setattr(
        "rampart.hardening.train.loop.validate",
        lambda *_: dict(zip(("clean", "pgd10"), next(figures), strict=True)),
    )
    monkeypatch.setattr(
        "rampart.hardening.train.loop.checkpoint.save", lambda *_: chosen.append(len(chosen))
    )
    monkeypatch.setattr("rampart.hardening.train.loop.pgd10", None)
    train(tmp_path, RECIPE._replace(method="standard", epochs=3))
    assert len(chosen) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_learns_with_all_its_options(method: str, tmp_path: Path) -> None:
    options = {"method": method, "awp": 0.005, "smoothing": 0.1, "ramp": 0.5, "epochs": 4}
    if method == "rslad":
        options["smoothing"] = 0.0
    recipe = RECIPE._replace(**options, steps=2)
    images = blobs(192, size=16), blobs(64, size=16, seed=1)
    torch.manual_seed(0)
    teacher = None
    if method == "rslad":
        teacher = load_classifier(train(tmp_path / "teacher", RECIPE._replace(epochs=4)))
    student = Classifier(CONFIG._replace(rectified=True))
    file = train_classifier(student, recipe, tmp_path / "run", images, teacher=teacher)
    best = load_classifier(file)
    assert best.config.rectified
    # Chance is 10%.
    assert accuracy(best, blobs(128, size=16, seed=2)) > 0.4


def test_a_second_head_leaves_the_classifier_what_it_is_without_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Classifier(CONFIG)
    rectified = Classifier(CONFIG._replace(rectified=True))
    rectified.load_state_dict(plain.state_dict(), strict=False)
    start = {n: t.clone() for n, t in rectified.state_dict().items() if "rectifier" in n}
    images = blobs(192, size=16), blobs(64, size=16, seed=1)
    files = [
        train_classifier(net, RECIPE, tmp_path / str(i), images)
        for i, net in enumerate((plain, rectified))
    ]
    one, other = (checkpoint.read(file)[1] for file in files)
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert not any(torch.equal(other[name], value) for name, value in start.items())


def test_eps_grows_in_a_line_and_then_stays() -> None:
    assert [ramp(progress, 0.5) for progress in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert ramp(0.0, 0.0) == 1.0


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'fsgm': choose one of standard, nfgsm"):
        train(tmp_path, RECIPE._replace(method="fsgm"))


def test_a_run_does_not_go_on_with_other_images_to_choose_by(tmp_path: Path) -> None:
    def fit(epochs: int, chosen_on: Images) -> None:
        run, figures = Run(tmp_path, "settings", {}), {"pgd10": 0.0, "clean": 0.0}
        run.fit(
            blobs(4),
            lambda *_: torch.tensor(1.0),
            lambda _: figures,
            chosen_on=chosen_on,
            epochs=epochs,
            batch_size=2,
            keep=lambda: None,
        )

    fit(1, blobs(2))
    fit(2, blobs(2))
    with pytest.raises(ValueError, match="holds a run with other settings or images"):
        fit(3, blobs(2, seed=1))


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path, "settings", {})
    with pytest.raises(ValueError, match="no image is left"):
        run.fit(blobs(4)[:0], print, dict, chosen_on=blobs(2), epochs=1, batch_size=2, keep=print)


def test_divergence_stops_the_run_and_says_what_to_change(tmp_path: Path) -> None:
    run = Run(tmp_path, "settings", {})
    with pytest.raises(FloatingPointError, match="lower --lr"):
        run.fit(
            blobs(4),
            lambda *_: torch.tensor(torch.nan),
            dict,
            chosen_on=blobs(2),
            epochs=1,
            batch_size=2,
            keep=lambda: None,
        )


def test_the_learning_rate_rises_to_one_and_falls_to_zero() -> None:
    rates = [one_cycle(p / 100) for p in range(101)]
    assert rates[0] == 0
    assert rates[-1] == 0
    assert max(rates) == rates[20] == 1
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
