"""The process in which a new archive is tried."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from rampart.launch.job import CONFIG, FAILED, Job


def try_archive(index: int, copy: str) -> None:
    """Open `copy`, which is to replace an archive; ends this process with one line where it fails.

    To open it runs its graph and judges what that gives.
    """
    from rampart.handlers.telemetry import Metrics  # the launcher, which names us, needs neither
    from rampart.launch.opening import open_archive

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher ends this process
    job = Job(**json.loads(os.environ[CONFIG]))
    tempfile.tempdir = job.folder  # which goes with the launcher
    try:
        archive = Path(job.archives[index])
        open_archive(archive, Metrics(), copy=Path(copy), workers=job.workers)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
