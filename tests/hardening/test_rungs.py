from collections.abc import Callable
from functools import partial

import pytest
import torch
from blobs import Learned
from torch import Tensor

from rampart.handlers.verdict import Calibration
from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import View, look_at
from rampart.hardening.attack.pgd import Start, Threat
from rampart.hardening.model.detectors import margin, step_against
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier

SMALL = rungs.Budget(steps=10, targets=3, queries=50, standard=False)


def guarded(learned: Learned) -> Callable[[Tensor], View]:
    """The learned network with a detector of bright images."""
    level = float(learned.x.mean(dim=(1, 2, 3)).quantile(0.25))
    return lambda x: View(learned.model(x), x.mean(dim=(1, 2, 3)) - level)


@pytest.mark.parametrize("name", ["pgd20", "autoattack", "joint_apgd", "forced_rejection"])
def test_every_rung_stays_in_the_ball_and_in_range(name: str, learned: Learned) -> None:
    look, x, threat = guarded(learned), learned.x, learned.threat
    budget = () if name == "pgd20" else (SMALL,)
    found = getattr(rungs, name)(look, x, learned.label, threat, *budget)
    assert found.shape == x.shape
    assert float((found - x).abs().max()) <= threat.eps + 1e-6
    assert float((found - x).abs().max()) > threat.eps / 2
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_targeted_attack_reaches_its_targets_within_the_ball(learned: Learned) -> None:
    look, x, label = guarded(learned), learned.x, learned.label
    target, threat = (label + 1) % 10, Threat("Linf", 3 * learned.threat.eps)
    found = rungs.targeted_apgd(look, x, label, target, threat, steps=20)
    assert float((found - x).abs().max()) <= threat.eps + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    view = look(found)
    assert view.margin is not None
    reached = (view.logits.argmax(1) == target) & (view.margin <= 0)
    untargeted = rungs.joint_apgd(look, x, label, threat, SMALL)
    by_chance = look(untargeted).logits.argmax(1) == target
    assert reached.float().mean() > 0.7 > by_chance.float().mean()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_images_that_are_wrong_already_leave_nothing_to_attack(norm: str, learned: Learned) -> None:
    wrong = (learned.label + 1) % 10
    found = rungs.joint_apgd(learned.look, learned.x, wrong, Threat(norm, 0.01), SMALL)
    assert (learned.model(found).argmax(1) != wrong).all()


def test_autoattack_finds_what_pgd_finds_and_more(learned: Learned) -> None:
    robust = {}
    for name, budget in (("pgd20", ()), ("autoattack", (SMALL,))):
        found = getattr(rungs, name)(
            learned.look, learned.x, learned.label, learned.threat, *budget
        )
        robust[name] = float((learned.model(found).argmax(1) == learned.label).float().mean())
    assert robust["autoattack"] <= robust["pgd20"] < 0.6


@pytest.mark.parametrize("classes", [2, 3, 4, 6, 9])
def test_autoattack_is_called_standard_only_where_that_version_runs(classes: int) -> None:
    (attack,) = (one for one in rungs.RUNGS if one.name == "autoattack")
    few, many = (rungs.Budget(steps=steps) for steps in (5, 100))
    assert attack.effort(few, classes).endswith("FAB-T + Square, 5 steps, 9 targets, 5000 queries")
    assert attack.effort(many, classes) != attack.effort(few, classes)
    assert {attack.effort(budget, 10) for budget in (few, many)} == {"AutoAttack, standard"}


def test_the_joint_attack_gets_past_detectors_that_stop_an_attack_on_the_label(
    learned: Learned,
) -> None:
    look, label = guarded(learned), learned.label

    def beaten(x: Tensor) -> int:
        seen = look(x)
        assert seen.margin is not None
        return int(((seen.logits.argmax(1) != label) & (seen.margin <= 0)).sum())

    static = beaten(rungs.pgd20(look, learned.x, label, learned.threat))
    joint = beaten(rungs.joint_apgd(look, learned.x, label, learned.threat, SMALL))
    assert joint > static + 3


def consistent(learned: Learned) -> Callable[[Tensor], View]:
    """The learned network behind the detector consistency, at a strict threshold."""
    radius = torch.tensor(learned.threat.eps / 2)

    def probe(x: Tensor, label: Tensor, share: float, steps: int) -> Tensor:
        near = x
        for _ in range(steps):
            near = step_against(learned.model, near, share * radius / steps, label)
        return margin(learned.model(near), label)

    clean = probe(learned.x, learned.label, 1.0, 1)
    least = float(clean.quantile(0.3))

    def look(x: Tensor) -> View:
        logits = learned.model(x)
        left = probe(x, logits.detach().argmax(1), 1.0, 1)
        return View(logits, least - left, partial(probe, x))

    return look


