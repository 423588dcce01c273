"""A store screened by a model: shards, processes, verdicts, and what they come to."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from rampart.handlers.cores import available_cores
from rampart.screening import cluster, near, shards, summary
from rampart.screening.model import packed
from rampart.screening.run import Processes, claimed, run, settings
from rampart.screening.worker import Setup


class Wanted(NamedTuple):
    """What is read of Parquet files, and what is written."""

    column: str | None = None
    only_flagged: bool = False
    copies: Path | None = None
    near_duplicates: bool = False
    elsewhere: bool = False  # whether rows may name files outside the folder of their table


class Result(NamedTuple):
    """What a run found: for JSON, and in words."""

    figures: dict[str, Any]
    lines: list[str]

    def insist(self) -> None:
        """Raise RuntimeError where shards have no verdicts."""
        if failed := self.figures["failed_shards"]:
            address, why = next(iter(failed.items()))
            raise RuntimeError(
                f"{len(failed)} shards have no verdicts, such as {address} ({why}): run the same"
                " command again"
            )


def screen(
    source: str,
    model: Path,
    out: Path,
    wanted: Wanted = Wanted(),  # noqa: B008
    *,
    workers: int | None = None,
    device: str = "auto",
    ray: str | None = None,
) -> Result:
    """Verdicts on each picture of `source` (any address of fsspec), in OUT/verdicts/*.parquet.

    `model` is an archive, or a model folder that ships its graph. The same call goes on from the
    shards that are done. `workers` are processes of this machine, one a core by default; with
    `ray`, the address of a cluster or `auto`, tasks of that at once. Raises ValueError for a source
    without pictures, a model that cannot be served, an OUT of another run, and a cluster that does
    not answer.
    """
    if wanted.only_flagged and wanted.near_duplicates:
        raise ValueError(
            "--near-duplicates compares all pictures, and --only-flagged leaves rows out: pass one"
        )
    if ray and device not in ("auto", "cpu"):
        raise ValueError(f"--ray screens on CPUs, not on {device}: leave out --device")
    with contextlib.ExitStack() as stack:
        if ray:
            stack.enter_context(cluster.connected(ray))
        store = shards.find(source, wanted.column, elsewhere=wanted.elsewhere)
        archive = stack.enter_context(packed(model))
        setup = Setup(
            archive, out, workers or available_cores(), "cpu" if ray else device, *wanted[1:4]
        )
        service = setup.open()
        with claimed(out, settings(service, source, setup)) as parts:
            placed = setup._replace(out=parts)
            made = cluster.Cluster(placed, workers) if ray else Processes(placed)
            outcome = run(store, parts, made.screened)
            left_out = store.left_out + outcome.tally.left_out
            figures = summary.figures(service, outcome) | {"files_left_out": left_out}
            if wanted.near_duplicates:
                figures["near_duplicates"] = near.write(parts, out)
            (out / summary.FILE).write_text(json.dumps(figures, indent=1) + "\n")
    return Result(figures, [*summary.in_words(figures), f"{parts}: a Parquet file a shard"])
