"""`rampart play` at work, for tests that ask it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from browser import Page, Pipe

READY = "!document.querySelector('#said').hidden && document.querySelector('#switched').innerText"


class Playground(NamedTuple):
    """One at work: where it answers, and its process."""

    root: str
    process: "subprocess.Popen[str]"

    def end(self) -> int:
        """As Ctrl-C ends it; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextmanager
def playing(folder: Path, *options: object, log: Path, name: str = "tiny") -> Iterator[Playground]:
    """`rampart play` on a free port, of the model that its card calls `name`."""
    command = [sys.executable, "-m", "rampart", "play", "--model", folder, "--no-browser"]
    words = [str(word) for word in [*command, "--port", 0, *options]]
    with log.open("w") as complaints:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=complaints, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(f"The playground of {name}: http://127.0.0.1:"), log.read_text()
        yield Playground(line.split()[4], process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def opened(pipe: Pipe, root: str) -> Iterator[Page]:
    """The page with its first picture judged; nothing may have gone wrong in it by the end."""
    one = Page(pipe)
    one.resize(1100)
    one.open(root)
    one.wait(READY)
    yield one
    assert not one.complaints()
