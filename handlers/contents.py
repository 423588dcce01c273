"""What an archive holds, once it is unpacked: its files, their hashes, what runs its graph."""

import hashlib
import json
import logging
from pathlib import Path

from rampart.handlers.engine import Engine, EngineError, Runs
from rampart.handlers.plan import PlanEngine

logger = logging.getLogger(__name__)

HASHES = "sha256.json"
GRAPH, PLAN = "graph.onnx", "graph.plan"  # a plan of TensorRT may lie beside the graph
PARTS = (GRAPH, "calibration.json", "card.json", "labels.json")
HANDLERS = Path(__file__).parent
# What runs inside a worker is packed beside the graph: this folder, all of it, and no more.
SOURCES = (
    "rampart/__init__.py",
    *sorted(
        f"rampart/handlers/{file.relative_to(HANDLERS).as_posix()}"
        for file in HANDLERS.rglob("*.py")
    ),
)
NEEDED = PARTS + SOURCES


def verify(folder: Path) -> None:
    """Check every listed file's SHA-256. Raises ValueError that names the file and the remedy."""
    try:
        listed = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{HASHES} is missing or unreadable: build the archive anew") from error
    for name in NEEDED:
        if name not in listed:
            raise ValueError(f"{name} is not listed in {HASHES}: build the archive anew")
    if (folder / PLAN).exists() and PLAN not in listed:
        raise ValueError(f"{PLAN} is not listed in {HASHES}, and is code: build the archive anew")
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing from the archive: build the archive anew")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"{name} is not the file that was packed (its SHA-256 differs from {HASHES}):"
                " build the archive anew, or fetch it again"
            )


def load_engine(folder: Path, device: str, threads: int, gpu: int) -> Runs:
    """What runs an unpacked archive's graph: ONNX Runtime, or for the device `plan` TensorRT.

    `auto` takes a plan where there is one that works, and says so where it does not; an int8 graph
    runs on the CPU. Raises EngineError.
    """
    precision = json.loads((folder / "card.json").read_text(encoding="utf-8")).get("precision")
    if precision == "int8":
        if device not in ("cpu", "auto"):
            raise EngineError(f"an int8 archive is for CPUs, not {device}: build one with fp32")
        device = "cpu"
    if precision == "fp16" and device == "tensorrt":
        raise EngineError(
            "TensorRT's provider would compute scores in fp16 too: serve an fp16 archive with"
            " --device cuda, or pack a plan"
        )
    plan, graph = folder / PLAN, folder / GRAPH
    if device == "plan" and not plan.is_file():
        raise EngineError(f"the archive has no {PLAN}: `rampart archive --plan` packs one")
    if device in ("plan", "auto") and plan.is_file():
        try:
            return PlanEngine(plan, graph, device_id=gpu)
        except EngineError as error:
            if device == "plan":
                raise
            logger.warning("Running the graph and not its plan: %s", error)
    return Engine(graph, device, threads, device_id=gpu)
