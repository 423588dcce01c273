"""A worker that is lost in the middle of a training: torchrun and Ray Train start all anew."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from blobs import blobs
from ray_cluster import Nodes, two_nodes

from rampart.hardening.train import state as states

pytestmark = [pytest.mark.training, pytest.mark.slow]
EPOCHS, BATCHES = 12, 4
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RAMPART = ("--no-python", str(Path(sys.executable).with_name("rampart")))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """The words of a training into a folder."""
    home = tmp_path_factory.mktemp("images")
    for name, images in (
        ("train", blobs(64 * BATCHES, size=16)),
        ("held", blobs(200, size=16, seed=1)),
    ):
        np.savez(home / name, image=images.image.numpy(), label=images.label.numpy())
    words = ["--data", str(home / "train.npz"), "--held", str(home / "held.npz")]
    words += ["--epochs", str(EPOCHS), "--batch-size", "64", "--validate-on", "20"]
    words += ["--arch", "resnet10", "--width", "0.125", "--image-size", "16", "--lr", "0.01"]
    words += ["--device", "cpu", "--dtype", "fp32"]
    return lambda out: ["train", *words, "--out", str(out)]


def torchrun(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*TORCHRUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def said(run: "subprocess.Popen[str]") -> str:
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def undisturbed(
    command: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The state at the end of a run of two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    said(torchrun(*RAMPART, *command(out)))
    return at_end(out)


def at_end(out: Path) -> dict[str, Any]:
    state = states.read(out)
    assert state is not None
    return state


def until(out: Path, epoch: int, run: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 200
    while not states.unfinished(out) or at_end(out)["epoch"] < epoch:
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0]
        time.sleep(0.05)


def same(state: dict[str, Any], other: dict[str, Any]) -> None:
    """Whether two runs took the same steps to the same end."""
    assert state["epoch"] == EPOCHS and state["steps"] == EPOCHS * BATCHES
    assert [row["epoch"] for row in state["history"]] == [*range(1, EPOCHS + 1)]
    for row, known in zip(state["history"], other["history"], strict=True):
        for name in ("loss", "clean", "pgd10"):
            assert row[name] == pytest.approx(known[name], abs=1e-5)


def test_torchrun_goes_on_from_the_last_state_when_a_process_is_killed(
    command: Callable[[Path], list[str]], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = torchrun("--max-restarts", "1", *RAMPART, *command(tmp_path))
    until(tmp_path, 3, run)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    text = said(run)
    assert f"continuing {tmp_path} at epoch" in text
    same(at_end(tmp_path), undisturbed)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with two_nodes() as nodes:
        yield nodes


def test_ray_train_takes_the_same_steps_when_a_process_is_killed(
    command: Callable[[Path], list[str]],
    undisturbed: dict[str, Any],
    nodes: Nodes,
    tmp_path: Path,
) -> None:
    run = nodes.start("rampart.ray_train", "--workers", "2", *command(tmp_path))
    until(tmp_path, 3, run)
    workers = nodes.processes("ray::RayTrainWorker")
    assert len({worker.ppid() for worker in workers}) == 2  # one on each node
    workers[1].kill()
    text = said(run)
    assert f"continuing {tmp_path} at epoch" in text
    same(at_end(tmp_path), undisturbed)
