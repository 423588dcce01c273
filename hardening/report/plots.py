"""Drawings of an evaluation as SVG images inside a page. Every look differs in colour (Okabe and
Ito 2008), marker and line style at once, so that none needs colour.
"""

import base64
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from rampart.handlers.image import as_png
from rampart.hardening.model.arrays import Floats, Pixels
from rampart.hardening.model.card import NO_VARIANT, Subject
from rampart.hardening.model.style import STYLE

WIDTH = 4.4  # inches
VICTIMS = (
    "classifier",
    "undefended",
    "pipeline",
    "graph",
    "max_softmax",
)  # kinds of subjects
PERCENT = PercentFormatter(1, decimals=0)
BINS = 30


class Ink(NamedTuple):
    """How one thing is drawn wherever it appears."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


INKS = {
    "classifier": Ink("#000000", "D", ":"),
    "pipeline full": Ink("#0072B2", "o", "-"),
    "pipeline lean": Ink("#D55E00", "s", "--"),
    "max_softmax full": Ink("#56B4E9", "^", "-."),
    "max_softmax lean": Ink("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    "graph:int8 full": Ink("#009E73", "P", (0, (3, 1))),
    "graph:int8 lean": Ink("#882255", "*", (0, (3, 1, 1, 1))),
    "max_softmax:int8 full": Ink("#44AA99", "<", (0, (1, 1))),
    "max_softmax:int8 lean": Ink("#999933", ">", (0, (1, 2))),
    "graph:fp16 full": Ink("#332288", "h", (0, (3, 1))),
    "graph:fp16 lean": Ink("#AA4499", "p", (0, (3, 1, 1, 1))),
    "max_softmax:fp16 full": Ink("#88CCEE", "<", (0, (1, 1))),
    "max_softmax:fp16 lean": Ink("#DDCC77", ">", (0, (1, 2))),
    "pipeline guarded": Ink("#117733", "d", "-"),
    "max_softmax guarded": Ink("#DDDDDD", "v", (0, (1, 2))),
    "graph:int8 guarded": Ink("#661100", "H", (0, (3, 1))),
    "max_softmax:int8 guarded": Ink("#888888", "<", (0, (1, 1))),
    "graph:fp16 guarded": Ink("#6699CC", "8", (0, (3, 1, 1, 1))),
    "max_softmax:fp16 guarded": Ink("#AAAAAA", ">", (0, (1, 1))),
    "undefended": Ink("#CC79A7", "X", ":"),
    "clean": Ink("#0072B2", "o", "-"),
    "pgd20": Ink("#E69F00", "^", "--"),
    "joint_apgd": Ink("#D55E00", "s", ":"),
    "attacked": Ink("#D55E00", "^", "--"),
    "purified": Ink("#009E73", "s", ":"),
    "worst case": Ink("#D55E00", "s", "--"),
    "under Square": Ink("#D55E00", "s", "--"),
}


# The setups of an ablation whose rejection is drawn.
CURVES = {
    "+ confidence": "max_softmax full",
    "lean": "pipeline lean",
    "guarded": "pipeline guarded",
    "full": "pipeline full",
}


def title(name: str) -> str:
    """What a legend calls what INKS calls `name`."""
    text, _, variant = name.partition(" ")
    if text.partition(":")[0] not in VICTIMS:
        return {"pgd20": "PGD-20", "joint_apgd": "joint attack"}.get(name, name)
    return Subject.parse(text, variant or NO_VARIANT).title


class Curve(NamedTuple):
    """Points of what INKS calls `name`."""

    name: str
    x: Floats  # (M,)
    y: Floats  # (M,)


class Shares(NamedTuple):
    """Shares or medians, with the ends of their intervals, of what INKS calls `name`."""

    name: str
    place: Floats  # (M,) where each stands on the axis that is no share
    value: Floats  # (M,)
    low: Floats  # (M,)
    high: Floats  # (M,)


def uri(kind: str, content: bytes) -> str:
    """`content` as an address that carries it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png(image: Pixels) -> str:
    """An image uint8 (H, W, 3) as a data URI."""
    return uri("png", as_png(image))


