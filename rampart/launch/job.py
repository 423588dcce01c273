"""What the launcher of the HTTP server tells its workers; it loads none of what answers."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CONFIG = "RAMPART_WORKER"  # variable of the environment with a Job in JSON
FAILED = 3  # the exit code of a worker that need not be started again, as uvicorn has it


@dataclass(frozen=True)
class Job:
    """What a worker serves."""

    archives: list[str]  # paths; the workers open the launcher's copies, in the same order
    folder: str  # of all workers, for those copies, figures, and buckets of tokens
    workers: int
    tokens: str | None = None  # a file
    delay: float = 0.0  # seconds that a batch waits for company
    grpc: str | None = None  # an address
    certificate: str | None = None  # a file of a chain and its key, for gRPC

    def environment(self) -> dict[str, str]:
        """How a worker is told."""
        return {CONFIG: json.dumps(asdict(self))}

    def copy_of(self, index: int) -> Path:
        """The launcher's copy of an archive, whole whatever happens to the archive."""
        return Path(self.folder) / f"{index}.mar"
