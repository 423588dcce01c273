"""What a built file is, and whether this machine can run it: `rampart inspect NAME.mar`."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rampart.export.terminal import all_visible
from rampart.export.unpacking import TEXT, card_of, settings_of, unpack
from rampart.handlers.engine import sha256
from rampart.handlers.plan import record_file
from rampart.hardening.model.presence import check_archive, check_file

KINDS = (".mar", ".onnx", ".plan")
REMEDY = "`rampart export` makes it"


def inspect(file: Path) -> Iterator[str]:
    """Lines for people on an archive or a graph. Raises ValueError for anything else."""
    if file.suffix not in KINDS:
        kinds = "neither an archive (.mar), a graph (.onnx) nor a plan (.plan)"
        raise ValueError(f"{file}: {kinds}, by its name: pass one of these")
    if file.suffix == ".mar":
        check_archive(file)
    else:
        check_file(file, "graph" if file.suffix == ".onnx" else "plan", REMEDY)
    yield f"{file}: {file.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(file)}"
    if file.suffix == ".plan":
        yield from plan_lines(file)
        return
    from rampart.export.trial import trial  # it needs onnx, which a card or a plan does not

    if file.suffix == ".onnx":
        yield from trial(file)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        hashes = unpack(file, work)
        free = sorted(name for name, digest in hashes.items() if digest is None)
        count = len(hashes) - len(free)
        yield f"{count} files have the hashes that sha256.json lists; not listed: {', '.join(free)}"
        yield from card_lines(work)
        yield from trial(work / "graph.onnx")


def card_text(file: Path) -> str:
    """The card of an archive in full, as JSON without control characters."""
    if file.suffix != ".mar":
        raise ValueError(f"{file}: only an archive (.mar) has a card: leave out --card")
    with tempfile.TemporaryDirectory() as scratch:
        unpack(file, Path(scratch))
        # JSON's own escapes leave DEL alone.
        return json.dumps(card_of(Path(scratch)), indent=1).replace("\x7f", "\\u007f")


def plan_lines(file: Path) -> Iterator[str]:
    """The contents of a plan's record. A plan is code, so nothing here loads it."""
    try:
        beside = record_file(file)
        if not beside.is_file() or beside.stat().st_size > TEXT:
            raise ValueError("no plain file of a record's size")
        record = json.loads(beside.read_text(encoding="utf-8"))
        same = record["sha256"] == sha256(file)
        facts = f"TensorRT {record['tensorrt']}", f"graph SHA-256 {record['graph_sha256']}"
        yield from (*facts, f"gate: {record['parity']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        name = record_file(file).name
        raise ValueError(
            f"{file} has no readable record {name}: `rampart export --tensorrt`"
        ) from error
    yield f"its record {'has its hash' if same else 'is that of another file: do not load it'}"
    here = importlib.util.find_spec("tensorrt") is not None
    yield f"TensorRT is {'installed' if here else 'not installed'} here; inputs are its graph's"


def card_lines(work: Path) -> Iterator[str]:
    """Name, policy and figures of an unpacked archive."""
    # Before anything is cut into lines: a line break in a name would begin a line of its own.
    card, policy = all_visible(card_of(work)), all_visible(settings_of(work))
    try:
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
            from rampart.hardening.report.card import markdown  # it needs torch

            yield from ("", *markdown(card).split("\n"), "")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"card.json is not a card ({error!r}): rebuild the archive") from error
