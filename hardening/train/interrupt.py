"""Ctrl-C during a run: it stops at the end of a step, so that the state that is saved is whole."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAID = b"\nstopping after this step, to save it; Ctrl-C again stops at once\n"


class Stop:
    """Whether Ctrl-C was pressed. While nothing is half done, it may interrupt `at_once`."""

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def ask(self, number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        """Note it; raises KeyboardInterrupt the second time, or `at_once`."""
        again, self.asked = self.asked, True
        if again or self.at_once:
            raise KeyboardInterrupt
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, SAID)  # print is not reentrant


@contextmanager
def on_interrupt(stop: Stop) -> Iterator[None]:
    """Ctrl-C asks `stop`, in the main thread: others have no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
