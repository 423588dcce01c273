"""A run of training that sends each step's loss; tests kill it, share it out and compare.

It saves after every step, in fp32, and continues what its folder holds. Its processes are told
what torchrun tells, but are forked from one that has torch loaded, since each would take seconds.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import torch
from blobs import blobs
from servers import free_port
from torch import Tensor

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import RESNETS, VGGS, Classifier, ClassifierConfig
from rampart.hardening.train import distributed
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Recipe, Trainer, validate

STEPS = 12
forks = get_context("forkserver")
forks.set_forkserver_preload(
    ["timm", "rampart.hardening.train.loop", "rampart.hardening.train.curve"]
)


def trajectory(
    folder: Path,
    arch: str,
    method: str,
    *,
    processes: int = 1,
    kill_at: int | None = None,
    batch_size: int = 16,
) -> dict[int, float]:
    """The loss by step of a run of so many processes, all killed after the step `kill_at`."""
    log, (losses, sender) = folder.with_suffix(".log"), forks.Pipe(duplex=False)
    task = partial(train, batch_size=batch_size)
    workers = start(processes, log, task, sender, folder, arch, method)
    sender.close()
    by_step: dict[int, float] = {}
    with losses, suppress(EOFError):
        while kill_at not in by_step:
            step, loss = losses.recv()
            by_step[step] = loss
    if kill_at is not None:
        for worker in workers:
            worker.kill()
    for worker in workers:
        worker.join()
        assert worker.exitcode == (0 if kill_at is None else -signal.SIGKILL), log.read_text()
    return by_step


def interrupted(folder: Path, arch: str, *, times: int, seed: int) -> list[tuple[int, float]]:
    """(step, loss) of a run that Ctrl-C ends so often, each time at a random moment.

    Nothing else has its state written. Steps of 4 images, so that there are enough of them.
    """
    draws, log, losses = random.Random(seed), folder.with_suffix(".log"), list[tuple[int, float]]()
    for turn in range(times + 1):
        receiver, sender = forks.Pipe(duplex=False)
        options = {"save_every": 1e9, "batch_size": 4}
        (worker,) = start(1, log, partial(train, **options), sender, folder, arch, "nfgsm")
        sender.close()
        with receiver, suppress(EOFError):
            losses.append(receiver.recv())
            if turn < times:
                time.sleep(draws.uniform(0, 0.05))
                os.kill(worker.pid or 0, signal.SIGINT)
            while True:
                losses.append(receiver.recv())
        worker.join()
        text = log.read_text().rstrip()
        assert worker.exitcode == (1 if turn < times else 0), text
        assert turn == times or text.endswith("KeyboardInterrupt"), text
    return losses


def start(count: int, log: Path, task: Callable[..., None], *arguments: object) -> list[Process]:
    """So many processes that join as torchrun's do, then do `task`; what they say goes to `log`."""
    places: list[dict[str, str]] = [{}]
    if count > 1:
        meet = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{free_port()}",
        }
        places = [meet | {"RANK": str(rank)} for rank in range(count)]
    workers: list[Process] = []
    for place in places:
        workers.append(forks.Process(target=work, args=(place, log, task, *arguments)))
        workers[-1].start()
    return workers


def work(place: dict[str, str], log: Path, task: Callable[..., None], *arguments: object) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= place
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    task(*arguments)


def train(
    losses: Connection,
    folder: Path,
    arch: str,
    method: str,
    *,
    save_every: float = 0,
    batch_size: int = 16,
) -> None:
    """Two epochs of 96 images."""
    torch.manual_seed(0)
    threat = Threat("Linf", 4 / 255)
    options = {
        "method": method,
        "epochs": 2,
        "batch_size": batch_size,
        "precision": "fp32",
        "steps": 3,
    }
    recipe = Recipe(threat=threat, lr=0.05, awp=0.005, smoothing=0.1, ramp=0.5, **options)
    width = 0.125 if arch in (*RESNETS, *VGGS) else 1.0
    size = 16 if arch in (*RESNETS, "squeezenet1_1") else 32  # others pool 16 pixels away
    classifier = Classifier(ClassifierConfig(arch, 10, width=width, image_size=size))
    trainer = Trainer(classifier, recipe, folder)
    trainer.run.save_every = save_every

    def step(batch: Batch, progress: float) -> Tensor:
        loss = trainer.step(batch, progress)
        if distributed.first():
            per_epoch = len(images) // batch_size
            losses.send((per_epoch * trainer.run.epoch + trainer.run.done, float(loss)))
        return loss

    images, held = blobs(96, size=size), blobs(32, size=size, seed=1)
    trainer.run.fit(
        images,
        step,
        lambda seen: validate(trainer.ema, seen, threat),
        chosen_on=held,
        epochs=2,
        batch_size=batch_size,
        keep=lambda: None,
    )
