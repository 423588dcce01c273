"""Flagged images kept aside for people to look at, where the operator asks for that.

They are pictures of clients: the files are open to their owner alone, FILES of them at most, and
hold only what the model saw, at its resolution, without the client's file name or metadata.
"""

import json
import logging
import secrets
import time
from pathlib import Path

from PIL import Image, PngImagePlugin

from handlers.open_inference import Pixels
from handlers.verdict import Verdict

logger = logging.getLogger(__name__)

FILES = 1000
PREFIX = "rampart-"  # of their names: other files in the folder are left alone
PER_SECOND = 5  # of one worker, so that a flood of bad images does not make it slow


class Quarantine:
    """A folder of PNG files, the newest FILES of them; each carries its verdict as text.

    Raises ValueError for a folder that cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._second, self._kept = 0, 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink(missing_ok=True)  # several workers start at once
        except OSError as error:
            raise ValueError(
                f"quarantine {folder}: {error.strerror}. Name a folder that the server may write to"
            ) from error
        self.works = True

    def keep(self, image: Pixels, verdict: Verdict) -> None:
        """Write one image uint8 (H, W, 3). What fails is logged once and harms no answer."""
        second = int(time.time())
        self._kept = self._kept + 1 if second == self._second else 1
        self._second = second
        if self._kept > PER_SECOND:
            return
        try:
            self._write(image, verdict)
            self._forget()
        except OSError as error:
            if self.works:
                logger.error("Nothing goes into quarantine: %s", error.strerror)
            self.works = False
            return
        self.works = True

    def _write(self, image: Pixels, verdict: Verdict) -> None:
        text = PngImagePlugin.PngInfo()
        known = verdict.to_dict() | {"p_value": verdict.p_value}
        text.add_text("rampart", json.dumps(known))
        when = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        name = f"{PREFIX}{when}-{time.time_ns() % 10**9:09}-{secrets.token_hex(4)}"
        path, partial = (self._folder / f"{name}{suffix}" for suffix in (".png", ".partial"))
        try:
            partial.touch(mode=0o600)
            Image.fromarray(image).save(partial, "PNG", pnginfo=text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _forget(self) -> None:
        """Remove the oldest; other workers do so too."""
        for path in sorted(self._folder.glob(f"{PREFIX}*.png"))[:-FILES]:
            path.unlink(missing_ok=True)
