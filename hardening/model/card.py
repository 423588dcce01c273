"""What was measured of a model: card.json beside its weights, and the typed figures in it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rampart.handlers.verdict import Policy
from rampart.hardening.model.files import write_whole

RATE = Policy.false_alarm_rate
LEAST = 100  # images, fewer of which choose no precision
FILE = "card.json"
MEASURED = "measured.json"  # beside it: what was measured and not put into the card
Row = dict[str, Any]  # of card.json
NO_VARIANT = "-"  # of what nothing stands in front of
FP32 = "fp32"
ANYWAY = "--anyway packs it, and anyway=True in Python takes it as it is"


@dataclass(frozen=True)
class Subject:
    """Who was measured: "classifier", "pipeline", "max_softmax" or "undefended", in what form."""

    kind: str
    variant: str = NO_VARIANT
    precision: str = FP32

    @classmethod
    def parse(cls, text: str, variant: str) -> "Subject":
        """The subject that JSON calls `text`, as "graph:int8", of a variant."""
        start, _, precision = text.partition(":")
        kind = "pipeline" if start == "graph" else start
        return cls(kind, variant, precision or FP32)

    @property
    def text(self) -> str:
        """What JSON calls it, beside the variant."""
        if self.precision == FP32:
            return self.kind
        return f"{'graph' if self.kind == 'pipeline' else self.kind}:{self.precision}"

    @property
    def name(self) -> str:
        """What people call it."""
        return self.text if self.variant == NO_VARIANT else f"{self.text} {self.variant}"

    @property
    def title(self) -> str:
        """What pages call it."""
        if self.variant == NO_VARIANT:
            return {"undefended": "undefended twin"}.get(self.kind, "classifier alone")
        form = self.variant if self.precision == FP32 else f"{self.variant} in {self.precision}"
        return f"{form}, rejecting by max-softmax" if self.kind == "max_softmax" else form


@dataclass(frozen=True)
class Figure:
    """One figure with its 95% interval over `n` images; `rate` where it is not the usual one."""

    subject: Subject
    name: str
    value: float
    n: int
    interval: tuple[float, float]
    data: str
    command: str
    norm: str | None = None
    eps: str | None = None
    attack: str | None = None
    rate: float | None = None

    @classmethod
    def of(cls, row: Row) -> "Figure":
        """A row of card.json."""
        values = {name: row[name] for name in row if name not in ("subject", "variant")}
        values["interval"] = tuple(row["interval"])
        return cls(Subject.parse(row["subject"], row["variant"]), **values)

    def row(self) -> Row:
        """As card.json lists it."""
        who = {"subject": self.subject.text, "variant": self.subject.variant}
        values = {name: value for name, value in vars(self).items() if value is not None}
        del values["subject"]
        return who | values | {"interval": list(self.interval)}

    @property
    def threat(self) -> str | None:
        """The threat as the card names it; None of clean images."""
        return None if self.eps is None else f"{self.norm} {self.eps}"

    @property
    def key(self) -> tuple[object, ...]:
        """What a newer figure replaces: the same under the same threat, attack, data and rate."""
        setting = (self.norm, self.eps, self.attack, self.data, self.rate)
        return (self.subject, self.name, *setting)

    @property
    def cell(self) -> str:
        """The figure with its interval, as tables show it."""
        return percent(self.value, self.interval)


def main_figures(card: Row) -> list[Figure]:
    """The figures under the card's threat model or of clean images, at the rate it promises."""
    figures = map(Figure.of, card.get("metrics", []))
    threats = (None, card.get("threat_model"))
    promised = card.get("promise", {}).items()
    rates = {None, *(entry["rate"] for form, entry in promised if form.endswith(FP32))}
    return [figure for figure in figures if figure.rate in rates and figure.threat in threats]


def failed_checks(card: Mapping[str, Any]) -> list[str]:
    """One line that names the self-checks of a card that failed, if any did."""
    failed = [f"{c['name']} ({c['subject']})" for c in card.get("checks", []) if not c["passed"]]
    return [f"self-checks failed: {', '.join(failed)}"] if failed else []


def no_better_than_chance(card: Mapping[str, Any]) -> list[str]:
    """One line where a card's accuracy is what its most frequent class alone would reach."""
    accuracy = card.get("accuracy")
    if not accuracy or accuracy["value"] > accuracy["chance"]:
        return []
    return [
        f"it is right on {accuracy['value']:.1%} of {accuracy['n']:,} held-out images, and guessing"
        f" the most frequent class on {accuracy['chance']:.1%}: check labels and images, train"
        " longer or on more images, or use a smaller --eps"
    ]


def unfit(card: Mapping[str, Any]) -> list[str]:
    """What makes a model unfit to be served, a line each."""
    return [*failed_checks(card), *no_better_than_chance(card)]


