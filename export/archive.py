"""A folder of model_store as one `.mar`: graph, calibration, card, labels, handler, hashes."""

import importlib.util
import json
import re
import shutil
import tempfile
import zipfile
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rampart.export import shipped
from rampart.export.shipped import PACKAGE, AnyParity, check_made
from rampart.handlers.contents import GRAPH, HANDLER, HASHES, PLAN, SOURCES
from rampart.handlers.engine import sha256
from rampart.handlers.plan import check_record, record_file
from rampart.handlers.settings import read_explain, read_max_pixels, read_policy
from rampart.handlers.tasks import CLASSIFY, task_of, terms
from rampart.handlers.verdict import Calibration, Policy
from rampart.hardening.model.card import check_fit, read_card
from rampart.hardening.model.files import (
    SAMPLES,
    Precision,
    calibration_file,
    load_variant,
    read_contents,
)
from rampart.hardening.model.promise import finest_rate

if TYPE_CHECKING:
    from torch import Tensor

    from rampart.hardening.model.pipeline import Variant

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a model, as torch-model-archiver takes it
ARCHIVER = "0.12.0"  # the torch-model-archiver whose layout this is
SETTINGS = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 8,
    "maxBatchDelay": 1,  # ms that a lone request waits for company; 0 would mean TorchServe's 100
    "startupTimeout": 900,  # s: TensorRT's provider builds for minutes before the first answer
    "responseTimeout": 30,  # s until a worker that hangs is replaced; probes want the same
    "maxRetryTimeoutInSec": 60,  # until TorchServe gives up on a model that does not load
}


