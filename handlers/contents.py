"""The files of an unpacked archive, their hashes, and what runs its graph."""

import json
import logging
from pathlib import Path

from rampart.handlers.engine import Engine, EngineError, Outputs, Runs, SceneOutputs, sha256
from rampart.handlers.plan import PlanEngine
from rampart.handlers.tasks import task_of

logger = logging.getLogger(__name__)

HASHES = "sha256.json"
GRAPH, PLAN = "graph.onnx", "graph.plan"  # a plan of TensorRT may lie beside the graph
PARTS = (GRAPH, "calibration.json", "card.json", "labels.json")
HANDLERS = Path(__file__).parent
HANDLER = "rampart/handlers/defended.py"
# A worker of TorchServe runs this folder: an archive holds it, without `http`, and no other code.
SOURCES = (
    "rampart/__init__.py",
    *sorted(
        f"rampart/handlers/{file.relative_to(HANDLERS).as_posix()}"
        for file in HANDLERS.rglob("*.py")
        if file.parent.name != "http"
    ),
)
NEEDED = (*PARTS, HANDLER)


def verify(folder: Path) -> dict[str, str]:
    """The SHA-256 of each listed file, once all are checked.

    Raises ValueError that names the file and the remedy; reads no file outside the folder.
    """
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{HASHES} is missing or unreadable: rebuild the archive") from error
    if not isinstance(hashes, dict):
        raise ValueError(f"{HASHES} is not a list of files: rebuild the archive")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if missing := sorted(hashes.keys() - files):
        raise ValueError(f"{missing[0]} is missing from the archive: rebuild the archive")
    # The archive's own code, which may be of another Rampart than this; a plan is code too.
    code = {name for name in files if name.startswith("rampart/") and name.endswith(".py")}
    needed = {*NEEDED, *code, *({PLAN} & files)}
    if unlisted := sorted(needed - hashes.keys()):
        raise ValueError(f"{unlisted[0]} is not listed in {HASHES}: rebuild the archive")
    for name, digest in hashes.items():
        if sha256(folder / name) != digest:
            raise ValueError(
                f"{name} is not the file that was packed (its SHA-256 differs from {HASHES}):"
                " rebuild the archive, or fetch it again"
            )
    return hashes


def load_engine(
    folder: Path, device: str, threads: int, gpu: int
) -> Runs[Outputs] | Runs[SceneOutputs]:
    """What runs an unpacked archive's graph: ONNX Runtime, or TensorRT for the device `plan`.

    `auto` takes a plan that works; where one does not, the log says so. An int8 graph runs on the
    CPU. Raises EngineError.
    """
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    precision, engine = card.get("precision"), task_of(card).engine
    if precision == "int8":
        if device not in ("cpu", "auto"):
            raise EngineError(f"an int8 archive is for CPUs, not {device}: build one with fp32")
        device = "cpu"
    if precision == "fp16" and device == "tensorrt":
        raise EngineError(
            "with device tensorrt, an fp16 archive would compute its scores in fp16 too: serve it"
            " with --device cuda, or pack a plan"
        )
    plan, graph = folder / PLAN, folder / GRAPH
    if device == "plan" and engine is not Engine:
        raise EngineError("only classifiers have plans: serve an object detector on cpu or cuda")
    if device == "plan" and not plan.is_file():
        raise EngineError(f"the archive has no {PLAN}: `rampart archive --plan` packs one")
    if device in ("plan", "auto") and plan.is_file() and engine is Engine:
        try:
            return PlanEngine(plan, graph, device_id=gpu)
        except EngineError as error:
            if device == "plan":
                raise
            logger.warning("Running the graph and not its plan: %s", error)
    return engine(graph, device, threads, device_id=gpu)
