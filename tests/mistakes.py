"""Commands typed wrong: each in a process forked from one that has the command line loaded.

So has it what commands import before torch: seconds of CPU are those of a command without that.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Reads a list of words a line; forks; answers with what the command said, and what it took.
SERVER = """
import io, json, os, resource, sys, tempfile, traceback
from contextlib import redirect_stderr, suppress
import numpy, onnxruntime, PIL.Image, yaml
from rampart import cli
sys.argv = ["rampart", "train", "--data", "nope", "--out", "o"]
with redirect_stderr(io.StringIO()), suppress(Exception):
    cli.main()  # the parser of options loads more
for line in sys.stdin:
    with tempfile.TemporaryFile() as said:
        read, write = os.pipe()
        if not (child := os.fork()):
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.argv = ["rampart", *json.loads(line)]
            began = resource.getrusage(resource.RUSAGE_SELF)
            try:
                code = cli.main()
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            used = resource.getrusage(resource.RUSAGE_SELF)
            seconds = used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime
            os.write(write, json.dumps([code, seconds, "torch" in sys.modules]).encode())
            os._exit(0)
        os.close(write)
        answer = json.loads(os.fdopen(read).read())
        os.waitpid(child, 0)
        said.seek(0)
        print(json.dumps([said.read().decode(), *answer]), flush=True)
"""


class Told(NamedTuple):
    """What a command said, with what exit code, after how much CPU, and whether torch came in."""

    text: str
    code: int
    seconds: float
    torch: bool


class Terminal:
    """A terminal in a folder, where commands are typed."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def type(self, *words: str) -> Told:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return Told(*json.loads(self.process.stdout.readline()))


@contextmanager
def terminal(folder: Path, **environment: str) -> Iterator[Terminal]:
    """A terminal in `folder`, gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=folder, env=os.environ | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield Terminal(process)
