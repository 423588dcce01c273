"""The sections out of the card: parts, false alarms, other threats, checks, the recipe."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rampart.hardening.judge import ablation, outside, purification, strangers
from rampart.hardening.judge.alarms import in_words
from rampart.hardening.judge.alarms import table as alarm_table
from rampart.hardening.judge.checks import Check
from rampart.hardening.report import plots, redteam
from rampart.hardening.report.elements import CHECKS, Drawing, Section, Table
from rampart.hardening.report.findings import Findings

# What other sections show of a card.
SHOWN = (
    "metrics", "checks", "history", "ablation", "test_ablation", "false_alarms", "outside",
    "purifier", "redteam",
)  # fmt: skip


def self_checks(checks: Sequence[Check]) -> Iterator[Section]:
    """What the evaluation found when it looked at itself."""
    if not checks:
        return
    words = ["These look for signs that an attack failed rather than that a defence held."]
    yield Section("Self-checks", words, tables=[check_table("Self-checks", checks)])


def check_table(name: str, checks: Sequence[Check]) -> Table:
    """A line for each of these checks."""
    result = {True: "passed", False: "FAILED"}
    body = [(result[c.passed], *in_short(c), c.where) for c in checks]
    return Table(name, ("result", "check", "victim", "what it saw"), body)


def in_short(check: Check) -> tuple[str, str]:
    """What a check looks for, and on which victim."""
    return CHECKS.get(check.name, plots.spaced(check.name)), plots.title(check.subject)


def parts(card: dict[str, Any]) -> Iterator[Section]:
    """What each part in front of the classifier costs and adds, where that was measured."""
    if "ablation" in card:
        default = card["ablation"]["default"]
        chosen = f"Served by default: {default['variant']} ({default['why']})."
        yield ablated("What each part adds", card["ablation"], chosen)
    if "test_ablation" in card:
        part = card["test_ablation"]
        title = "What rejection adds on test images"
        section = ablated(title, part, "Nothing was chosen by these.")
        curve = Table("Over the rate of rejection", *ablation.curve_table(part["rows"]))
        yield section._replace(tables=[*section.tables, curve])


def ablated(name: str, part: dict[str, Any], more: str) -> Section:
    """An ablation as the card has it, with `more` to say of it."""
    rows = [row | {"name": plots.spaced(row["name"])} for row in part["rows"]]
    words = [
        f"{part['data']}, {part['threat_model']}. Each setup was calibrated like a model of its own"
        f" and attacked with full knowledge ({part['attack']}); what was found against any was put"
        " to all.",
        more,
    ]
    dots = plots.svg(partial(plots.setup_labels, rows=rows), height=1.2 + 0.25 * len(rows))
    lines = plots.svg(partial(plots.setup_rejection, rows=rows))
    alts = (
        "Dot plot of clean and robust label accuracy of every setup, as in the table.",
        "Line plot of images right or rejected under attack over clean images rejected.",
    )
    figures = [
        Drawing(dots, alts[0], "Label accuracy of every setup."),
        Drawing(lines, alts[1], "What rejecting adds, over what it costs."),
    ]
    tables = [Table(name, *ablation.table(rows))]
    if checks := [Check(**row) for row in part.get("checks", [])]:
        tables.append(check_table(f"{name}: self-checks of the detectors", checks))
    return Section(name, words, figures, tables)


def alarms(card: dict[str, Any]) -> Iterator[Section]:
    """False alarms by the way clean images come, and whether the promise holds."""
    if "false_alarms" not in card:
        return
    part = card["false_alarms"]
    words = [
        f"{part['data']}; promised are {part['rate']:.1%}. The promise holds for images like those"
        " of the calibration; others may be flagged more often, though nothing is wrong with them."
        " Drift is the Kolmogorov-Smirnov distance of p-values from uniform.",
        *part["remedies"],
    ]
    pairs = [(variant, point) for variant, every in part["coverage"].items() for point in every]
    spread = "; ".join(f"{v}, promised {p['alpha']:.0%}: {in_words(p)}" for v, p in pairs)
    alt = f"Share of clean images flagged over random splits. {spread}."
    caption = "A random half of the calibration images ranks the other half, again and again."
    picture = Drawing(plots.coverage(part["coverage"]), alt, f"{caption} {spread}.")
    tables = [Table("False alarms", *alarm_table(part["rows"]))]
    if "strangers" in part:
        tables.append(Table("Pictures of no class", *strangers.table(part["strangers"])))
    yield Section("False alarms", words, [picture], tables)


def outside_threat(card: dict[str, Any]) -> Iterator[Section]:
    """What attackers outside the threat model, and the weather, do to every victim."""
    if "outside" not in card:
        return
    part = card["outside"]
    words = [
        f"{part['data']}; rejected where p < {part['rate']:g}. Nothing was trained or calibrated"
        f" for these: {part['attack']}. Corruptions are at one strength, and not CIFAR-10-C.",
        f"{outside.in_words(part['scaling'])}.",
    ]
    tables = [Table("Outside the threat model", *outside.table(part["rows"]))]
    yield Section("Outside the threat model", words, tables=tables)


def purifier(card: dict[str, Any]) -> Iterator[Section]:
    """What the purifier is for, where that was measured."""
    if "purifier" not in card:
        return
    part = card["purifier"]
    words = [
        f"{part['data']}, {part['threat_model']}, {part['attack']}. Each gain is over the same"
        " images. Robust is only what the attack that knows the purifier leaves.",
        *part["advice"],
    ]
    tables = [Table("What the purifier is for", *purification.table(part["rows"]))]
    yield Section("What the purifier is for", words, tables=tables)


def over_http(card: dict[str, Any]) -> Iterator[Section]:
    """What a red team achieved that saw answers alone."""
    if tables := [*redteam.tables(card)]:
        yield Section(
            tables[0].caption, ["Each attack saw the answers of the endpoint alone."], tables=tables
        )


def recipe(card: dict[str, Any], findings: Findings) -> Section:
    """What was defended, against whom, and how all of it was made."""
    reach = {"Linf": "moves every pixel of", "L2": "moves, in the L2 norm with pixels from 0 to 1,"}
    known = findings.knowledge
    if findings.pipelines:
        known = "knows weights, purifier, detectors and thresholds"
    words = [
        f"Threat model: the attacker {known}, and"
        f" {reach[findings.threat.norm]} an image by at most {str(findings.threat).split()[1]}."
        " Not covered: other norms, patches, poisoned training data, theft of the model, and"
        " attacks stronger than those listed here."
    ]
    facts = {key: value for key, value in card.items() if key not in SHOWN}
    body = list(flat(facts))
    body += [(f"fingerprint: {plots.title(n)}", one) for n, one in findings.fingerprints.items()]
    commands = dict.fromkeys(row["command"] for row in card.get("metrics", []))
    body += [("measured by", command) for command in commands]
    table = Table("Card", ("what", "value"), body, folded=True)
    return Section("Threat model and recipe", words, tables=[table])


def flat(part: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dictionaries, each with its path."""
    for key, value in part.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{plots.spaced(key)}: ")
        else:
            lines = value if isinstance(value, list) else [value]
            yield f"{above}{plots.spaced(key)}", "\n".join(map(str, lines))
