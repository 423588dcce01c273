"""Inspects and runs a graph of unknown origin in its own process: it may loop or fill memory."""

import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

import rampart
from rampart.handlers.engine import ENGINES, Engine

SECONDS = 20  # of one core
START_SECONDS = 60  # for the process to begin, on a busy machine
MEMORY = 2 * 2**30  # bytes, besides FACTOR times the size of the file
FACTOR = 8
LARGEST = 2 * 2**30  # bytes of a file: what ONNX allows
MAX_KINDS = 6  # of nodes listed
MAX_VALUES = 50  # inputs or outputs listed
MAX_LENGTH = 1000  # of a line
FAILURE = "it does not run as a Rampart graph: "


def trial(file: Path) -> Iterator[str]:
    """Lines on a graph, the last on whether it runs here; ValueError where it is none."""
    size = file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{file} is no ONNX graph: it is larger than 2 GB")
    limits = [str(SECONDS), str(MEMORY + FACTOR * size)]
    command = [sys.executable, "-m", "rampart.export.trial", str(file.resolve()), *limits]
    here = Path(rampart.__file__).parents[1]
    try:
        limit = SECONDS + START_SECONDS
        process = subprocess.run(command, capture_output=True, cwd=here, timeout=limit)
        code, out, errors = process.returncode, process.stdout, process.stderr
    except subprocess.TimeoutExpired as error:
        code, out, errors = -signal.SIGXCPU, error.stdout or b"", b""
    for line in out.splitlines():
        kind, text = json.loads(line)
        if kind == "error":
            raise ValueError(f"{file} is no ONNX graph: {text}")
        yield text
    if code:
        yield FAILURE + reason(code, errors.decode(errors="replace"))


def reason(code: int, errors: str) -> str:
    """Why the process ended before its time."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it took too long, more than {SECONDS} s"
    if code == -signal.SIGABRT:
        return "it wants too much memory"
    return f"it ended the process that tried it ({code}): {errors[-200:].strip()}"


def set_limits(seconds: int, memory: int) -> None:
    """Bound what this process may use from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + seconds
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def look(file: Path) -> Iterator[tuple[str, str]]:
    """(kind, text): lines on the graph, or why it is none. Runs it, without bounds."""
    try:
        model = onnx.load(file, load_external_data=False)
    except MemoryError:
        yield "line", FAILURE + "it wants too much memory"
        return
    except Exception as error:  # protobuf's errors have no common type
        yield "error", str(error)
        return
    if not model.opset_import:
        yield "error", "it is empty"
        return
    yield from (("line", line) for line in contents(model))
    yield "line", verdict(file, model)


def contents(model: onnx.ModelProto) -> Iterator[str]:
    """Inputs, outputs and nodes, and what this machine has for them."""
    for title, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values[:MAX_VALUES]:
            kind = value.type.tensor_type
            shape = [d.dim_param or d.dim_value for d in kind.shape.dim]
            types = onnx.TensorProto.DataType.keys()
            name = types[kind.elem_type].lower() if kind.elem_type < len(types) else "unknown"
            yield f"{title} {value.name}: {name} {tuple(shape)}"
        if len(values) > MAX_VALUES:
            yield f"{title}: {len(values) - MAX_VALUES} more"
    kinds = Counter(node.op_type for node in model.graph.node)
    common = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(MAX_KINDS))
    opset = model.opset_import[0].version
    yield f"{len(model.graph.node)} nodes, opset {opset}: {common} ..."
    yield f"ONNX Runtime {ort.__version__} here has {', '.join(ort.get_available_providers())}"


def verdict(file: Path, model: onnx.ModelProto) -> str:
    """Whether ONNX Runtime runs it as a Rampart graph."""
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors(model)):
        return FAILURE + "it keeps weights in other files, which are not read"
    try:
        names = tuple(output.name for output in model.graph.output)
        engine = next((one for one in ENGINES if one.kind._fields == names), Engine)
        engine(file, threads=1)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        text = " ".join(str(error).split())
        exhausted = isinstance(error, MemoryError) or "alloc" in text
        return FAILURE + (f"it wants too much memory ({text})" if exhausted else text)
    return "it runs here, on the CPU"


def tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message of ONNX, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if isinstance(value, Iterable) else [value]:
            if isinstance(part, onnx.TensorProto):
                yield part
            yield from tensors(part)


def main(file: str, seconds: str, memory: str) -> None:
    """The child process of `trial`: prints each line as JSON."""
    set_limits(int(seconds), int(memory))
    for kind, text in look(Path(file)):
        print(json.dumps([kind, text[:MAX_LENGTH]]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
