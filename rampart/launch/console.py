"""What launchers say on standard output, which may be a full disk, or a pipe that nobody reads."""

import os
import sys


def say(line: str) -> None:
    """Print a line. Where that fails serving goes on, and ends as it should."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:  # a full disk, which may be emptied
        pass
