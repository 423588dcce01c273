"""Robust accuracy over eps: a model's classifier beside its undefended twin, under PGD-20, and
what `guarded`, where there is one, labels right or rejects under the joint attack too.

    .venv/bin/python benchmarks/over_eps.py --data signs/held.npz --plot docs/over-eps.png

`--data` holds images that neither network was trained on. Attacked images are rounded to 8 bits.
Figures go to --out as they are found, so an interrupted run resumes.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rampart.hardening.attack.ladder import QUICK, joint_apgd, pgd20
from rampart.hardening.attack.objectives import View
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim, pipeline_victim
from rampart.hardening.judge.evaluate import replay
from rampart.hardening.judge.metrics import share
from rampart.hardening.model.calibrate import load_variant
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.folder import variants_in
from rampart.hardening.model.images import Images, batches, split
from rampart.hardening.model.pipeline import load as load_pipeline
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.model.pixels import to_float, to_uint8
from rampart.hardening.model.provenance import check_unseen
from rampart.hardening.model.style import STYLE
from rampart.hardening.train.data import load, spread

EPS = (0, 1, 2, 4, 6, 8)  # n/255
RATE = 0.02  # of false alarms, at which `guarded` rejects
LOOKS = {
    "guarded": ("#117733", "d", "-."),
    "hardened": ("#0072B2", "o", "-"),
    "undefended twin": ("#D55E00", "s", "--"),
}


NAMES = {"guarded": f"guarded: right or rejected\nat {RATE:.0%} false alarms"}


def held(net: Classifier, images: Images, eps: int) -> dict[str, Any]:
    """The share of images whose label stays right within eps/255, with its interval."""
    right = []
    for x, label in batches(images, 50):
        if eps:
            x = pgd20(lambda x: View(net(x)), x, label, Threat("Linf", eps / 255))
        with torch.no_grad():
            right.append(net(to_float(to_uint8(x))).argmax(1) == label)
    return share(torch.cat(right).numpy())


def guarded(victim: Victim, images: Images, eps: int) -> dict[str, Any]:
    """The share of images that are right or rejected within eps/255, under the joint attack and
    under PGD-20 on the label, each in float and in 8 bits.
    """
    safe = []
    threat = Threat("Linf", eps / 255)
    for rows in torch.split(torch.arange(len(images)), 50):
        few = images[rows]
        x, label = to_float(few.image), few.label
        found = [x]
        if eps:
            joint = partial(joint_apgd, victim.look, labels=victim.label_look)
            found += [joint(x, label, threat, QUICK), pgd20(victim.label_look, x, label, threat)]
        safe.append(np.all([replay(victim, near, few, threat).safe for near in found], axis=0))
    return share(np.concatenate(safe))


def figure(found: dict[str, Any], trained: int) -> Figure:
    """Both curves, each point with its interval and each curve with its name beside it."""
    with rc_context(STYLE):
        drawn = Figure(figsize=(6.4, 3.6), dpi=125, layout="constrained")
        axes: Axes = drawn.subplots()
        low = -1.0
        # The lowest first, so that no name covers another.
        ends = {name: found[name][str(EPS[-1])]["value"] for name in LOOKS if name in found}
        for name in sorted(ends, key=lambda name: ends[name]):
            colour, marker, line = LOOKS[name]
            rows = [found[name][str(eps)] for eps in EPS]
            values = [row["value"] for row in rows]
            axes.vlines(EPS, *zip(*(row["interval"] for row in rows), strict=True), color=colour)
            axes.plot(EPS, values, color=colour, marker=marker, ls=line)
            words = f"{NAMES.get(name, name)}\n{values[-1]:.0%}"
            low = max(values[-1], low + 0.055 * (2 + words.count("\n")))
            axes.annotate(words, (EPS[-1] + 0.15, low), color=colour, va="center", fontsize=9)
        axes.axvline(trained, color="#555555", lw=1, ls=":")
        axes.annotate(
            f"trained for {trained}/255", (trained + 0.08, 1.0), va="top", color="#555555"
        )
        axes.set(xlim=(-0.2, EPS[-1] + 2.3), ylim=(0, 1.02), xticks=EPS)
        axes.set(xlabel="largest change of a pixel, in 1/255", ylabel="signs labelled right")
        attacks = "PGD-20" + (", guarded: joint attack too" if "guarded" in found else "")
        title = f"Signs labelled right under attack ({found['n']} signs, bars: 95% intervals)"
        axes.set_title(f"{title}\n{attacks}", fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return drawn


def print_of(folder: Path) -> str:
    """What tells a model from others: a hash of its weights and calibrations."""
    files = sorted((folder / "weights.safetensors", *folder.glob("calibration-*.json")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    """Attack all at each eps, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model_store/traffic-signs"))
    parser.add_argument("--data", type=Path, required=True, help=".npz of held-out images")
    parser.add_argument("--images", type=int, default=150, help="evenly spaced")
    parser.add_argument("--trained-for", type=int, default=4, help="eps of training, n/255")
    parser.add_argument("--out", type=Path, default=Path("runs/over-eps.json"))
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    twin = options.model.with_name(f"{options.model.name}-undefended")
    images = spread(split(load(options.data, train=False), "validation"), options.images)
    looks: dict[str, Callable[[Images, int], dict[str, Any]]] = {}
    for name, folder in (("hardened", options.model), ("undefended twin", twin)):
        check_unseen(folder, images)
        looks[name] = partial(held, load_classifier(folder / "weights.safetensors").eval())
    if "guarded" in variants_in(options.model):
        net, _ = load_pipeline(options.model / "weights.safetensors", "guarded")
        calibration = load_variant(options.model, "guarded")
        looks["guarded"] = partial(guarded, pipeline_victim(net, calibration, "", rate=RATE))
    found: dict[str, Any] = {"n": len(images), "of": [print_of(options.model), images.digest()]}
    if options.out.is_file():
        before = json.loads(options.out.read_text())
        found = before if before.get("of") == found["of"] else found
    for name, look in looks.items():
        rows = found.setdefault(name, {})
        for eps in EPS:
            if str(eps) not in rows:
                rows[str(eps)] = look(images, eps)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found))
            low, high = rows[str(eps)]["interval"]
            value = rows[str(eps)]["value"]
            print(f"{name:16} {eps}/255  {value:.1%} ({low:.1%} to {high:.1%})", flush=True)
    if options.plot:
        figure(found, options.trained_for).savefig(options.plot)


if __name__ == "__main__":
    main()
