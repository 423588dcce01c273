"""What others call what a card holds: MITRE ATLAS, OWASP, NIST and the European AI Act.

Sources: MITRE ATLAS 5.6.0; OWASP Machine Learning Security Top Ten, 2023; NIST AI 100-2 E2025;
Regulation (EU) 2024/1689, Article 15 and Annex IV.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rampart.hardening.model.card import Figure, Row, main_figures
from rampart.hardening.report import redteam
from rampart.hardening.report.card import merit
from rampart.hardening.report.elements import both, title

NOT_MEASURED = "not measured"
WHITE_BOX = ("robust", "autoattack", "autoattack_short", "joint_apgd", "pgd20")
Finding = Callable[[Row], str]  # what a card says, or nothing


class Item(NamedTuple):
    """One entry of a framework, and what the card has for it; None of what no command measures."""

    number: str
    name: str
    found: Finding | None = None


class Framework(NamedTuple):
    """A framework's name, and its entries that concern a served model."""

    name: str
    items: Sequence[Item]


def said(*names: str) -> Finding:
    """A finding: each subject's figures of these names, of most images, the worst of several."""

    def found(card: Row) -> str:
        every = main_figures(card)
        subjects = dict.fromkeys(one.subject for one in every)
        lines = []
        for subject in sorted(subjects, key=lambda one: one.kind == "undefended"):
            for name in names:
                own = [f for f in every if (f.subject, f.name.partition("@")[0]) == (subject, name)]
                if own:
                    lines.append(in_line(min(own, key=lambda one: (-one.n, merit(one)))))
        return "\n".join(lines)

    return found


def in_line(figure: Figure) -> str:
    """A figure with all that belongs to it, but for its data."""
    where = f", {figure.threat}" if figure.threat else ""
    text = f"{figure.subject.title}: {title(figure.name)} {both(figure)}"
    return f"{text}, n = {figure.n}{where}"


def hardened(card: Row) -> str:
    """How the classifier was trained."""
    return "\n".join(card.get("training", {}).values())


def detected(card: Row) -> str:
    """What the detectors promise, and did on validation images."""
    return "\n".join(
        f"{form}: {part['rate']:.1%} false alarms promised, {part['flagged']} of {part['n']}"
        " validation images flagged"
        for form, part in card.get("promise", {}).items()
    )


def purified(card: Row) -> str:
    """The purifier, where one was trained."""
    return "\n".join(text for name, text in card.get("training", {}).items() if name == "purifier")


def hashed(card: Row) -> str:
    """The digests that the card holds."""
    sets = (f"{name} images: {part['count']}" for name, part in card.get("images", {}).items())
    return "; ".join(["files of section 1 by SHA-256", *sets])


def checked(card: Row) -> str:
    """How many self-checks passed."""
    checks = card.get("checks", [])
    passed = sum(check["passed"] for check in checks)
    return f"{passed} of {len(checks)} self-checks of the attacks passed" if checks else ""


def varied(card: Row) -> str:
    """False alarms by the way that clean images come."""
    rows = card.get("false_alarms", {}).get("rows", [])
    shares = (f"{row['variant']}, {row['way']}: {row['value']:.1%} flagged" for row in rows)
    return "\n".join(list(shares)[:8])


def beyond(card: Row) -> str:
    """What lies outside the threat model, where it was measured."""
    rows = card.get("outside", {}).get("rows", [])
    return "\n".join(
        f"{row['variant']}, {row['threat']}: {row['right']['value']:.1%} right, n = {row['n']}"
        for row in rows
        if row["subject"] != "undefended"
    )


def black_box(card: Row) -> str:
    """What attacks by queries on the running endpoint achieved."""
    return "\n".join(map(redteam.in_words, card.get("redteam", [])))


def made(card: Row) -> str:
    """The commands that made the model."""
    return "\n".join(card.get("commands", []))


def versions(card: Row) -> str:
    """The software that measured it."""
    return ", ".join(f"{name} {number}" for name, number in card.get("versions", {}).items())


def built(card: Row) -> str:
    """The network."""
    return ", ".join(f"{name} {value}" for name, value in card["classifier"].items())


def sets(card: Row) -> str:
    """The sets of images, by digest."""
    parts = card.get("images", {}).items()
    return "\n".join(f"{name}: {p['count']} images, SHA-256 {p['sha256']}" for name, p in parts)


