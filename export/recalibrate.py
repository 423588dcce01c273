"""A new calibration for an archive, from pictures like those that its endpoint receives. Only the
ranking of combined scores is new: on pictures exchangeable with these the promised false-alarm rate
holds again (split conformal: Vovk et al. 2005).
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from rampart.export.archive import hash_tree, repack
from rampart.export.terminal import visible
from rampart.export.unpacking import card_of, settings_of, unpack
from rampart.handlers.contents import HASHES
from rampart.handlers.engine import sha256
from rampart.handlers.image import Fitting
from rampart.handlers.settings import read_policy
from rampart.handlers.tasks import task_of
from rampart.handlers.verdict import Calibration, combine, drift, drift_by_chance, p_values
from rampart.hardening.model.promise import least_images, spread
from rampart.hardening.train.decoding import read_picture
from rampart.hardening.train.listing import pictures_below

# Entries of the card that were measured with the old thresholds.
OUTDATED = (
    "checks", "ablation", "test_ablation", "false_alarms", "outside", "fp16", "int8", "promise",
)  # fmt: skip


class Recalibration(NamedTuple):
    """The pictures behind the new archive, and how far the old calibration was off."""

    images: int
    refused: list[str]  # pictures that the endpoint would not take, and why
    flagged: float  # share of the images that the old calibration flags
    rate: float  # share that it promises
    drift: float  # of the old calibration's p-values from what they should be
    chance: float  # drift of as many exchangeable images, exceeded in 5% of cases
    spread: tuple[float, float]  # where so few images put the true rate, in 95% of cases

    def in_words(self) -> list[str]:
        """The same for people."""
        low, high = self.spread
        return [
            *(f"left out, as the endpoint would: {line}" for line in self.refused),
            f"the old calibration flags {self.flagged:.1%} of these {self.images} pictures"
            f" (promised: {self.rate:.1%}); drift {self.drift:.3f} (by chance up to"
            f" {self.chance:.3f})",
            f"true rate of the new calibration: {low:.1%} to {high:.1%} (95% interval)",
            "the new card leaves out the pipeline's figures, which depend on the old thresholds",
        ]


def recalibrate(archive: Path, pictures: Path, out: Path, *, command: str) -> Recalibration:
    """Write `archive` as `out` with the ranks of `pictures`, a folder. Raises ValueError."""
    if out.resolve() == archive.resolve() or out.suffix != ".mar":
        raise ValueError(f"--out {out}: pass a new file that ends in .mar")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        hashes = unpack(archive, work)
        task = task_of(card_of(work))
        engine = task.engine(work / "graph.onnx", device="cpu")
        policy = read_policy(settings_of(work))
        least = least_images(policy.false_alarm_rate)
        images, refused = read_pictures(pictures, engine.image_shape[0], least, task.fitting)
        old = Calibration.load(work / "calibration.json")
        scores = engine.run(images).scores
        new = replace(old, combined=np.sort(combine(scores, old)), images=len(images))
        new.check_rate(policy.false_alarm_rate)
        p = p_values(scores, old)
        write(work, new, data=f"{len(images)} pictures of {pictures.name}", command=command)
        repack(work, list(hashes), out)
    rate, n = policy.false_alarm_rate, len(images)
    chance = drift_by_chance(n, old.images)
    flagged = float((p < rate).mean())
    return Recalibration(n, refused, flagged, rate, drift(p), chance, spread(rate, n))


def read_pictures(
    folder: Path, size: int, least: int, fitting: Fitting
) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures below `folder` as uint8 (N, size, size, 3), and what the endpoint would refuse."""
    files = pictures_below(folder)
    images, refused = [], []
    for file in tqdm(files, desc="reading pictures", leave=False):
        try:
            images.append(read_picture(file, size, fitting))
        except ValueError as error:
            refused.append(visible(str(error).removeprefix(f"{folder}/")))
    if len(images) < least:
        raise ValueError(
            f"{folder} holds {len(images)} usable pictures: the archive's false-alarm rate needs"
            f" at least {least}, so pass more of what your clients send"
        )
    return np.stack(images), refused


def write(work: Path, calibration: Calibration, *, data: str, command: str) -> None:
    """Put the new ranks into calibration.json, and what changed into the card and the hashes."""
    file = work / "calibration.json"
    content = json.loads(file.read_text())
    content |= {"combined": calibration.combined.tolist(), "images": calibration.images}
    file.write_text(json.dumps(content | {"data": data}) + "\n")
    card = json.loads((work / "card.json").read_text())
    # Figures of the old thresholds would pass for those of the new; the classifier's stay true.
    card = {name: entry for name, entry in card.items() if name not in OUTDATED}
    rows = card.get("metrics", [])
    card["metrics"] = [row for row in rows if row["subject"] in ("classifier", "undefended")]
    card |= {"calibration_images": calibration.images, "recalibrated_on": data}
    card["commands"] = [*card.get("commands", []), command]
    card["sha256"] = card.get("sha256", {}) | {"calibration.json": sha256(file)}
    (work / "card.json").write_text(json.dumps(card, indent=1))
    hashes = hash_tree(work)
    names = json.loads((work / HASHES).read_text())
    (work / HASHES).write_text(json.dumps({name: hashes[name] for name in names}, indent=1))
