"""Defences that are broken on purpose, and what catches each, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from blobs import Learned

from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.objectives import Look, View
from rampart.hardening.judge import checks
from rampart.hardening.judge.checks import Check
from rampart.hardening.model.detectors import margin, step_against


def failures(look: Look, learned: Learned) -> set[str]:
    x, label = learned.x, learned.label
    done = checks.check_look(look, x, label, learned.threat, "broken", queries=150)
    assert len(done) == len({check.name for check in done}) == 6
    return {check.name for check in done if not check.passed}


def test_an_honest_network_passes_every_check(learned: Learned) -> None:
    assert failures(learned.look, learned) == set()


def test_saturated_logits_are_caught_as_masked_gradients(learned: Learned) -> None:
    def saturated(x: torch.Tensor) -> View:
        return View(learned.model(x) * 1e4)

    assert {"zero_gradients", "black_box"} <= failures(saturated, learned)


def test_a_random_defence_is_caught(learned: Learned) -> None:
    def random(x: torch.Tensor) -> View:
        return View(learned.model((x + 0.02 * torch.randn_like(x)).clamp(0, 1)))

    assert "randomness" in failures(random, learned)


def test_a_purifier_that_hides_gradients_behind_rounding_is_caught(learned: Learned) -> None:
    def rounding(x: torch.Tensor) -> View:
        return View(learned.model((x * 32).round() / 32))

    assert {"zero_gradients", "larger_eps"} <= failures(rounding, learned)


def test_a_detector_trained_on_the_test_attack_is_caught(learned: Learned) -> None:
    x, label, threat = learned.x, learned.label, learned.threat
    attacked = rungs.pgd20(learned.look, x, label, threat)
    torch.manual_seed(0)
    nn = torch.nn
    detector = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2304, 1),
    )
    optimizer = torch.optim.Adam(detector.parameters(), lr=3e-3)
    both = torch.cat([x, attacked])
    truth = torch.cat([torch.zeros(len(x)), torch.ones(len(x))])
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(detector(both).squeeze(1), truth)
        loss.backward()
        optimizer.step()
    detector.requires_grad_(False)

    def look(x: torch.Tensor) -> View:
        return View(learned.model(x), detector(x).squeeze(1))

    def safe(x: torch.Tensor) -> float:
        seen = look(x)
        assert seen.margin is not None
        right = seen.logits.argmax(1) == label
        return float((right | (seen.margin > 0)).float().mean())

    budget = rungs.Budget(steps=20, targets=2, queries=0, standard=False)
    joint = safe(rungs.joint_apgd(look, x, label, threat, budget))
    static = safe(attacked)
    assert static > 0.9
    caught = {
        check.name: check.passed
        for check in checks.adaptive(static, joint, "overfitted", count=len(x))
    }
    assert caught == {"adaptive": False, "weak_joint": True}


def test_a_detector_that_hides_its_gradient_behind_rounding_is_caught(learned: Learned) -> None:
    level = float(learned.x.mean(dim=(1, 2, 3)).quantile(0.7))

    def look(x: torch.Tensor) -> View:
        brightness = (x * 255).round().mean(dim=(1, 2, 3)) / 255
        return View(learned.model(x), brightness - level)

    x, label, threat = learned.x, learned.label, learned.threat
    done = checks.check_detectors(look, x, label, threat, "masked", queries=150, joint=1.0)
    assert {check.name for check in done if not check.passed} >= {"zero_detector_gradients"}


Step = Callable[[torch.Tensor, torch.Tensor, float, int], torch.Tensor]
Score = Callable[[torch.Tensor], torch.Tensor]


def caught_behind(learned: Learned, step: Step, score: Score = lambda left: -left) -> set[str]:
    """Which checks the detector consistency fails, with this step and score of what is left."""

    def probe(x: torch.Tensor, label: torch.Tensor, share: float, steps: int) -> torch.Tensor:
        return margin(learned.model(step(x, label, share, steps)), label)

    def suspicion(x: torch.Tensor) -> torch.Tensor:
        own = learned.model(x).detach().argmax(1)
        return score(probe(x, own, 1.0, 1))

    level = float(suspicion(learned.x).quantile(0.7))

    def look(x: torch.Tensor) -> View:
        return View(learned.model(x), suspicion(x) - level, partial(probe, x))

    x, label, threat = learned.x, learned.label, learned.threat
    budget = rungs.Budget(steps=20, targets=3, queries=0, standard=False)
    seen = look(rungs.joint_apgd(look, x, label, threat, budget))
    assert seen.margin is not None
    safe = float(((seen.logits.argmax(1) == label) | (seen.margin > 0)).float().mean())
    done = checks.check_detectors(look, x, label, threat, "consistency", queries=150, joint=safe)
    assert len({check.name for check in done}) == 6
    return {check.name for check in done if not check.passed}


def honest(learned: Learned) -> Step:
    """The step of consistency against a label, as it should be."""
    radius = torch.tensor(learned.threat.eps / 2)

    def step(x: torch.Tensor, label: torch.Tensor, share: float, steps: int) -> torch.Tensor:
        near = x
        for _ in range(steps):
            near = step_against(learned.model, near, share * radius / steps, label)
        return x + (near - x).detach()

    return step


def test_an_honest_consistency_passes_every_check(learned: Learned) -> None:
    assert caught_behind(learned, honest(learned)) == set()


def test_a_consistency_detached_too_far_is_caught(learned: Learned) -> None:
    def detached(*asked: Any) -> torch.Tensor:
        return honest(learned)(*asked).detach() + 0 * asked[0]

    caught = caught_behind(learned, detached)
    assert {"zero_detector_gradients", "detector_slope", "consistency_slope"} <= caught


def test_a_consistency_with_saturated_scores_is_caught(learned: Learned) -> None:
    def saturated(left: torch.Tensor) -> torch.Tensor:
        return -torch.tanh(1e4 * left)

    assert {"zero_detector_gradients", "detector_slope"} <= caught_behind(
        learned, honest(learned), saturated
    )


def test_a_consistency_whose_step_has_the_wrong_sign_is_caught(learned: Learned) -> None:
    def forward(x: torch.Tensor, label: torch.Tensor, share: float, steps: int) -> torch.Tensor:
        return x - (honest(learned)(x, label, share, steps) - x).detach()

    assert caught_behind(learned, forward) >= {"consistency_step"}


def test_a_consistency_whose_gradient_has_the_wrong_sign_is_caught(learned: Learned) -> None:
    def turned(*asked: Any) -> torch.Tensor:
        near, x = honest(learned)(*asked), asked[0]
        return near.detach() - (x - x.detach())

    assert {"detector_slope", "consistency_slope"} <= caught_behind(learned, turned)


def test_a_joint_attack_that_averaged_gradients_beat_is_caught(learned: Learned) -> None:
    check = partial(checks.smoothed, learned.look, learned.x, learned.label, learned.threat, "net")
    found = float(check(joint=0.0).seen.split(", ")[1].split("%")[0]) / 100
    assert found < 0.9
    assert check(joint=found).passed and not check(joint=1.0).passed


def test_a_joint_attack_weaker_than_one_that_ignores_detectors_is_caught() -> None:
    found = {check.name: check.passed for check in checks.adaptive(0.2, 0.9, "net", count=40)}
    assert found == {"adaptive": True, "weak_joint": False}


def test_square_beats_a_victim_with_detectors_only_where_it_accepts(learned: Learned) -> None:
    x, label, threat = learned.x, learned.label, learned.threat

    def strict(x: torch.Tensor) -> View:
        return View(learned.model(x), torch.ones(len(x)))

    assert checks.square(strict, x, label, threat, queries=50) == 1.0
    assert checks.square(learned.look, x, label, threat, queries=50) < 1.0


def test_an_attack_that_weakens_with_more_steps_is_caught(
    learned: Learned, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(checks, "robust_at", lambda *_, **__: next(shares))
    x, label = learned.x, learned.label
    assert not checks.more_steps(learned.look, x, label, learned.threat, "net").passed


def test_a_small_eps_is_no_reason_to_distrust_an_honest_network(learned: Learned) -> None:
    tiny = learned.threat._replace(eps=1 / 255)
    assert checks.larger_eps(learned.look, learned.x, learned.label, tiny, "net").passed


def test_probabilities_are_no_logits(learned: Learned) -> None:
    def soft(x: torch.Tensor) -> View:
        return View(learned.model(x).softmax(1))

    assert not checks.logits_are_logits(soft, learned.x, "soft").passed


@pytest.mark.parametrize(
    ("values", "passed"),
    [([0.9, 0.5, 0.5], True), ([0.5, 0.54, 0.5], True), ([0.6, 0.5, 0.56], False)],
)
def test_a_share_may_rise_by_no_more_than_the_tolerance(values: list[float], passed: bool) -> None:
    assert checks.falls(values, 40) is passed


def test_of_few_images_one_or_two_are_no_sign() -> None:
    def passed(static: float, joint: float, count: int) -> list[bool]:
        return [check.passed for check in checks.adaptive(static, joint, "net", count=count)]

    assert passed(12 / 17, 10 / 17, 17) == [True, True]  # as 120 pictures gave
    assert passed(14 / 17, 9 / 17, 17) == [False, True]
    assert passed(14 / 20, 17 / 20, 20) == [True, False]
    assert checks.falls([0.5, 0.6], 20) and not checks.falls([0.5, 0.65], 20)
    assert not checks.falls([0.5, 0.6], 400)
    assert checks.black_box(0.9, 0.8, "net", "Square", count=20).passed
    assert not checks.black_box(0.9, 0.8, "net", "Square", count=200).passed


def test_a_failed_check_says_so() -> None:
    assert str(Check("randomness", "net", False, "a gap of 1")).startswith("FAILED  randomness")
