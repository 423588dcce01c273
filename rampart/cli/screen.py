"""The verb that judges stores of pictures, offline."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.cli.serve import DEVICE, Device

SOURCE = "Folder, list of addresses (.txt), tar or Parquet files, or a pattern such as"
SOURCE += " 'shards/{000..099}.tar'; any fsspec address, such as s3://BUCKET/PREFIX"
BY = "Archive (.mar), or folder of a model that ships its graph"
OUT = "Folder for the verdicts; an unfinished run in it resumes"
COLUMN = "Parquet: the column with bytes or addresses; default: the first such column"
FLAGGED = "Write only rows of flagged pictures and of errors"
COPIES = "Copy the files of flagged pictures into this folder"
NEAR = "Also find nearly identical pictures, as query attacks send them"
ELSEWHERE = "Parquet: also read addresses outside the folder of the table"
WORKERS = "Processes, or tasks of a cluster at once; default: one per core"
RAY = "Screen on this Ray cluster (HOST:PORT, ray://HOST:PORT); auto: the cluster on this machine"

verb, app = o.theme("Serve")


@verb(
    "screen pictures/ --model model_store/traffic-signs",
    "screen 's3://bucket/{000..099}.tar' --model mine.mar --out verdicts --only-flagged",
)
def screen(
    source: Annotated[str, Argument(help=SOURCE)],
    model: Annotated[Path, Option("--archive", "--model", help=BY), inputs.served] = o.SHIPPED,
    out: Annotated[Path, Option(help=OUT), inputs.folder_to_write] = Path("runs/screen"),
    column: Annotated[str | None, Option(help=COLUMN)] = None,
    only_flagged: Annotated[bool, Option("--only-flagged", help=FLAGGED)] = False,
    copy_flagged: Annotated[Path | None, Option(help=COPIES), inputs.folder_to_write] = None,
    near_duplicates: Annotated[bool, Option("--near-duplicates", help=NEAR)] = False,
    elsewhere: Annotated[bool, Option("--elsewhere", help=ELSEWHERE)] = False,
    workers: Annotated[int | None, Option(min=1, help=WORKERS)] = None,
    device: Annotated[Device, Option(help=DEVICE)] = "auto",
    ray: Annotated[str | None, Option(metavar="ADDRESS", help=RAY)] = None,
) -> None:
    """Judge a store of pictures without a server, and write the verdicts as Parquet.

    After Ctrl-C, run the same command to resume.
    """
    from rampart.screening.screen import Wanted, screen

    wanted = Wanted(column, only_flagged, copy_flagged, near_duplicates, elsewhere)
    result = screen(source, model, out, wanted, workers=workers, device=device, ray=ray)
    say(*result.lines)
    result.insist()
