"""A store screened by a model: shards, processes, verdicts, and what they come to."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rampart.handlers.cores import available_cores
from rampart.screening import near, shards, summary
from rampart.screening.model import packed
from rampart.screening.run import claimed, run, settings
from rampart.screening.worker import Setup


class Wanted(NamedTuple):
    """What is read of Parquet files, and what is written."""

    column: str | None = None
    only_flagged: bool = False
    copies: Path | None = None
    near_duplicates: bool = False


class Result(NamedTuple):
    """What a run found: for JSON, and in words."""

    figures: dict[str, Any]
    lines: list[str]

    def insist(self) -> None:
        """Raise RuntimeError where shards have no verdicts."""
        if failed := self.figures["failed_shards"]:
            address, why = next(iter(failed.items()))
            raise RuntimeError(
                f"{len(failed)} shards have no verdicts, as {address} ({why}): run the same again"
            )


def screen(
    source: str,
    model: Path,
    out: Path,
    wanted: Wanted = Wanted(),  # noqa: B008
    *,
    workers: int | None = None,
    device: str = "auto",
) -> Result:
    """Verdicts on each picture of `source` (any address of fsspec), in OUT/verdicts/*.parquet.

    `model` is an archive, or a model folder that ships its graph. The same call goes on from the
    shards that are done. Raises ValueError for a source without pictures, a model that cannot be
    served, and an OUT of another run.
    """
    workers = workers or available_cores()
    store = shards.find(source, wanted.column)
    with packed(model) as archive:
        setup = Setup(archive, out, workers, device, *wanted[1:])
        service = setup.open()
        with claimed(out, settings(service, source, setup)) as parts:
            outcome = run(store, setup._replace(out=parts))
            figures = summary.figures(service, outcome) | {"files_left_out": store.left_out}
            if wanted.near_duplicates:
                figures["near_duplicates"] = near.write(parts, out)
            (out / summary.FILE).write_text(json.dumps(figures, indent=1) + "\n")
    return Result(figures, [*summary.in_words(figures), f"{parts}: a Parquet file a shard"])
