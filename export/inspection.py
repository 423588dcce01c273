"""What a finished file is, and whether this machine can run it.

rampart inspect model_store/NAME.mar
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rampart.export.archive import sha256
from rampart.export.terminal import all_visible
from rampart.export.trial import trial
from rampart.export.unpacking import TEXT, unpack
from rampart.handlers.plan import record_file
from rampart.hardening.model.card import read_card
from rampart.hardening.report.card import markdown

KINDS = (".mar", ".onnx", ".plan")
SETTINGS = 100_000  # characters of model-config.yaml, whose reader is slow


def inspect(file: Path) -> Iterator[str]:
    """Lines for people on an archive or a graph. Raises ValueError for anything else."""
    if file.suffix not in KINDS:
        raise ValueError(f"{file}: neither an archive (.mar), a graph (.onnx) nor a plan (.plan)")
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}")
    yield f"{file}: {file.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(file)}"
    if file.suffix == ".onnx":
        yield from trial(file)
        return
    if file.suffix == ".plan":
        yield from plan_lines(file)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        names = unpack(file, work)
        listed = json.loads((work / "sha256.json").read_text())
        free = ", ".join(sorted(name for name in names if name not in listed))
        yield f"{len(listed)} files have the hashes that sha256.json lists; not listed: {free}"
        yield from archive_lines(work)
        yield from trial(work / "graph.onnx")


def card_text(file: Path) -> str:
    """The card of an archive in full, as JSON without control characters."""
    if file.suffix != ".mar":
        raise ValueError(f"{file}: only an archive (.mar) has a card")
    with tempfile.TemporaryDirectory() as scratch:
        unpack(file, Path(scratch))
        # JSON's own escapes leave DEL alone.
        return json.dumps(known_card(Path(scratch)), indent=1).replace("\x7f", "\\u007f")


def known_card(work: Path) -> dict[str, Any]:
    """The card of an unpacked archive. Raises ValueError where it is none."""
    try:
        card = read_card(work)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"card.json is not JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("card.json is not a card: build the archive anew")
    return card


def plan_lines(file: Path) -> Iterator[str]:
    """What the record beside a plan says of it. A plan is code, so it is not loaded."""
    try:
        beside = record_file(file)
        if not beside.is_file() or beside.stat().st_size > TEXT:
            raise ValueError("no plain file of a record's size")
        record = json.loads(beside.read_text(encoding="utf-8"))
        same = record["sha256"] == sha256(file)
        facts = [f"TensorRT {record['tensorrt']}", f"graph SHA-256 {record['graph_sha256']}"]
        facts.append(f"gate: {record['parity']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} has no readable record {record_file(file).name}: `rampart export --tensorrt`"
        ) from error
    yield from facts
    yield f"its record {'has its hash' if same else 'is that of another file: do not load it'}"
    here = importlib.util.find_spec("tensorrt") is not None
    yield f"TensorRT is {'installed' if here else 'not installed'} here; inputs are its graph's"


def archive_lines(work: Path) -> Iterator[str]:
    """Name, policy and figures of an unpacked archive."""
    # Before anything is cut into lines: a line break in a name would begin a line of its own.
    card, policy = all_visible(known_card(work)), all_visible(policy_of(work))
    try:
        yield from card_lines(card, policy)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"card.json is not a card ({error!r}): build the archive anew") from error


def policy_of(work: Path) -> dict[str, Any]:
    """What an unpacked archive's model-config.yaml says for us.

    Raises ValueError for YAML that is none, or that refers to itself: printed it would not end.
    """
    text = (work / "model-config.yaml").read_text(errors="replace")
    if len(text) > SETTINGS:
        raise ValueError("model-config.yaml is too long for settings: build the archive anew")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("model-config.yaml refers to itself: build the archive anew")
        settings = yaml.safe_load(text) or {}
        return dict(settings.get("rampart") or {})
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"model-config.yaml is not YAML of ours: {error}") from error


def card_lines(card: dict[str, Any], policy: dict[str, Any]) -> Iterator[str]:
    """What a card tells, and the policy."""
    facts = {
        "model": f"{card.get('name')}, {card.get('variant')}, {card.get('precision', 'fp32')}",
        "trained on": card.get("data", "not said"),
        "threat model": card.get("threat_model", "not evaluated"),
        "calibration": f"{card.get('calibration_images', '?')} images",
        "policy": ", ".join(f"{name} {value}" for name, value in policy.items()),
        "weights": f"SHA-256 {card.get('sha256', {}).get('weights.safetensors', 'not said')}",
    }
    yield from (f"{name}: {fact}" for name, fact in facts.items())
    if card.get("metrics") and "threat_model" in card:
        yield from ("", *markdown(card).split("\n"), "")