def svg(draw: Callable[[Axes], None], *, height: float = 3.2, width: float = WIDTH) -> str:
    """What `draw` puts on axes `height` inches high, as a data URI; the legend stands above."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.legend(loc="outside upper left", ncols=2, handlelength=3.5)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return uri("svg+xml", buffer.getvalue())


def joined(axes: Axes, every: Sequence[Shares]) -> None:
    """Each of `every` as a line through its points, with their intervals."""
    for number, s in enumerate(every):
        ink = INKS[s.name]
        # Shifted a little, so that equal figures do not hide each other.
        x = s.place + 0.012 * (number - (len(every) - 1) / 2)
        axes.vlines(x, s.low, s.high, color=ink.colour, lw=1)
        axes.plot(x, s.value, ink.marker, label=title(s.name), color=ink.colour, ls=ink.line)


def lines(every: Sequence[Shares], *, x_label: str, y_label: str) -> str:
    """Shares over a few places from 0 to 1, with their intervals."""

    def draw(axes: Axes) -> None:
        joined(axes, every)
        axes.set(ylim=(-0.02, 1.02), xlabel=x_label, ylabel=y_label)
        places = sorted({place for s in every for place in s.place.tolist()})
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.yaxis.set_major_formatter(PERCENT)

    return svg(draw)


def along(every: Sequence[Shares], *, x_label: str, y_label: str) -> str:
    """Medians of what is no share, with their quartiles, over a few places."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color="#000000", lw=1)
        joined(axes, every)
        axes.set(xlabel=x_label, ylabel=y_label)

    return svg(draw)


def over_rate(every: Sequence[Curve], marks: Sequence[Curve], *, y_label: str) -> str:
    """Shares over the share of clean images flagged, logarithmic, with single points as `marks`."""

    def draw(axes: Axes) -> None:
        left = min(0.005, *(s.x[s.x > 0].min() / 2 for s in every))
        for rate in (0.01, 0.05):
            axes.axvline(rate, color="#666666", lw=0.8)
        for s in every:
            ink = INKS[s.name]
            x = s.x.clip(left)
            look: dict[str, Any] = {"color": ink.colour, "ls": ink.line, "lw": 1.7}
            axes.step(x, s.y, where="post", label=title(s.name), **look)
        for s in marks:
            ink = INKS[s.name]
            axes.plot(s.x.clip(left), s.y, ink.marker, color=ink.colour, ms=8, clip_on=False)
        axes.set(xscale="log", xlim=(left, 1), ylim=(-0.02, 1.02), ylabel=y_label)
        axes.set_xlabel("clean images flagged (logarithmic)")
        axes.xaxis.set_major_locator(FixedLocator([0.001, 0.01, 0.05, 0.2, 1.0]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g}%")
        axes.yaxis.set_major_formatter(PERCENT)

    return svg(draw)


def histogram(scores: dict[str, Floats], threshold: float | None) -> str:
    """Shares of each set over its scores (N,); infinite ones fall into the last bin."""
    finite = np.concatenate([score[np.isfinite(score)] for score in scores.values()])
    edges = np.linspace(finite.min(initial=0), finite.max(initial=1), BINS + 1)

    def draw(axes: Axes) -> None:
        for name, score in scores.items():
            ink = INKS[name]
            heights = np.histogram(score.clip(edges[0], edges[-1]), edges)[0] / len(score)
            axes.stairs(heights, edges, label=title(name), color=ink.colour, ls=ink.line, lw=1.7)
        if threshold is not None:
            axes.axvline(threshold, color="#000000", lw=1, label="rejected from here on")
        axes.set(xlabel="suspicion", ylabel="share of images")
        axes.yaxis.set_major_formatter(PERCENT)

    return svg(draw)


def scatter(every: Sequence[Curve]) -> str:
    """Points in a plane whose axes mean nothing."""

    def draw(axes: Axes) -> None:
        for s in every:
            ink = INKS[s.name]
            look: dict[str, Any] = {"color": ink.colour, "mfc": "none", "ms": 4}
            axes.plot(s.x, s.y, ink.marker, label=title(s.name), **look)
        axes.set(xticks=[], yticks=[])

    return svg(draw, height=4.4)


def dots(labels: Sequence[str], every: Sequence[Shares], *, x_label: str) -> str:
    """Shares with their intervals, a row a label; `place` counts the labels."""

    def draw(axes: Axes) -> None:
        for number, s in enumerate(every):
            ink = INKS[s.name]
            y = s.place + 0.7 * ((number + 0.5) / len(every) - 0.5)
            axes.hlines(y, s.low, s.high, color=ink.colour, lw=1)
            axes.plot(s.value, y, ink.marker, label=title(s.name), color=ink.colour, ms=5)
        axes.hlines(np.arange(1, len(labels)) - 0.5, 0, 1, color="#bbbbbb", lw=0.6)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(labels) - 0.5, -0.5), xlabel=x_label)
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PERCENT)

    return svg(draw, height=1.2 + len(labels) * (0.12 + 0.09 * len(every)))


