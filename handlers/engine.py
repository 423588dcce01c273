"""Run the exported graph in ONNX Runtime, on the requested device or not at all."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from rampart.handlers.cores import available_cores

logger = logging.getLogger(__name__)

MAX_BATCH = 64
PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
DEVICES = ("cpu", *PROVIDERS, "auto")
# What each provider needs besides onnxruntime-gpu.
LIBRARIES = {
    "cuda": "the libraries of CUDA 13 and cuDNN 9 (they come with torch)",
    "tensorrt": "the libraries of TensorRT 10 besides those of CUDA 13 and cuDNN 9",
}
# What a graph's metadata call the bits of its integer weights, and how many they may have where a
# CPU adds two products with activations in 16 bits: 2 * 255 * 64 < 2**15.
WEIGHT_BITS, SAFE_BITS = "rampart_weight_bits", 7
BEST_BATCH = 8  # what TensorRT tunes for


class EngineError(RuntimeError):
    """The graph or the device cannot be used as requested; the message names the remedy."""


class Outputs(NamedTuple):
    """The graph's outputs for N images."""

    logits: NDArray[np.float32]  # (N, K), of the purified image
    raw_logits: NDArray[np.float32]  # (N, K)
    scores: NDArray[np.float32]  # (N, D)
    purified: NDArray[np.uint8]  # (N, H, W, 3)


class SceneOutputs(NamedTuple):
    """The outputs of an object detector's graph for N images: candidates that may overlap."""

    boxes: NDArray[np.float32]  # (N, C, 4), x1, y1, x2, y2 in pixels of the input
    confidences: NDArray[np.float32]  # (N, C) in [0, 1]
    labels: NDArray[np.int64]  # (N, C)
    scores: NDArray[np.float32]  # (N, D)


OUTPUTS = Outputs._fields
Found = TypeVar("Found", Outputs, SceneOutputs)
Found_co = TypeVar("Found_co", covariant=True)


class Runs(Protocol[Found_co]):
    """What runs a graph: an engine, or a TensorRT plan."""

    device: str
    image_shape: tuple[int, int, int]

    def run(self, images: NDArray[np.uint8]) -> Found_co:
        """Outputs of uint8 (N, H, W, 3)."""
        ...


Runner = Runs[Outputs]


def run_in_pieces(
    run: Callable[[NDArray[np.uint8]], Sequence[NDArray[Any]]],
    images: NDArray[np.uint8],
    size: int,
    kind: type[Found],
) -> Found:
    """What `run` gives for images (N, H, W, 3), at most `size` of them at a time."""
    pieces = [run(images[start : start + size]) for start in range(0, len(images), size)]
    return kind(*map(np.concatenate, zip(*pieces, strict=True)))


def check_images(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> None:
    """Raise ValueError for anything but uint8 (N, H, W, 3) of this `shape` (H, W, 3)."""
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise ValueError(f"expected uint8 images (N, {shape}), not {images.shape}")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Loaded(Generic[Found]):
    """A loaded and warmed-up graph with the outputs of its `kind`.

    `device` is cpu, cuda, tensorrt, or auto: cuda where it works, else cpu with a line in the log.
    TensorRT builds for minutes on the first start; later ones read RAMPART_ENGINES.
    `threads` is how many cores one run may use; 0 takes all. Raises EngineError.
    """

    kind: type[Found]

    def __init__(
        self, path: Path, device: str = "cpu", threads: int = 0, *, device_id: int = 0
    ) -> None:
        if device not in DEVICES:
            raise EngineError(f"unknown device: choose one of {', '.join(DEVICES)}")
        self.device = device
        if device == "auto":
            self.device = "cuda" if _is_installed("cuda") else "cpu"
        try:
            self._session = _session(path, self.device, threads, device_id)
        except EngineError as error:
            if device != "auto":
                raise
            logger.warning("Running on the CPU instead: %s", error)
            self.device = "cpu"
            self._session = _session(path, self.device, threads, device_id)
        self.image_shape = _image_shape(self._session, path, self.kind._fields)
        self.digest = f"{sha256(path)} in ONNX Runtime {ort.__version__}"
        for batch in (1, 2):
            self.run(np.zeros((batch, *self.image_shape), dtype=np.uint8))

    def run(self, images: NDArray[np.uint8]) -> Found:
        """Run uint8 (N, H, W, 3) through the graph, in pieces of at most MAX_BATCH images."""
        check_images(images, self.image_shape)
        return run_in_pieces(self._piece, images, MAX_BATCH, self.kind)

    def _piece(self, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self._session.run(self.kind._fields, {"image": images})
        return outputs


class Engine(Loaded[Outputs]):
    """A classifier's graph."""

    kind = Outputs


class SceneEngine(Loaded[SceneOutputs]):
    """An object detector's graph."""

    kind = SceneOutputs


ENGINES = Engine, SceneEngine


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The features that the kernel lists for this CPU; none where there is no such list."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return set()
    return set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.M)).split())


