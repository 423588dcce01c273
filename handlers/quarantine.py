"""Stores flagged images for people to look at, where the operator asks for that.

They are pictures of clients: only the owner can read the files, there are FILES at most, and they
hold only the model's input, at its resolution, without the client's file name or metadata.
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
from rampart.handlers.scenes import SceneVerdict
from rampart.handlers.types import Pixels
from rampart.handlers.verdict import Verdict

logger = logging.getLogger(__name__)

FILES = 1000
PREFIX = "rampart-"  # of their names: other files in the folder stay
PER_SECOND = 5  # of one worker, so that a flood of bad images does not make it slow
WAITING = 16  # images in memory at most
RETRY = 5.0  # seconds until the next attempt after a failure
# Seconds until an image is written: to write at once would slow the answer to that very image, and
# so tell its client that it was flagged.
DELAY = (0.2, 1.0)


class Flagged(NamedTuple):
    """One image on its way to the disk."""

    image: Pixels
    verdict: Verdict | SceneVerdict
    time: int  # ns since 1970, unique in this process
    due: float  # of time.monotonic, from which it may be written


class Quarantine:
    """A folder of the newest FILES images, as PNG files that carry their verdicts as text.

    A thread writes them. `works` tells whether the last attempt succeeded. A folder that fails, at
    the start too, gets one line in the log and another attempt later. `dropped` counts images that
    came too fast, or while the folder failed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._second, self._count, self._last, self._failure = 0, 0, 0, 0.0
        self.works, self.dropped, self._told = True, 0, 0
        self._waiting: queue.Queue[Flagged] = queue.Queue(WAITING)
        self._attempt(None)
        threading.Thread(target=self._work, name="quarantine", daemon=True).start()

    def keep(self, image: Pixels, verdict: Verdict | SceneVerdict) -> None:
        """Queue one image uint8 (H, W, 3); returns at once and harms no answer."""
        second = int(time.monotonic())
        self._count = self._count + 1 if second == self._second else 1
        self._second = second
        # Names sort by age, even if the clock is set back.
        self._last = max(time.time_ns(), self._last + 1)
        if self._count > PER_SECOND or self._waiting.full():  # only this thread puts anything in
            self.dropped += 1
        else:
            due = time.monotonic() + uniform(*DELAY)
            self._waiting.put_nowait(Flagged(image, verdict, self._last, due))

    def take_dropped(self) -> int:
        """How many were dropped since this was asked last."""
        told, self._told = self._told, self.dropped
        return self._told - told

    def _work(self) -> None:
        while True:
            flagged = self._waiting.get()
            time.sleep(max(0.0, flagged.due - time.monotonic()))
            if self.works or time.monotonic() - self._failure >= RETRY:
                self._attempt(flagged)
            else:
                self.dropped += 1
            self._waiting.task_done()

    def _attempt(self, flagged: Flagged | None) -> None:
        """Write one image, or only try the folder; the log gets one line on each failure."""
        try:
            private_folder.claim(self._folder)
            self._write(flagged) if flagged else self._try_folder()
            self._remove_oldest()
        except Exception as error:  # of any kind: the thread must live
            reason = getattr(error, "strerror", None) or error
            if self.works:
                logger.error("Cannot write to quarantine %s: %s", self._folder, reason)
            self.works, self._failure = False, time.monotonic()
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
        date = time.strftime("%Y%m%dT%H%M%S", time.gmtime(second))
        name = f"{PREFIX}{date}-{ns:09}-{secrets.token_hex(4)}"
        path, partial = (self._folder / f"{name}{suffix}" for suffix in (".png", ".partial"))
        try:
            partial.touch(mode=0o600)
            Image.fromarray(flagged.image).save(partial, "PNG", pnginfo=text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _remove_oldest(self) -> None:
        """Other workers do so too. Also removes what a killed worker left half written."""
        for path in sorted(self._folder.glob(f"{PREFIX}*"))[:-FILES]:
            path.unlink(missing_ok=True)
