"""What a page needs of an evaluation beside its figures and images: a card keeps that too."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.checks import Check
from rampart.hardening.judge.evaluate import Evaluation
from rampart.hardening.model.card import Figure, Row, Subject, main_figures
from rampart.hardening.report.card import SUBJECTS, Lowest, merit, worst_cases


class Findings(NamedTuple):
    """Who was attacked, how, and whether the attacks are to be trusted."""

    threat: Threat
    subjects: tuple[Subject, ...]  # the victims
    checks: list[Check]
    images: int  # how many were attacked
    knowledge: str = "knows every part"  # of the attacker
    worst: str = "worst case"  # what is left is called
    by_gradients: bool = True
    fingerprints: Mapping[str, str] = MappingProxyType({})  # of the victims, by name

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Findings":
        """Those of an evaluation."""
        victims = [record.victim for record in evaluation.records.values()]
        return cls(
            evaluation.threat,
            tuple(victim.subject for victim in victims),
            evaluation.checks,
            len(evaluation.images),
            evaluation.knowledge,
            evaluation.worst,
            by_gradients=bool(evaluation.attempts),
            fingerprints={victim.name: victim.fingerprint for victim in victims},
        )

    @property
    def names(self) -> list[str]:
        """The victims' names, as the evaluation has them."""
        return [subject.name for subject in self.subjects]

    @property
    def pipelines(self) -> list[str]:
        """The names of those that have detectors."""
        return [subject.name for subject in self.subjects if subject.kind == "pipeline"]


def of_card(card: Row) -> tuple[Findings, list[Figure]]:
    """The evaluation of a card on the most images that has a worst case, and its worst figures.

    Raises ValueError where a card has no figures of a classifier.
    """
    figures = main_figures(card)
    if not figures:
        raise ValueError(
            f"the card of {card.get('model')} has no figures of a classifier:"
            " `rampart evaluate --into-card` measures them"
        )
    ended = [figure for figure in figures if figure.name == "robust"]
    data = max(ended or figures, key=lambda figure: figure.n).data
    lowest: Lowest = {}
    for figure in (figure for figure in figures if figure.data == data):
        held = lowest.setdefault((figure.subject, figure.name), figure)
        lowest[figure.subject, figure.name] = min(held, figure, key=merit)
    shown = [replace(one, name=name) for (_, name), one in worst_cases(lowest).items()]
    order = [*SUBJECTS, *dict.fromkeys(one.subject for one in shown)]
    shown.sort(key=lambda one: order.index(one.subject))
    threat = Threat.parse(str(card.get("threat_model"))) or Threat()
    checks = [Check(**check) for check in card.get("checks", [])]
    subjects = tuple(dict.fromkeys(figure.subject for figure in shown))
    return Findings(threat, subjects, checks, max(one.n for one in shown)), shown
