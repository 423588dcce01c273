"""Flagged images kept aside for people to look at, where the operator asks for that.

They are pictures of clients: the files are open to their owner alone, FILES of them at most, and
hold only what the model saw, at its resolution, without the client's file name or metadata.
"""

import json
import logging
import queue
import secrets
import threading
import time
from pathlib import Path
from random import uniform
from typing import NamedTuple

from PIL import Image, PngImagePlugin

from rampart.handlers import private_folder
from rampart.handlers.types import Pixels
from rampart.handlers.verdict import Verdict

logger = logging.getLogger(__name__)

FILES = 1000
PREFIX = "rampart-"  # of their names: other files in the folder are left alone
PER_SECOND = 5  # of one worker, so that a flood of bad images does not make it slow
WAITING = 16  # images in memory at most
RETRY = 5.0  # seconds after which a folder that failed is tried again
# Seconds until an image is written: work at once would slow the answer to the very image, and so
# tell a client that it was flagged.
DELAY = (0.2, 1.0)


class Flagged(NamedTuple):
    """One image on its way to the disk."""

    image: Pixels
    verdict: Verdict
    time: int  # ns since 1970; another one for each image of this process


class Quarantine:
    """A folder of PNG files, the newest FILES of them; each carries its verdict as text.

    A thread writes them. `works` tells whether the last attempt went well; a folder that fails, at
    the start too, is one line in the log and is tried again later. `dropped` counts what was not
    kept: it came too fast, or the folder failed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._second, self._kept, self._last, self._failed = 0, 0, 0, 0.0
        self.works, self.dropped = True, 0
        self._waiting: queue.Queue[Flagged] = queue.Queue(WAITING)
        self._hurry = threading.Event()
        self._attempt(None)
        threading.Thread(target=self._work, name="quarantine", daemon=True).start()

    def keep(self, image: Pixels, verdict: Verdict) -> None:
        """Have one image uint8 (H, W, 3) written; returns at once and harms no answer."""
        second = int(time.monotonic())
        self._kept = self._kept + 1 if second == self._second else 1
        self._second = second
        # Names sort by age, also where the clock is set back.
        self._last = max(time.time_ns(), self._last + 1)
        if self._kept > PER_SECOND:
            self.dropped += 1
            return
        try:
            self._waiting.put_nowait(Flagged(image, verdict, self._last))
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until all that was kept so far is written or dropped."""
        self._hurry.set()
        self._waiting.join()
        self._hurry.clear()

    def _work(self) -> None:
        while True:
            flagged = self._waiting.get()
            self._hurry.wait(uniform(*DELAY))
            if self.works or time.monotonic() - self._failed >= RETRY:
                self._attempt(flagged)
            else:
                self.dropped += 1
            self._waiting.task_done()

    def _attempt(self, flagged: Flagged | None) -> None:
        """Write one image, or for None nothing; what fails is logged once."""
        try:
            private_folder.claim(self._folder)
            self._write(flagged) if flagged else self._try_folder()
            self._forget()
        except Exception as error:  # of any kind: the thread must live
            why = getattr(error, "strerror", None) or error
            if self.works:
                logger.error("Nothing goes into quarantine %s: %s", self._folder, why)
            self.works, self._failed = False, time.monotonic()
            self.dropped += flagged is not None
        else:
            self.works = True

    def _try_folder(self) -> None:
        probe = self._folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # several workers start at once

    def _write(self, flagged: Flagged) -> None:
        text = PngImagePlugin.PngInfo()
        content = flagged.verdict.to_dict() | {"p_value": flagged.verdict.p_value}
        text.add_text("rampart", json.dumps(content))
        second, ns = divmod(flagged.time, 10**9)
        when = time.strftime("%Y%m%dT%H%M%S", time.gmtime(second))
        name = f"{PREFIX}{when}-{ns:09}-{secrets.token_hex(4)}"
        path, partial = (self._folder / f"{name}{suffix}" for suffix in (".png", ".partial"))
        try:
            partial.touch(mode=0o600)
            Image.fromarray(flagged.image).save(partial, "PNG", pnginfo=text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _forget(self) -> None:
        """Remove the oldest, what a killed worker left half done too; other workers do so too."""
        for path in sorted(self._folder.glob(f"{PREFIX}*"))[:-FILES]:
            path.unlink(missing_ok=True)
