"""What a purifier is for: the same images without and with it, in front of one classifier or more.

Attacks that do not know it stand beside one that does: a gain under the former alone is no
robustness (Athalye et al. 2018, section 4).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rampart.hardening.attack import cache
from rampart.hardening.attack.ladder import QUICK, in_8_bits
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.patch import PLACES, STEPS, STICKER, patch
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim, batched, fingerprint, label_victim
from rampart.hardening.judge.alarms import WAYS, sent
from rampart.hardening.judge.evaluate import LABEL_CODE, attack_source, climb, rungs_on
from rampart.hardening.judge.metrics import difference, rounded, share
from rampart.hardening.judge.outside import CORRUPTIONS
from rampart.hardening.model.arrays import Bools
from rampart.hardening.model.card import Row, cell_text, gain_text
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import to_float, to_uint8

OWN, TWIN = "classifier", "undefended"  # who stands behind the purifier
TITLES = {OWN: "the classifier", TWIN: "the undefended twin"}
# Of the ways that clean images may come, those that are neither corruptions of ours nor harmless.
COMPRESSED = ("JPEG, quality 75", "JPEG, quality 50", "phone noise")
CLEAN, CORRUPTED, STATIC = "clean", "corruption", "static attack"
TRANSFER, KNOWING = "transfer attack", "attack that knows it"
ATTACKS = f"PGD-20; a patch of any colours, {PLACES} places of {STEPS} steps"


class Setting(NamedTuple):
    """What happened to the images: uint8 (N, H, W, 3), all of which are to be labelled right."""

    kind: str
    name: str
    pixels: tuple[Tensor, ...]


def rows(
    purifier: nn.Module,
    nets: Mapping[str, nn.Module],
    sources: Mapping[str, nn.Module],
    images: Images,
    threat: Threat,
    *,
    folder: Path,
) -> Iterator[Row]:
    """Shares of `images` that each of `nets` labels right, without and with the purifier.

    Attacks on each of `nets` and on the other `sources` are put to all of `nets`; `folder` keeps
    what they found.
    """
    every = {**nets, **sources}
    victims = {name: label_victim(name, net, fingerprint(net)) for name, net in every.items()}
    find = partial(pgd20, images=images, threat=threat, folder=folder)
    found = {name: find(victim) for name, victim in victims.items()}
    weather = list(corrupted(images))
    for name, net in nets.items():
        both = nn.Sequential(purifier, net).eval()
        settings = [*weather]
        for source, pixels in found.items():
            kind = STATIC if source == name else TRANSFER
            settings.append(Setting(kind, f"PGD-20 on {TITLES.get(source, source)}", (pixels,)))
        settings.append(patched(victims[name], images, folder))
        # Whoever knows it may still attack the classifier alone; both sides face both attacks.
        knowing = found[name], find(label_victim("purified", both, fingerprint(both)))
        settings.append(Setting(KNOWING, "PGD-20 that knows the purifier", knowing))
        measured = [figures(net, both, one, images) for one in settings]
        yield from ({"subject": name} | one | beyond(one, len(measured)) for one in measured)


def pgd20(victim: Victim, images: Images, threat: Threat, folder: Path) -> Tensor:
    """Images uint8 (N, H, W, 3) that PGD-20 finds against a victim."""
    every = rungs_on(victim, "label", threat, QUICK, classes=len(images.classes))
    (attempt,) = climb([rung for rung in every if rung.name == "pgd20"], images, folder)
    return in_8_bits(attempt.x, images.image, threat)


def corrupted(images: Images) -> Iterator[Setting]:
    """The images clean, corrupted, and as they come from phones and out of JPEG files."""
    x, noise = to_float(images.image), Noise(torch.arange(len(images), device=images.image.device))
    yield Setting(CLEAN, CLEAN, (images.image,))
    for name, corrupt in CORRUPTIONS.items():
        yield Setting(CORRUPTED, name, (to_uint8(corrupt(x, noise)),))
    for name in COMPRESSED:
        yield Setting(CORRUPTED, name, (sent(images.image, WAYS[name]),))


def patched(victim: Victim, images: Images, folder: Path) -> Setting:
    """The images with a patch each, made against a victim without a purifier."""
    side = round(STICKER * images.image.shape[1])
    key = f"{attack_source((*LABEL_CODE, 'attack/patch'))} {victim.fingerprint} patch"
    title, craft = f"{victim.name}, patch", partial(patch, victim.look)
    x = cache.crafted(folder, key, images, craft, title=title)
    return Setting(STATIC, f"patch of {side}x{side} pixels", (to_uint8(x),))


def figures(bare: nn.Module, both: nn.Module, setting: Setting, images: Images) -> Row:
    """What the card says of one setting."""
    before, after = (right(net, setting.pixels, images) for net in (bare, both))
    entry: Row = {"kind": setting.kind, "name": setting.name, "n": len(images)}
    entry |= {"without": share(before), "with": share(after)}
    gains, losses = int((after & ~before).sum()), int((before & ~after).sum())
    gap = rounded(*difference(after, before))
    return entry | {"gain": gap, "gained": gains, "lost": losses}


def right(net: nn.Module, pixels: Sequence[Tensor], images: Images) -> Bools:
    """Which of N images `net` labels right (N,) in all of `pixels`, each uint8 (N, H, W, 3)."""
    guesses = [batched(net, to_float(image)).argmax(1) for image in pixels]
    held: Bools = torch.stack([guess == images.label for guess in guesses]).all(0).cpu().numpy()
    return held


def beyond(row: Row, looks: int) -> Row:
    """Whether a gain or loss is beyond chance among so many `looks` (McNemar, Bonferroni)."""
    from scipy.stats import binomtest

    moved = row["gained"] + row["lost"]
    chance = binomtest(row["gained"], moved).pvalue if moved else 1.0
    return {"beyond_chance": bool(chance < 0.05 / looks)}


def advice(rows: Sequence[Row]) -> list[str]:
    """When to switch the purifier on, a sentence for each classifier behind it."""
    subjects = dict.fromkeys(row["subject"] for row in rows)
    return [sentence(name, [row for row in rows if row["subject"] == name]) for name in subjects]


def sentence(subject: str, rows: Sequence[Row]) -> str:
    """The same for one classifier."""
    who = f"In front of {TITLES.get(subject, subject)}"
    helped = [row for row in rows if row["beyond_chance"] and row["gain"]["value"] > 0]
    harmed = [row for row in rows if row["beyond_chance"] and row["gain"]["value"] < 0]
    unknown = [row for row in helped if row["kind"] != KNOWING]
    (knowing,) = (row for row in rows if row["kind"] == KNOWING)
    left = (
        f"{knowing['with']['value']:.1%} right, against {knowing['without']['value']:.1%} without"
    )
    end = f"an attack that knows it leaves {left}"
    costs = f"it costs accuracy on {listed(harmed)}" if harmed else "it costs nothing beyond chance"
    if not unknown:
        none = f"it helps beyond chance against none of {len(rows)}"
        return f"{who}, leave it off: {none}; {costs}, and {end}."
    return f"{who}, switch it on for {listed(unknown)}: {costs}, and {end}."


def listed(rows: Sequence[Row]) -> str:
    """Settings with what is gained or lost in points."""
    gaps = ((row["name"], 100 * row["gain"]["value"]) for row in rows)
    return ", ".join(f"{name} ({gap:+.1f} points)" for name, gap in gaps)


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of the rows, three columns a classifier."""
    head = ["images", "n"]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        who = TITLES.get(subject, subject)
        head += [f"{who}: right without", "right with", "gain in points"]
    body: dict[str, list[str]] = {}
    for row in rows:
        cells = body.setdefault(row["name"], [str(row["n"])])
        cells += [cell_text(row["without"]), cell_text(row["with"]), gain_cell(row)]
    return tuple(head), [(name, *cells) for name, cells in body.items()]


def gain_cell(row: Row) -> str:
    """What the purifier adds, in points with its interval, and whether that is beyond chance."""
    return gain_text(row["gain"]) + (" beyond chance" if row["beyond_chance"] else "")
