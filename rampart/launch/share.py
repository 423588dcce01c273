"""How many clients each worker has, so that none has them all."""

import os
from pathlib import Path

UNEVEN = 1.25  # times its share, and one more, that a worker may have by chance


class Share:
    """One worker's share of the connections that ask; each worker leaves its count in a folder.

    All accept from one socket, and whoever wakes first may take every connection that is new: so
    may the first worker of a new archive, when the others end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / f"{os.getpid()}.clients"

    def surplus(self, clients: int) -> int:
        """Of the connections that asked this worker lately, how many should go to others."""
        draft = self._file.with_suffix(".draft")
        draft.write_text(str(clients))
        draft.replace(self._file)
        counts = [
            int(file.read_text())
            for file in self._folder.glob("*.clients")
            if Path(f"/proc/{file.stem}").exists()
        ]
        fair = sum(counts) / len(counts)
        return int(clients - fair) if clients > UNEVEN * fair + 1 else 0