FRAMEWORKS = (
    Framework(
        "MITRE ATLAS 5.6.0, techniques",
        (
            Item("AML.T0015", "Evade AI Model", said("robust", "autoattack")),
            Item("AML.T0043.000", "White-Box Optimization", said(*WHITE_BOX)),
            Item("AML.T0043.001", "Black-Box Optimization", black_box),
            Item("AML.T0043.002", "Black-Box Transfer", said("transfer")),
            Item("AML.T0043.003", "Manual Modification", beyond),
            Item("AML.T0043.004", "Insert Backdoor Trigger"),
            Item("AML.T0041", "Physical Environment Access"),
            Item("AML.T0020", "Poison Training Data"),
            Item("AML.T0018", "Manipulate AI Model"),
            Item("AML.T0024", "Exfiltration via AI Inference API"),
            Item("AML.T0029", "Denial of AI Service"),
        ),
    ),
    Framework(
        "MITRE ATLAS 5.6.0, mitigations",
        (
            Item("AML.M0003", "Model Hardening", hardened),
            Item("AML.M0015", "Adversarial Input Detection", detected),
            Item("AML.M0010", "Input Restoration", purified),
            Item("AML.M0008", "Validate AI Model", checked),
            Item("AML.M0014", "Verify AI Artifacts", hashed),
            Item("AML.M0002", "Passive AI Output Obfuscation"),
            Item("AML.M0004", "Restrict Number of AI Model Queries"),
            Item("AML.M0024", "AI Telemetry Logging"),
        ),
    ),
    Framework(
        "OWASP Machine Learning Security Top Ten, 2023",
        (
            Item("ML01", "Input Manipulation Attack", said("robust", "autoattack")),
            Item("ML02", "Data Poisoning Attack"),
            Item("ML03", "Model Inversion Attack"),
            Item("ML04", "Membership Inference Attack"),
            Item("ML05", "Model Theft"),
            Item("ML06", "AI Supply Chain Attacks", hashed),
            Item("ML07", "Transfer Learning Attack"),
            Item("ML08", "Model Skewing"),
            Item("ML09", "Output Integrity Attack"),
            Item("ML10", "Model Poisoning"),
        ),
    ),
    Framework(
        "NIST AI 100-2 E2025, predictive AI",
        (
            Item("evasion", "white-box attacks", said(*WHITE_BOX)),
            Item("evasion", "black-box attacks on scores or labels", black_box),
            Item("evasion", "transferability of attacks", said("transfer")),
            Item("evasion", "attacks in the real world"),
            Item("poisoning", "availability, targeted, backdoor"),
            Item("privacy", "reconstruction, membership, extraction"),
            Item("mitigation", "adversarial training", hardened),
        ),
    ),
    Framework(
        "Regulation (EU) 2024/1689, Article 15",
        (
            Item("15(3)", "accuracy and its metrics", said("clean")),
            Item("15(4)", "resilience to errors, faults, inconsistencies", varied),
            Item("15(5)", "adversarial examples, model evasion", said("robust", "autoattack")),
            Item("15(5)", "data poisoning"),
            Item("15(5)", "model poisoning"),
            Item("15(5)", "confidentiality attacks"),
        ),
    ),
    Framework(
        "Regulation (EU) 2024/1689, Annex IV",
        (
            Item("1(a)", "intended purpose, provider"),
            Item("1(c)", "versions of software", versions),
            Item("2(a)", "steps of development", made),
            Item("2(b)", "design: network and training", built),
            Item("2(d)", "data sets", sets),
            Item("2(e)", "human oversight"),
            Item("2(g)", "validation and testing: accuracy", said("clean")),
            Item("2(g)", "validation and testing: robustness", said("robust", "autoattack")),
            Item("2(h)", "cybersecurity measures", hashed),
            Item("3", "limits of performance: clean images rejected", said("clean_rejection")),
            Item("5", "risk management"),
            Item("6", "changes over the lifecycle"),
            Item("7", "harmonised standards"),
            Item("8", "declaration of conformity"),
            Item("9", "post-market monitoring"),
        ),
    ),
)


def rows(framework: Framework, card: Row) -> Iterator[tuple[str, str, str]]:
    """Number, name, and what the card has for each entry."""
    for item in framework.items:
        found = item.found(card) if item.found else ""
        yield item.number, item.name, found or NOT_MEASURED
