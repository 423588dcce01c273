"""Ray Train: `rampart train` or `rampart purifier` in processes that Ray places and starts again.

    python -m rampart.ray_train --workers 8 --gpu train --data /data --out /shared/runs/a

What follows the options is a command as you type it. Its processes meet as those of torchrun do,
and train by the same loop. If a process or its node is lost, Ray starts all of them anew, and the
command goes on from the state in its `--out`: so that folder, and the data, must be under the same
path on all nodes.
"""

import argparse
import sys
from collections.abc import Sequence

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

VERBS = ("train", "purifier")  # those that several processes share


def work(words: Sequence[str]) -> None:
    """Run the command in one of the processes, which Ray has told what torchrun tells."""
    from rampart import cli

    sys.argv = ["rampart", *words]  # what its card says made it
    cli.app(list(words), standalone_mode=False)


def main() -> None:
    """Train until the end; ends with one line for what cannot be trained."""
    parser = argparse.ArgumentParser("python -m rampart.ray_train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workers", type=int, required=True, help="Processes")
    parser.add_argument("--cpus", type=int, default=1, help="Cores of each process")
    parser.add_argument("--gpu", action="store_true", help="A GPU for each process")
    parser.add_argument("--failures", type=int, default=3, help="Restarts before it gives up")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    given = parser.parse_args()
    if given.words[:1] not in [[verb] for verb in VERBS]:
        parser.error(f"pass a command that starts with {' or '.join(VERBS)}")
    trainer = TorchTrainer(
        work,
        train_loop_config=given.words,
        scaling_config=ScalingConfig(
            num_workers=given.workers,
            use_gpu=given.gpu,
            resources_per_worker={"CPU": given.cpus} | ({"GPU": 1} if given.gpu else {}),
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=given.failures)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