def export_variant(
    folder: Path,
    variant: "Variant",
    out: Path,
    *,
    precision: Precision = "fp32",
    images: "Tensor | None" = None,
    rate: float | None = None,
) -> AnyParity:
    """Write a variant's ONNX graph, or copy a fresh one; returns the figures of its gate, at the
    false-alarm `rate`, or the one that the calibration promises.
    """
    check_made(folder, variant, precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    graph = shipped.find(folder, variant, precision) if images is None else None
    if graph:
        partial = out.with_suffix(".partial")
        shutil.copyfile(graph.file, partial)
        partial.replace(out)
        return graph.parity
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError(
            f"{folder} holds no up-to-date graph of {variant} in {precision}. To export one,"
            " install torch: `pip install 'rampart-endpoint[harden]'`"
        )
    from rampart.export.build import build

    return build(folder, variant, out, precision=precision, images=images, rate=rate)


def archive(
    folder: Path,
    out: Path,
    *,
    variant: "Variant" = "full",
    precision: Precision = "fp32",
    images: "Tensor | None" = None,
    plan: Path | None = None,
    version: str = "1.0",
    settings: dict[str, Any] | None = None,
    sample: bool = True,
    anyway: bool = True,
) -> AnyParity:
    """Pack a model folder as `out` (NAME.mar), perhaps with a `plan`; returns its gate's figures.
    The folder's `sample` pictures go along, if it has any. Not `anyway`, it raises ValueError for
    a model that fails its own checks or is at chance. `settings` override the top level of the
    model YAML, and their `rampart` the policy.
    """
    check_request(out, version, plan, precision)
    if not anyway:
        check_fit(read_card(folder), f"{folder} is not packed")
    settings = settings or {}
    contents = read_contents(folder / "weights.safetensors")
    check_made(folder, variant, precision)
    calibration = load_variant(folder, variant, precision)
    policy, rate = policy_for(calibration, settings.get("rampart", {}))
    facts = {"name": out.stem, "variant": variant, "precision": precision}
    facts |= {} if contents.task == CLASSIFY else {"task": contents.task}
    check_judged(facts | read_card(folder), contents.classes, calibration, policy)
    max_pixels = read_max_pixels(policy, contents.image_size)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        export = partial(export_variant, precision=precision, images=images, rate=rate)
        parity = export(folder, variant, work / GRAPH)
        if plan:
            policy["device"] = "plan"
            add_plan(plan, work)
        add_sources(work)
        calibrated = calibration_file(folder, variant, precision)
        add_data(work, calibrated, contents.classes, sample=sample)
        add_card(work, folder, facts | {"max_pixels": max_pixels})
        model_yaml = yaml.safe_dump(SETTINGS | settings | {"rampart": policy})
        (work / "model-config.yaml").write_text(model_yaml)
        pack(work, out, version=version)
    return parity


def add_data(work: Path, calibrated: Path, classes: list[str], *, sample: bool) -> None:
    """Calibration and labels, and the sample pictures of their folder where they are wanted."""
    shutil.copy(calibrated, work / "calibration.json")
    (work / "labels.json").write_text(json.dumps(classes))
    for name in SAMPLES if sample else ():
        if calibrated.with_name(name).is_file():
            shutil.copy(calibrated.with_name(name), work)


def check_judged(
    card: dict[str, Any],
    classes: list[str],
    calibration: Calibration,
    settings: dict[str, Any],
) -> None:
    """Raise ValueError where the endpoint would refuse these settings."""
    task_of(card).judge(
        labels=tuple(classes),
        calibration=calibration,
        policy=read_policy(settings),
        model={},
        **terms(card, settings),
    )


def policy_for(calibration: Calibration, wanted: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The policy and its false-alarm rate: what is `wanted`, else what so many images can promise.

    Raises ValueError for one that the handler would refuse at start.
    """
    usual = Policy(false_alarm_rate=finest_rate(calibration.images))
    policy = asdict(usual) | wanted
    rate = read_policy(policy).false_alarm_rate
    read_explain(policy)
    calibration.check_rate(rate)
    return policy, rate


def check_request(out: Path, version: str, plan: Path | None, precision: Precision) -> None:
    """Raise ValueError for names that TorchServe does not take, and for a plan in int8."""
    check_name(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: choose another file, or move the folder away")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
        raise ValueError(f"version {version!r}: use numbers with dots, such as 2.0")
    if plan and precision == "int8":
        raise ValueError("int8 is for CPUs: use a plan with --precision fp32 or fp16")


def check_name(out: Path) -> None:
    """Raise ValueError where TorchServe takes no archive of that name, or clients cannot ask."""
    if out.suffix != ".mar":
        raise ValueError(f"{out}: TorchServe loads only files that end in .mar: rename it")
    if not re.fullmatch(NAME, out.stem):
        raise ValueError(
            f"{out}: this name is part of the model's address. Use only letters, digits, '.', '_'"
            " and '-'"
        )


def add_sources(work: Path) -> None:
    """Copy the handler's code, which travels in every archive."""
    for name in SOURCES:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE.parent / name, work / name)


def add_card(work: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Write the folder's card with `facts`, and the hashes of the weights and of all in `work`."""
    hashes = {"weights.safetensors": sha256(folder / "weights.safetensors")} | hash_tree(work)
    card = facts | read_card(folder) | {"sha256": hashes}
    (work / "card.json").write_text(json.dumps(card, indent=1))


def add_plan(plan: Path, work: Path) -> None:
    """Copy a plan and its record beside the graph that it must be made of."""
    check_record(plan, work / GRAPH)
    shutil.copy(plan, work / PLAN)
    shutil.copy(record_file(plan), record_file(work / PLAN))


def pack(work: Path, out: Path, *, version: str) -> None:
    """Add to `work` what torch-model-archiver would, and the hashes of all; write the archive."""
    handler = Path(HANDLER).name
    shutil.copy(work / HANDLER, work / handler)
    model = {"modelName": out.stem, "handler": handler, "modelVersion": version}
    model |= {"configFile": "model-config.yaml"}
    created = datetime.now(UTC).strftime("%d/%m/%Y %H:%M:%S")
    manifest = {"createdOn": created, "runtime": "python", "model": model}
    manifest |= {"archiverVersion": ARCHIVER}
    (work / "MAR-INF").mkdir()
    (work / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest, indent=2))
    hashes = hash_tree(work)
    (work / HASHES).write_text(json.dumps(hashes, indent=1))
    repack(work, [*hashes, HASHES], out)


def repack(work: Path, names: list[str], out: Path) -> None:
    """Write the files `names` of `work` as an archive; it replaces an older one at once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        partial = Path(folder) / out.name
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in names:
                packed.write(work / name, name)
        partial.replace(out)


def hash_tree(folder: Path) -> dict[str, str]:
    """Digest of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}
