"""A run of the red team, a line of a file for each finished image, so that it can go on."""

import hashlib
import importlib
import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rampart.hardening.attack.redteam.probe import AttackEnd, Outcome, Probe, Settings
from rampart.hardening.attack.redteam.said import Asked
from rampart.hardening.attack.redteam.searches import ATTACKS, DECISION_BASED, starts
from rampart.hardening.model.images import Images

FILE = "queries.jsonl"
TOLD = 5  # classes of the first image that tell one model from another
SAME = 0.001  # confidences that differ by less may be one model's


def redteam(
    endpoint: Asked,
    images: Images,
    out: Path,
    *,
    attacks: Sequence[str] = (),
    limit: int = 50,
    eps: int = 8,
    budget: int = 1000,
    seed: int = 0,
    target: str | None = None,
) -> list[Outcome]:
    """Attack `limit` images, evenly spaced over all, each with up to `budget` queries an attack.
    `attacks` are all by default, or those that follow labels where nothing else is answered; a
    `target` is the class that each is to end in, of images that show another. Every finished image
    is a line of OUT/queries.jsonl, from which a second run goes on. Raises ValueError for a run
    with other settings, and what Endpoint.ask raises.
    """
    require("art")
    if not set(attacks) <= set(ATTACKS):
        raise ValueError(f"no such attack: choose among {', '.join(ATTACKS)}")
    if min(eps, budget, limit) < 1:
        raise ValueError("eps, queries and limit must be at least 1")
    wanted = None if target is None else _index(images, target)
    (first,) = endpoint.ask(images.image[:1].numpy())
    attacks = attacks or (DECISION_BASED if endpoint.reading.kind == "labels" else tuple(ATTACKS))
    said = [list(pair) for pair in first.top[:TOLD]]
    settings = Settings(endpoint.url, *first.model, eps, budget, seed, wanted, said)
    done = {(outcome.attack, outcome.index): outcome for outcome in _resume(out, settings)}
    rows = _spread([row for row in range(len(images)) if images.label[row] != wanted], limit)
    for name in attacks:
        for row in tqdm(rows, desc=name):
            old = done.get((name, row))
            if old is None:
                done[name, row] = _attack(name, row, endpoint, images, settings)
                with (out / FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done[name, row])) + "\n")
            elif old.sha256 != _sha256(images, row):
                raise ValueError(f"{out / FILE} is a run on other images: choose another --out")
    return [done[name, row] for name in attacks for row in rows]


def _spread(rows: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of the rows, evenly spaced."""
    count = min(limit, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _index(images: Images, name: str) -> int:
    if name not in images.classes:
        raise ValueError(f"no class {name} among these images: {', '.join(images.classes)}")
    return images.classes.index(name)


def _attack(name: str, row: int, endpoint: Asked, images: Images, settings: Settings) -> Outcome:
    """One attack on one image. The clean image is query 1; fooling by that needs no attack."""
    label = int(images.label[row])
    probe = Probe(endpoint, images.image[row].numpy(), label, settings)
    source = [settings.seed, zlib.crc32(name.encode()), row]
    # ART draws from numpy's global generator; a resumed run must draw what a whole one would.
    np.random.seed(source)  # noqa: NPY002
    with suppress(AttackEnd):
        probe(probe.x)
        ATTACKS[name](probe, starts(images, label, np.random.default_rng(source), settings.target))
    counts = (probe.queries, probe.success, probe.success == 1, probe.distance, probe.noticed)
    return Outcome(settings, name, row, _sha256(images, row), images.classes[label], *counts)


def _sha256(images: Images, row: int) -> str:
    return hashlib.sha256(images.image[row].numpy().tobytes()).hexdigest()


def read(out: Path) -> list[Outcome]:
    """The outcomes in OUT/queries.jsonl but a torn last line. ValueError for malformed lines."""
    file = out / FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_outcome(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _outcome(line: str, where: str) -> Outcome:
    try:
        content = json.loads(line)
        return Outcome(**content | {"settings": Settings(**content["settings"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a red-team result: {error}") from error


def _resume(out: Path, settings: Settings) -> list[Outcome]:
    """What is done already, and the file made ready for more lines."""
    outcomes = read(out)
    for outcome in outcomes:
        if replace(outcome.settings, said=settings.said) != settings:
            made_with = f"was made with {_differences(outcome.settings, settings)}"
            raise ValueError(f"{out / FILE} {made_with}: choose another --out")
        if not _alike(outcome.settings.said, settings.said):
            another = "is of another model with the same name and version"
            raise ValueError(f"{out / FILE} {another}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return outcomes


def _alike(was: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> bool:
    """Whether two answers to one image may be one model's, on two CPUs; an empty one may be."""
    if not (was and now):
        return True
    one, other = ({int(index): share for index, share in pairs} for pairs in (was, now))
    # What is not among the first few is at most the last of them.
    last, least = min(one.values()), min(other.values())
    return all(abs(one.get(k, last) - other.get(k, least)) < SAME for k in one | other)


def _differences(old: Settings, new: Settings) -> str:
    now = asdict(replace(new, said=old.said))
    return ", ".join(f"{k} {was} (now {now[k]})" for k, was in asdict(old).items() if was != now[k])


def require(module: str) -> None:
    """Raise ValueError that says what to install where `module` is missing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"red teaming needs what `make .venv/dev` installs: run it first ({error})"
        ) from error
