"""A folder of model_store as one `.mar`: graph, calibration, card, labels, handler, hashes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from skimage.data import data_dir
from torch import Tensor

import handlers
from export.parity import Parity, check_close, compare
from export.precision import check_made, lower, ranges_file
from export.to_onnx import to_onnx
from handlers.defended import HASHES, NEEDED, PLAN, read_max_pixels, read_policy
from handlers.engine import Engine
from handlers.image import decode
from handlers.plan import check_record, record_file
from handlers.verdict import Judge, Policy
from hardening import checkpoint
from hardening import pipeline as pipelines
from hardening.calibrate import Precision, calibration_file, load_variant
from hardening.report import read_card

HANDLERS = Path(handlers.__file__).parent
SETTINGS = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 8,
    "maxBatchDelay": 1,  # ms that a lone request waits for company; 0 would mean TorchServe's 100
    "startupTimeout": 900,  # s: TensorRT's provider builds for minutes before the first answer
    "responseTimeout": 30,  # s after which a worker that hangs is replaced; probes want the same
    "maxRetryTimeoutInSec": 60,  # after which a model that cannot be loaded is given up
}


def export_variant(
    folder: Path,
    variant: pipelines.Variant,
    out: Path,
    *,
    precision: Precision = "fp32",
    images: Tensor | None = None,
    rate: float = 0.01,
) -> Parity:
    """Write the ONNX graph of a model folder's variant to `out` and hold it to the parity gate.

    `images` uint8 (N, H, W, 3) are what the gate compares on; without them crops of a photograph.
    In fp16 and int8 it is written once the fp32 graph has passed, of what `rampart quantize` left.
    """
    check_made(folder, variant, precision)
    pipeline, _ = pipelines.load(folder / "weights.safetensors", variant)
    if images is None:
        images = sample_crops(pipeline.classifier.config.image_size)
    to_onnx(pipeline, out)
    engine = Engine(out, device="cpu")
    calibration = load_variant(folder, variant)
    parity = compare(pipeline, engine, calibration, images, rate=rate)
    if precision != "fp32":
        lower(pipeline, precision, out, ranges_file(folder, variant), fp32=out)
        made = Engine(out, device="cpu"), load_variant(folder, variant, precision)
        check_close((engine, calibration), made, images)
    return parity


def sample_crops(size: int, *, count: int = 32) -> Tensor:
    """Crops (count, size, size, 3) of scikit-image's cat, a picture that needs no download."""
    picture = torch.from_numpy(decode((Path(data_dir) / "chelsea.png").read_bytes(), size + 64))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(picture.shape[0] - size, (count,), generator=generator)
    columns = torch.randint(picture.shape[1] - size, (count,), generator=generator)
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return torch.stack([picture[i : i + size, j : j + size] for i, j in places])


def archive(
    folder: Path,
    out: Path,
    *,
    variant: pipelines.Variant = "full",
    precision: Precision = "fp32",
    images: Tensor | None = None,
    plan: Path | None = None,
    version: str = "1.0",
    settings: dict[str, Any] | None = None,
) -> Parity:
    """Export, gate and pack the model folder as `out` (NAME.mar); returns the gate's figures.

    `plan` is one of `rampart export --tensorrt`, of the same graph, to be served by default.
    `version` tells archives of one name apart in a running server.
    `settings` overrides entries of the model YAML's top level; `rampart` in it those of the policy.
    """
    if out.suffix != ".mar":
        raise ValueError(f"{out}: TorchServe loads files that end in .mar; name it so")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
        raise ValueError(f"version {version!r}: take numbers with dots, such as 2.0")
    settings = settings or {}
    policy = asdict(Policy()) | settings.get("rampart", {})
    config, _ = checkpoint.read(folder / "weights.safetensors")
    check_made(folder, variant, precision)
    # The handler would refuse such a policy at start; refuse it before it is packed.
    judge = read_policy(policy)
    max_pixels = read_max_pixels(policy, config["classifier"]["image_size"])
    Judge(tuple(config["classes"]), load_variant(folder, variant, precision), judge, {})
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "content"
        (work / "handlers").mkdir(parents=True)
        graph = work / "graph.onnx"
        rate = judge.false_alarm_rate
        parity = export_variant(
            folder, variant, graph, precision=precision, images=images, rate=rate
        )
        if plan and precision == "int8":
            raise ValueError("int8 is for CPUs: a plan goes with --precision fp32 or fp16")
        if plan:
            policy["device"] = "plan"
            pack_plan(plan, graph)
        for name in NEEDED:
            if name.startswith("handlers/"):
                shutil.copy(HANDLERS.parent / name, work / name)
        table = calibration_file(folder, variant, precision)
        shutil.copy(table, work / "calibration.json")
        (work / "labels.json").write_text(json.dumps(config["classes"]))
        names = {"name": out.stem, "variant": variant, "precision": precision}
        card = names | {"max_pixels": max_pixels} | read_card(folder)
        hashes = {"weights.safetensors": sha256(folder / "weights.safetensors")} | hash_tree(work)
        (work / "card.json").write_text(json.dumps(card | {"sha256": hashes}, indent=1))
        model_yaml = Path(scratch) / "model-config.yaml"
        model_yaml.write_text(yaml.safe_dump(SETTINGS | settings | {"rampart": policy}))
        pack(work, model_yaml, out, version=version)
    return parity


def pack_plan(plan: Path, graph: Path) -> None:
    """Put a plan with its record beside `graph`, of which it must be."""
    check_record(plan, graph)
    shutil.copy(plan, graph.with_name(PLAN))
    shutil.copy(record_file(plan), record_file(graph.with_name(PLAN)))


def pack(work: Path, model_yaml: Path, out: Path, *, version: str) -> None:
    """Run torch-model-archiver and add sha256.json, which lists what it adds too."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as partial:
        command = [str(Path(sys.executable).with_name("torch-model-archiver"))]
        command += ["--model-name", out.stem, "--version", version]
        command += ["--handler", str(HANDLERS / "defended.py"), "--extra-files", str(work)]
        command += ["--config-file", str(model_yaml), "--export-path", partial]
        # It empties $TMPDIR/NAME first, whatever that holds: give it a place of its own.
        own = os.environ | {"TMPDIR": partial}
        done = subprocess.run(command, capture_output=True, text=True, env=own)
        if done.returncode:
            raise RuntimeError(f"torch-model-archiver failed: {done.stderr.strip()}")
        content = Path(partial) / "content"
        with zipfile.ZipFile(Path(partial) / out.name) as packed:
            packed.extractall(content)
            names = [name for name in packed.namelist() if not name.endswith("/")]
        (content / HASHES).write_text(json.dumps(hash_tree(content), indent=1))
        repack(content, [*names, HASHES], out)


def repack(work: Path, names: list[str], out: Path) -> None:
    """The files of `work` as an archive; the finished file replaces an older one at once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        partial = Path(folder) / out.name
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in names:
                packed.write(work / name, name)
        partial.replace(out)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(folder: Path) -> dict[str, str]:
    """Digest of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}