def dots_bytes(features: set[str]) -> bool:
    """Whether a CPU sums products of bytes in 32 bits: VNNI of x86, or its like on ARM."""
    return bool(features & {"avx_vnni", "avx512_vnni", "asimddp"})


def overflows(graph: Path, features: set[str]) -> bool:
    """Whether a CPU with these features adds products of this graph's bytes in 16 bits, and they
    are too large for that: those of 8-bit weights are, those of 7-bit weights are not.
    """
    if dots_bytes(features):
        return False
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's exceptions have no common type; who loads the graph says so
        return True
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata.get(WEIGHT_BITS) != str(SAFE_BITS)


def _session(path: Path, device: str, threads: int, device_id: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    # Spinning threads burn the cores that other workers need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if device != "cpu" and not _is_installed(device):
        raise EngineError(
            f"no {device.upper()} device for onnxruntime: its {PROVIDERS[device]} is missing,"
            " install onnxruntime-gpu"
        )
    if overflows(path, cpu_features()):
        # The option doubles the time.
        options.add_session_config_entry("session.x64quantprecision", "1")
    providers = _providers(path, device, device_id)
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise EngineError(
            f"{path.name} is not a graph that onnxruntime can load: {error}"
        ) from error
    # ONNX Runtime falls back to the CPU without an error.
    if device != "cpu" and session.get_providers()[0] != PROVIDERS[device]:
        raise EngineError(
            f"no {device.upper()} device for onnxruntime: it needs an NVIDIA GPU with its driver,"
            f" and {LIBRARIES[device]}; or choose the device cpu"
        )
    return session


def _is_installed(device: str) -> bool:
    return PROVIDERS[device] in ort.get_available_providers()


def _providers(path: Path, device: str, device_id: int) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    ort.preload_dlls()
    cuda = {"device_id": device_id, "cudnn_conv_algo_search": "HEURISTIC"}
    providers: list[Any] = [(PROVIDERS["cuda"], cuda), "CPUExecutionProvider"]
    if device == "tensorrt":
        providers.insert(0, (PROVIDERS["tensorrt"], tensorrt_options(path, device_id)))
    return providers


def tensorrt_options(path: Path, device_id: int) -> dict[str, Any]:
    """Options of ONNX Runtime's TensorRT provider, which caches what it builds for this graph.

    It computes in TF32 where the GPU can; a plan of `rampart export --tensorrt` does not.
    The folder's name holds graph and ONNX Runtime; the provider names its files after GPU and
    TensorRT.
    """
    root = Path(os.environ.get("RAMPART_ENGINES") or Path.home() / ".cache" / "rampart")
    folder = root / f"{sha256(path)[:16]}-onnxruntime-{ort.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape[1:]
    batches = zip(("min", "opt", "max"), (1, BEST_BATCH, MAX_BATCH), strict=True)
    shapes = {name: f"image:{'x'.join(map(str, (n, *shape)))}" for name, n in batches}
    return {
        "device_id": device_id,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),
        **{f"trt_profile_{name}_shapes": text for name, text in shapes.items()},
    }


def _image_shape(session: Any, path: Path, outputs: Sequence[str]) -> tuple[int, int, int]:
    """(H, W, 3) of the graph's input. Raises EngineError where inputs or `outputs` do not fit."""
    inputs = [(value.name, value.type, value.shape) for value in session.get_inputs()]
    names = tuple(output.name for output in session.get_outputs())
    match inputs:
        case [("image", "tensor(uint8)", [None | str(), int(height), int(width), 3])] if (
            height == width and names == tuple(outputs)
        ):
            return height, width, 3
    raise EngineError(
        f"{path.name} is not a Rampart graph: it needs one input `image` uint8 (N, S, S, 3)"
        f" with N free, and the outputs {', '.join(outputs)}; export it again"
    )