def test_an_attack_that_asks_as_consistency_does_gets_past_it(learned: Learned) -> None:
    look, x, label = consistent(learned), learned.x, learned.label
    threat = learned.threat._replace(eps=2 * learned.threat.eps)

    def beaten(found: Tensor) -> int:
        assert float((found - x).abs().max()) <= threat.eps + 1e-6
        seen = look(found)
        assert seen.margin is not None
        return int(((seen.logits.argmax(1) != label) & (seen.margin <= 0)).sum())

    static = beaten(rungs.pgd20(look, x, label, threat))
    blind = beaten(
        rungs.joint_apgd(lambda x: look(x)._replace(probe=None), x, label, threat, SMALL)
    )
    joint = beaten(rungs.joint_apgd(look, x, label, threat, SMALL))
    assert joint >= blind > static


def test_where_no_label_can_be_moved_no_layer_is_given_a_batch_of_none(learned: Learned) -> None:
    x, label, threat = learned.x, learned.label, learned.threat._replace(eps=1e-6)

    def look(x: Tensor) -> View:
        assert len(x)
        return learned.look(x)

    found = rungs.joint_apgd(look, x, label, threat, SMALL, labels=look)
    assert float((found - x).abs().max()) <= 1e-6 + 1e-7


def test_what_begins_with_the_label_alone_finds_as_much(learned: Learned) -> None:
    look, x, label, threat = guarded(learned), learned.x, learned.label, learned.threat

    def beaten(found: Tensor) -> int:
        seen = look(found)
        assert seen.margin is not None
        return int(((seen.logits.argmax(1) != label) & (seen.margin <= 0)).sum())

    whole = beaten(rungs.joint_apgd(look, x, label, threat, SMALL))
    begun = beaten(rungs.joint_apgd(look, x, label, threat, SMALL, labels=learned.look))
    assert begun >= whole > 0


def test_no_attack_begins_where_another_began(
    learned: Learned, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def noted(index: Tensor, *, seed: int = 0) -> Noise:
        seeds.append(seed)
        return Noise(index, seed=seed)

    monkeypatch.setattr(rungs, "Noise", noted)
    x, label, threat, look = learned.x, learned.label, learned.threat, guarded(learned)
    rungs.pgd20(look, x, label, threat)
    rungs.joint_apgd(look, x, label, threat, SMALL, labels=learned.look)
    rungs.forced_rejection(look, x, label, threat, SMALL)
    rungs.targeted_apgd(look, x, label, (label + 1) % 10, threat, steps=2)
    pilots = [seed for seed in seeds if seed == Start.PILOT]
    assert len(pilots) == len(rungs.WEIGHTS)  # which are compared from one start
    others = [seed for seed in seeds if seed != Start.PILOT]
    assert len(others) > 20 and len(set(others)) == len(others)


def test_what_came_closest_is_kept_where_nothing_wins(learned: Learned) -> None:
    x, label = learned.x[:6], learned.label[:6]
    few = learned.threat._replace(eps=1 / 255)
    found = rungs.joint_apgd(learned.look, x, label, few, SMALL)
    loss = torch.nn.functional.cross_entropy
    before = loss(learned.model(x), label, reduction="none")
    assert (loss(learned.model(found), label, reduction="none") > before).all()


def test_forced_rejection_makes_accepted_images_suspicious(learned: Learned) -> None:
    look = guarded(learned)
    before = look(learned.x).margin
    found = rungs.forced_rejection(look, learned.x, learned.label, learned.threat, SMALL)
    after = look(found).margin
    assert before is not None
    assert after is not None
    assert (before <= 0).any()
    assert (after[before <= 0] > before[before <= 0]).all()
    assert int((after > 0).sum()) > int((before > 0).sum())


def test_two_classes_are_enough_for_every_rung(learned: Learned) -> None:
    def look(x: Tensor) -> View:
        return View(learned.model(x)[:, :2])

    x = learned.x[:4]
    label = look(x).logits.argmax(1)
    threat = learned.threat._replace(eps=0.3)
    for attack in (rungs.autoattack, rungs.joint_apgd):
        found = attack(look, x, label, threat, SMALL)
        assert (look(found).logits.argmax(1) != label).all()


def test_rounding_to_8_bits_never_leaves_an_linf_ball(tiny_images: Images) -> None:
    image = tiny_images.image[:8]
    threat = Threat("Linf", 2.6 / 255)
    x = (image.permute(0, 3, 1, 2) / 255 + threat.eps).clamp(0, 1)
    pixels = rungs.in_8_bits(x, image, threat)
    assert int((pixels.int() - image.int()).abs().max()) == 2


def test_fool_changes_the_label_within_eps(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, tiny_calibration: Calibration
) -> None:
    image = tiny_images.image[:8]
    look = look_at(tiny_pipeline, tiny_calibration, 0.01)
    attacked = rungs.fool(look, image, Threat(), SMALL)
    assert attacked.dtype == torch.uint8
    assert int((attacked.int() - image.int()).abs().max()) <= 8
    with torch.no_grad():
        changed = tiny_pipeline(attacked).logits.argmax(1) != tiny_pipeline(image).logits.argmax(1)
    # An untrained network has no defence: nearly all labels must fall.
    assert changed.float().mean() > 0.7