def check_fit(card: Mapping[str, Any], refusal: str) -> None:
    """Raise ValueError that begins with a `refusal` where a model is unfit to be served."""
    if faults := unfit(card):
        raise ValueError(f"{refusal}: {'; '.join(faults)}. {ANYWAY}")


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """`new` rows, and the `old` ones with other keys: no weak attack replaces a stronger one."""
    replaced = {Figure.of(row).key for row in new}
    return [row for row in old if Figure.of(row).key not in replaced] + new


def merge_checks(old: list[Row], new: list[Row]) -> list[Row]:
    """`new` self-checks, and the `old` ones that stay: those that `new` does not repeat on the same
    data, or passes on fewer images. Rows of earlier cards name no data, and go by any repetition.
    """
    fresh = {check_key(row): row for row in new}
    repeated = {key[:2] for key in fresh}

    def stays(row: Row) -> bool:
        if "data" not in row:
            return check_key(row)[:2] not in repeated
        other = fresh.get(check_key(row))
        return other is None or (other["passed"] and other["n"] < row["n"])

    kept = [row for row in old if stays(row)]
    held = {check_key(row) for row in kept}
    return kept + [row for row in new if check_key(row) not in held]


def joined(card: Row, entries: Row) -> Row:
    """A card with `entries` in it; figures and self-checks go beside those that it has."""
    content = card | entries
    for name, join in (("metrics", merge), ("checks", merge_checks)):
        if name in card and name in entries:
            content[name] = join(card[name], entries[name])
    return content


def of_others(card: Row, precision: str) -> Row:
    """A card without the figures and self-checks of graphs in `precision`."""
    rows = {name: card[name] for name in ("metrics", "checks") if name in card}
    return card | {
        n: [r for r in each if precision not in r["subject"]] for n, each in rows.items()
    }


def check_key(row: Row) -> tuple[str, str, str]:
    """What makes it the same self-check: name, subject, and data without their number."""
    data = str(row.get("data", "")).removeprefix(f"{row.get('n')} of ")
    return row["name"], row["subject"], data


def outnumbered(card: Row, new: Row) -> str:
    """What in a card is of more images than what would replace it, in words; else ""."""
    have = {Figure.of(row).key: row["n"] for row in card.get("metrics", [])}
    pairs = [
        (figure.name, have.get(figure.key, 0), figure.n)
        for figure in map(Figure.of, new.get("metrics", []))
    ]
    studies = [name for name in new if name != "metrics" and name in card]
    pairs += [(name, images_of(card[name]), images_of(new[name])) for name in studies]
    words = (f"{name} of {old:,} images, and not {now:,}" for name, old, now in pairs if old > now)
    return next(words, "")


def images_of(study: object) -> int:
    """How many images a study in a card is of; 0 where it does not say."""
    if not isinstance(study, dict):
        return 0
    first: Row = next(iter(study.get("rows", [])), {})
    return int(study.get("n") or first.get("n", 0))


def robust_in_int8(folder: Path, variant: str) -> float | None:
    """Robust accuracy, with or without rejection, that int8 costs a variant at most; None if
    unknown. Only LEAST or more validation images decide: test images must not choose what is
    served.
    """
    float_one, int8 = Subject("pipeline", variant), Subject("pipeline", variant, "int8")
    pairs: dict[tuple[object, ...], dict[Subject, Figure]] = {}
    for figure in main_figures(read_card(folder)):
        worst = figure.name.partition("@")[0] in ("robust", "robust_with_rejection")
        decides = worst and figure.n >= LEAST and "validation split" in figure.data
        if decides and figure.subject in (float_one, int8):
            pairs.setdefault(figure.key[1:], {})[figure.subject] = figure
    both = [pair for pair in pairs.values() if len(pair) == 2]
    most = max((pair[int8].n for pair in both), default=0)
    losses = [p[float_one].value - p[int8].value for p in both if p[int8].n == most]
    return round(max(losses), 6) if losses else None


def read_card(folder: Path, name: str = FILE) -> Row:
    """The JSON of a model folder's card; empty where none was written yet. ValueError for other."""
    file = folder / name
    try:
        card: Row = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): copy it again") from error
    return card


def write_card(folder: Path, card: Row, name: str = FILE) -> Path:
    """Write card.json in a model folder."""
    file = folder / name
    write_whole(file, json.dumps(card, indent=1) + "\n")
    return file


def percent(value: float, interval: Sequence[float]) -> str:
    """A share with its interval, as tables show it."""
    low, high = interval
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def cell_text(share: Row) -> str:
    """A share of a card with its interval."""
    return percent(share["value"], share["interval"])


def gain_text(gain: Row) -> str:
    """A difference of shares and its interval, in percentage points."""
    low, high = (100 * bound for bound in gain["interval"])
    return f"{100 * gain['value']:+.1f} ({low:+.1f} to {high:+.1f})"
