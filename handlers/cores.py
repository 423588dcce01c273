"""How many cores this process may use."""

import math
import os
from pathlib import Path


def available_cores() -> int:
    """The cores that this process may run on, within the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or cores)


def quota(own: Path, groups: Path) -> int | None:
    """Cores, rounded up, that a control group of version 2 may use; None for no limit.

    `own` is the file that names the group, `groups` the folder of all groups.
    """
    try:
        name = own.read_text().partition("0::/")[2].strip()
        limit, period = (groups / name / "cpu.max").read_text().split()
        return math.ceil(int(limit) / int(period))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None
