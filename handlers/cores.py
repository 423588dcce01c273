"""How many cores this process may use."""

import math
import os
from pathlib import Path


def available_cores() -> int:
    """The cores that it may run on, and no more than the CPU time that its container is given."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or cores)


def quota(own: Path, groups: Path) -> int | None:
    """Cores, begun ones counted, that a control group of version 2 may use; None for no limit.

    `own` is the file that names the group, `groups` the folder of all.
    """
    try:
        name = own.read_text().partition("0::/")[2].strip()
        most, period = (groups / name / "cpu.max").read_text().split()
        return math.ceil(int(most) / int(period))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None
