"""Real processes that share one run, beside one process; torchrun itself starts a command.

The networks are without batch statistics. TRADES is left out: it starts so close to the image that
its first slopes are of the order of rounding, which differs between batches of 8 and of 16.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import torch
from blobs import blobs
from trajectory import STEPS, start, trajectory

from rampart import preflight
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.train import distributed
from rampart.hardening.train import state as states
from rampart.hardening.train.loop import Recipe, Run, Trainer, one_part

pytestmark = pytest.mark.training
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

Losses = dict[int, float]  # by step
Alone = Callable[[str, str], tuple[Path, Losses]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The folder and the losses of one process's run, of which several tests need the same."""

    @cache
    def run(arch: str, method: str) -> tuple[Path, Losses]:
        folder = tmp_path_factory.mktemp("alone")
        return folder, trajectory(folder, arch, method)

    return run


@pytest.mark.parametrize(
    ("arch", "method"), [("vgg11", "nfgsm"), ("timm:test_convnext", "pgd")], ids=str
)
@pytest.mark.slow
def test_two_processes_train_as_one_does(
    arch: str, method: str, alone: Alone, tmp_path: Path
) -> None:
    folder, one = alone(arch, method)
    two = trajectory(tmp_path / "two", arch, method, processes=2)
    assert list(one) == list(two) == list(range(STEPS))
    assert two == pytest.approx(one, abs=1e-4)
    assert max(one.values()) - min(one.values()) > 0.05  # a run that stands still proves nothing
    both = [states.read(run) for run in (folder, tmp_path / "two")]
    assert both[0] is not None
    assert both[1] is not None
    for row, other in zip(both[0]["history"], both[1]["history"], strict=True):
        known = {name: row[name] for name in ("loss", "clean", "pgd10")}
        assert {name: other[name] for name in known} == pytest.approx(known, abs=1e-4)


def test_a_killed_run_of_two_processes_goes_on_in_one(alone: Alone, tmp_path: Path) -> None:
    _, whole = alone("vgg11", "nfgsm")
    cut = trajectory(tmp_path / "cut", "vgg11", "nfgsm", processes=2, kill_at=8)
    rest = trajectory(tmp_path / "cut", "vgg11", "nfgsm")
    assert min(rest) in (8, 9)  # the ninth step was perhaps not saved
    assert max(rest) == STEPS - 1
    assert cut | rest == pytest.approx(whole, abs=1e-4)


def test_a_killed_run_with_batch_statistics_takes_up_its_trajectory(tmp_path: Path) -> None:
    whole = trajectory(tmp_path / "whole", "resnet10", "nfgsm", processes=2)
    cut = trajectory(tmp_path / "cut", "resnet10", "nfgsm", processes=2, kill_at=8)
    rest = trajectory(tmp_path / "cut", "resnet10", "nfgsm", processes=2)
    assert cut | rest == pytest.approx(whole, abs=1e-6)


def begin_with_other_images(folder: Path) -> None:
    images = blobs(8 + distributed.place()[0])
    sizes = {"epochs": 1, "batch_size": 4}
    Run(folder, "settings", {}).fit(images, print, dict, chosen_on=images, keep=print, **sizes)


def test_processes_that_begin_with_other_images_are_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = start(2, log, begin_with_other_images, tmp_path)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 1
    assert log.read_text().count("do not begin with the same images and weights") == 2


def try_steps_with_no_patience_in_one(folder: Path) -> None:
    preflight.SECONDS = 0.0 if distributed.place()[0] else 60.0
    net = Classifier(ClassifierConfig("resnet10", 2, 0.125, image_size=16))
    recipe = Recipe("nfgsm", batch_size=8)
    print(preflight.try_steps(Trainer(net, recipe, folder), net, recipe.threat))


def test_processes_try_as_many_steps_however_long_they_take(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for worker in start(2, log, try_steps_with_no_patience_in_one, tmp_path):
        worker.join()
        assert worker.exitcode == 0, log.read_text()
    assert log.read_text().count("Trial(") == 2


def show(*arguments: object) -> None:
    """What a command prints."""
    print(command.run(*arguments))


@pytest.mark.slow
def test_the_command_line_speaks_and_writes_once(tmp_path: Path) -> None:
    for name, images in (("images", blobs(256, size=16)), ("held", blobs(200, size=16, seed=1))):
        np.savez(tmp_path / name, image=images.image.numpy(), label=images.label.numpy())
    small = ["--data", tmp_path / "images.npz", "--held", tmp_path / "held.npz"]
    small += ["--epochs", 1, "--batch-size", 64]
    small += ["--validate-on", 20, "--device", "cpu"]
    net = ["--arch", "resnet10", "--width", 0.125, "--image-size", 16, "--lr", 0.01]
    train = ["train", *small, *net, "--out", tmp_path / "c"]
    program = [*TORCHRUN, "2", "--no-python", Path(sys.executable).with_name("rampart"), *train]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, program)), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training images") == done.stdout.count("best classifier") == 1
    purifier = ["purifier", *small, "--classifier", tmp_path / "c" / "classifier.safetensors"]
    losses = []
    for processes in (1, 2):
        out, log = tmp_path / f"p{processes}", tmp_path / f"{processes}.log"
        for worker in start(processes, log, show, *purifier, "--out", out):
            worker.join()
            assert worker.exitcode == 0, log.read_text()
        assert log.read_text().count("best purifier") == 1
        losses.append(checkpoint.read(out / "purifier.safetensors")[0]["history"][0][0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # in bfloat16


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "place", lambda: (0, 3))
    one_part(15)
    with pytest.raises(ValueError, match="16 does not divide among 3 processes"):
        one_part(16)


def test_alone_nothing_is_shared() -> None:
    index, value = torch.arange(5), torch.ones(3)
    assert distributed.place() == (0, 1)
    assert torch.equal(distributed.mine(index), index)
    distributed.average([value])
    assert value.tolist() == [1, 1, 1]
    assert distributed.from_first({"a": 1}) == {"a": 1}


def test_processes_agree_on_an_attempt_that_no_earlier_one_had() -> None:
    """Also where the store still has what processes said that were killed half way."""
    store, world = distributed.dist.HashStore(), 3
    with ThreadPoolExecutor(world) as pool:

        def agreed(*ranks: int) -> list[Any]:
            return [pool.submit(distributed.attempt, store, rank, world) for rank in ranks]

        (first,) = {one.result(timeout=60) for one in agreed(0, 1, 2)}
        late = agreed(2, 1)  # finds the list of the first attempt, and must not believe it
        time.sleep(0.3)
        assert not any(one.done() for one in late)
        (second,) = {one.result(timeout=60) for one in [*agreed(0), *late]}
        early = agreed(0)
        time.sleep(0.3)
        assert not early[0].done()
        (third,) = {one.result(timeout=60) for one in [*agreed(1, 2), *early]}
    assert len({first, second, third}) == 3


def test_a_process_that_does_not_come_is_named_in_time() -> None:
    store = distributed.dist.HashStore()
    distributed.attempt(store, 0, 1)
    store.set("present/1", "a process that was killed")
    with pytest.raises(TimeoutError, match="only some of the 2 processes started"):
        distributed.attempt(store, 0, 2, within=0.3)
