"""A run of training that prints each step's loss; tests kill it, share it out and compare.

    python trajectory.py FOLDER ARCH METHOD

It saves after every step, in fp32, and continues what FOLDER holds.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from blobs import blobs
from torch import Tensor

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import RESNETS, VGGS, Classifier, ClassifierConfig
from rampart.hardening.train import distributed
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Recipe, Trainer, validate

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
STEPS = 12


def trajectory(
    folder: Path, arch: str, method: str, *, processes: int = 1, kill_at: int | None = None
) -> dict[int, float]:
    """The loss by step of this script, run as so many processes, killed as it says `kill_at`."""
    start = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    log = folder.with_suffix(".log")
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*start, __file__, str(folder), arch, method],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as run,
    ):
        assert run.stdout is not None
        losses, workers = {}, [run.pid]
        for line in run.stdout:
            match line.split():
                case ["worker", pid]:
                    workers.append(int(pid))
                case ["step", step, loss]:
                    losses[int(step)] = float(loss)
                    if int(step) == kill_at:
                        for pid in workers:
                            with suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGKILL)
                        return losses
    assert run.returncode == 0, log.read_text()
    return losses


def main(folder: str, arch: str, method: str) -> None:
    """Two epochs of six steps of 16 images."""
    distributed.join(torch.device("cpu"))
    print(f"worker {os.getpid()}", flush=True)
    torch.manual_seed(0)
    threat = Threat("Linf", 4 / 255)
    options = {"method": method, "epochs": 2, "batch_size": 16, "precision": "fp32", "steps": 3}
    recipe = Recipe(threat=threat, lr=0.05, awp=0.005, smoothing=0.1, ramp=0.5, **options)
    width = 0.125 if arch in (*RESNETS, *VGGS) else 1.0
    classifier = Classifier(ClassifierConfig(arch, 10, width=width))
    trainer = Trainer(classifier, recipe, Path(folder))
    trainer.run.save_every = 0

    def step(batch: Batch, progress: float) -> Tensor:
        loss = trainer.step(batch, progress)
        if distributed.first():
            print(f"step {6 * trainer.run.epoch + trainer.run.done} {float(loss):.9f}", flush=True)
        return loss

    images, held = blobs(96), blobs(32, seed=1)
    trainer.run.fit(
        images,
        step,
        lambda seen: validate(trainer.ema, seen, threat),
        chosen_on=held,
        epochs=2,
        batch_size=16,
        keep=lambda: None,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