def bars(labels: Sequence[str], every: Sequence[Shares]) -> str:
    """Shares as bars with their values, a group a label; `place` counts the labels."""
    height = 0.8 / len(every)

    def draw(axes: Axes) -> None:
        for number, s in enumerate(every):
            ink, hatch = INKS[s.name], "//" if number else ""
            y = s.place + height * (number - (len(every) - 1) / 2)
            wide = axes.barh(y, s.value, height * 0.92, label=s.name, color=ink.colour, lw=0)
            for bar in wide:
                bar.set(hatch=hatch, edgecolor="white")
            axes.hlines(y, s.low, s.high, color="#111111", lw=1)
            for place, value, high in zip(y, s.value, s.high, strict=True):
                axes.text(high + 0.012, place, f"{value:.1%}", va="center", weight="bold")
        axes.set(xlim=(0, 1.1), ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xticks(np.arange(0, 1.01, 0.2))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(PERCENT)

    return svg(draw, height=0.9 + 0.62 * len(labels), width=7.2)


def alike(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Setups of an ablation, those with the same shares under one name."""
    groups: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["clean"]["value"], row["robust"]["value"]), []).append(row)
    together = {}
    for first, *others in groups.values():
        names = [
            spaced(row["name"]).removeprefix("+ ").replace(" ", "\N{NO-BREAK SPACE}")
            for row in others
        ]
        same = fill(f"same with {', '.join(names)}", 34)
        together[spaced(first["name"]) + (f"\n{same}" if others else "")] = first
    return together


def spaced(name: str) -> str:
    """A name as people write it."""
    return name.replace("_", " ")


def setup_labels(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Label accuracy of each setup of an ablation, clean and under attack; rows as in the card."""
    groups = alike(rows)
    for name, key in (("under attack", "robust"), ("clean", "clean")):
        ink = INKS["attacked" if key == "robust" else key]
        for place, row in enumerate(groups.values()):
            axes.hlines(place, *row[key]["interval"], color=ink.colour, lw=1)
            where = (row[key]["value"], place - 0.1)
            axes.annotate(f"{where[0]:.0%}", where, ha="center", va="bottom", color=ink.colour)
        share = [row[key]["value"] for row in groups.values()]
        axes.plot(share, range(len(groups)), ink.marker, color=ink.colour, label=name)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(xlim=(-0.06, 1), ylim=(len(groups) - 0.5, -0.5), xlabel="images labelled right")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(visible=False, axis="y")


def setup_rejection(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """What rejecting adds under attack over the clean images it costs; rows as in the card."""
    for number, row in enumerate(rows):
        if row["name"] == "classifier":
            bare = row["robust"]["value"]
            axes.axhline(bare, color="#000000", ls=":", lw=1, label="classifier, rejects nothing")
        if ink := INKS.get(CURVES.get(row["name"], "")):
            # Shifted a little, so that equal figures do not hide each other.
            x = [point["clean_rejection"]["value"] + 0.0008 * number for point in row["at"]]
            held = [point["robust_with_rejection"] for point in row["at"]]
            y = [share["value"] for share in held]
            low, high = zip(*(share["interval"] for share in held), strict=True)
            axes.vlines(x, low, high, color=ink.colour, lw=0.5)
            axes.plot(x, y, ink.marker, color=ink.colour, ls=ink.line, label=row["name"])
    axes.set(xlabel="clean images rejected", ylabel="right or rejected under attack")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)


def ablation(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Both pictures of an ablation side by side, as a PNG; `title` says of which images."""
    lines = sum(1 + name.count("\n") for name in alike(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, max(4.2, 1.6 + 0.22 * lines)), dpi=120, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        labels, rejection = figure.subplots(1, 2, width_ratios=(1.2, 1))
        setup_labels(labels, rows)
        labels.set_title("Labels, with 95% intervals", loc="left", fontsize=10, pad=24)
        labels.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        setup_rejection(rejection, rows)
        rejection.set_title("Gain from rejection, with 95% intervals", loc="left", fontsize=10)
        rejection.legend(loc="upper left")
        rejection.set_ylim(top=rejection.get_ylim()[1] + 0.08)
        figure.savefig(path)
    return path


def coverage(points: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Share of clean images flagged over random splits beside the promised one, by variant."""

    def draw(axes: Axes) -> None:
        most = max(point["alpha"] for every in points.values() for point in every)
        axes.plot([0, 1.2 * most], [0, 1.2 * most], color="#000000", lw=1, label="promised")
        for number, (variant, every) in enumerate(points.items()):
            ink = INKS[f"pipeline {variant}"]
            x = np.array([point["alpha"] for point in every]) + 0.001 * number
            axes.vlines(x, *np.array([point["middle_95%"] for point in every]).T, color=ink.colour)
            share = [point["flagged"] for point in every]
            axes.plot(x, share, ink.marker, color=ink.colour, label=variant)
        axes.set(xlabel="promised share of false alarms", ylabel="clean images flagged")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)

    return svg(draw)
