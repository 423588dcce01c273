"""The learning curve of a run, drawn after each epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rampart.hardening.model.style import STYLE

# Okabe and Ito's blue and orange; marker and line differ too, so that none needs colour.
LOOKS: dict[str, dict[str, Any]] = {
    "clean": {"label": "clean", "color": "#0072B2", "marker": "o", "ls": "-"},
    "pgd10": {"label": "PGD-10", "color": "#E69F00", "marker": "^", "ls": "--"},
}


def learning_curve(
    runs: Sequence[Sequence[dict[str, float]]], path: Path, figure: str = "validation accuracy"
) -> Path:
    """A `figure` of each epoch of `runs`, clean and under PGD-10, as a PNG."""
    history = [row for run in runs for row in run]
    epoch = list(range(1, len(history) + 1))
    with matplotlib.rc_context(STYLE):
        sheet = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        axes = sheet.add_subplot()
        for name, look in LOOKS.items():
            axes.plot(epoch, [row[name] for row in history], **look)
        last = epoch[-len(runs[-1]) :]
        best = max(last, key=lambda number: history[number - 1]["pgd10"])
        axes.axvline(best, color="#666666", lw=1, label="most robust epoch of the last run")
        for number, start in enumerate(np.cumsum([len(run) for run in runs])[:-1]):
            label = "" if number else "another run begins"
            axes.axvline(start + 0.5, color="#999999", lw=1, ls=":", label=label)
        axes.set(xlabel="epoch", ylabel=figure, ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        sheet.legend(loc="outside upper left", ncols=4)
        sheet.savefig(path)
    return path
