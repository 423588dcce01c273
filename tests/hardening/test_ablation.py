from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from in_torch import InTorch
from torch import Tensor

from rampart.hardening.attack.ladder import Budget
from rampart.hardening.attack.objectives import View
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge import ablation
from rampart.hardening.judge.ablation import Outcome
from rampart.hardening.judge.checks import Check
from rampart.hardening.judge.evaluate import Attempt
from rampart.hardening.model.card import Figure
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float

THREAT = Threat("Linf", 8 / 255)
BUDGET = Budget(steps=3, targets=1, queries=10, standard=False)


@pytest.fixture(scope="module")
def labelled(tiny_images: Images, tiny_pipeline: DefendedClassifier) -> Images:
    """Eight images under the classifier's own labels, so that there is something to lose."""
    few = tiny_images[slice(8)]
    label = tiny_pipeline.classifier(to_float(few.image)).argmax(1)
    return Images(few.image, label, few.classes)


@pytest.fixture(scope="module")
def outcomes(
    tiny_pipeline: DefendedClassifier,
    tiny_images: Images,
    labelled: Images,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("ablation")
    arm = partial(ablation.arm, tiny_pipeline, held=tiny_images, to_engine=InTorch)
    arm = partial(arm, device=torch.device("cpu"))
    chosen = ablation.chosen(tiny_pipeline, NAMES, test=False)
    return ablation.ablate(
        [arm(setup) for setup in chosen], labelled, THREAT, BUDGET, folder=folder / "found"
    )


NAMES = ("classifier", "+ confidence", "lean", "+ purifier", "full")


def test_every_part_stands_alone_and_detectors_of_two_views_behind_the_purifier(
    tiny_pipeline: DefendedClassifier,
) -> None:
    setups = {setup.name: setup for setup in ablation.setups(tiny_pipeline)}
    assert next(iter(setups)) == "classifier"
    assert {"+ confidence", "+ median", "+ feature_distance", "+ purifier"} < set(setups)
    assert setups["+ purifier + disagreement"].purified
    assert not setups["+ energy"].purified
    assert setups["full"].detectors == tiny_pipeline.detectors.names
    assert "consistency" in setups["guarded"].detectors and not setups["guarded"].purified
    without = DefendedClassifier(tiny_pipeline.classifier, None, ("energy",))
    assert not any(setup.purified for setup in ablation.setups(without))


def test_the_rows_that_are_asked_for_stand_beside_the_baselines(
    tiny_pipeline: DefendedClassifier,
) -> None:
    def names(*only: str, test: bool = False) -> list[str]:
        return [setup.name for setup in ablation.chosen(tiny_pipeline, only, test=test)]

    assert names("+ median") == ["classifier", "+ median", "+ confidence"]
    assert names(test=True) == ["classifier", "+ confidence", "lean", "full"]
    assert names("guarded") == ["classifier", "+ confidence", "guarded"]
    every = ablation.chosen(tiny_pipeline, (), test=True, guarded=True)
    assert [setup.name for setup in every][2:4] == ["lean", "guarded"]
    every = [setup.name for setup in ablation.setups(tiny_pipeline)]
    assert names() == [name for name in every if name != "guarded"]
    with pytest.raises(ValueError, match="no row median: choose among classifier, "):
        names("median")


def test_rejecting_more_never_loses_an_image(outcomes: list[Outcome]) -> None:
    for seen in outcomes:
        held = [seen.safe(rate) for rate in ablation.RATES]
        assert (held[0] >= np.isinf(seen.least)).all()
        for less, more in pairwise(held):
            assert (more >= less).all()


def test_what_never_rejects_is_safe_only_where_no_answer_was_wrong(
    outcomes: list[Outcome],
) -> None:
    bare = outcomes[0]
    assert bare.attacked.calibration is None
    for rate in ablation.RATES:
        np.testing.assert_array_equal(bare.safe(rate), np.isinf(bare.least))
        assert bare.passes(rate, bare.suspicion).all()


def test_the_attack_finds_wrong_answers_and_accepted_ones(outcomes: list[Outcome]) -> None:
    for seen in outcomes:
        assert seen.right.mean() > np.isinf(seen.least).mean()
        # Blobs are so alike that detectors of pixels and of features see three steps.
        assert seen.safe(0.02).all() == (seen.attacked.setup.name in ("lean", "full"))


def test_an_image_found_against_one_setup_counts_against_those_of_the_same_label(
    outcomes: list[Outcome],
) -> None:
    bare, confident = outcomes[0], outcomes[1]
    np.testing.assert_array_equal(np.isinf(bare.least), np.isinf(confident.least))


def test_a_wrong_clean_answer_is_already_a_win(outcomes: list[Outcome], labelled: Images) -> None:
    other = Images(labelled.image, (labelled.label + 1) % 10, labelled.classes)
    seen = ablation.outcome(outcomes[1].attacked, [], other, THREAT)
    assert not seen.right.any()
    np.testing.assert_allclose(seen.least, seen.suspicion, rtol=1e-4, atol=1e-5)


def test_rows_say_what_rejection_costs_and_adds(outcomes: list[Outcome]) -> None:
    rows = {row["name"]: row for row in ablation.rows(outcomes)}
    assert set(rows) == set(NAMES)
    assert "at" not in rows["classifier"]
    assert all(row["milliseconds"] > 0 for row in rows.values())
    for name in ("+ confidence", "lean", "full"):
        assert [point["rate"] for point in rows[name]["at"]] == list(ablation.RATES)
        for point in rows[name]["at"]:
            held = point["robust_with_rejection"]["value"]
            gain = held - rows["classifier"]["robust"]["value"]
            assert point["gain"]["value"] == pytest.approx(gain, abs=2e-4)
            rejected = round(point["clean_rejection"]["value"] * len(outcomes[0].right))
            over = held - outcomes[1].safe_with(rejected).mean()
            assert point["gain_over_max_softmax"]["value"] == pytest.approx(over, abs=2e-4)
            seen = next(seen for seen in outcomes if seen.attacked.setup.name == name)
            clean = seen.right & seen.passes(point["rate"], seen.suspicion)
            kept = (clean & seen.safe(point["rate"])).mean()
            assert point["kept"]["value"] == pytest.approx(kept, abs=1e-4)
    for point in rows["+ confidence"]["at"]:
        assert point["gain_over_max_softmax"]["value"] <= 0  # beside itself at its strictest
    head, body = ablation.table(list(rows.values()))
    assert [cells[0] for cells in body] == list(NAMES)
    assert {len(cells) for cells in body} == {len(head)}
    head, body = ablation.curve_table(list(rows.values()))
    assert [cells[0] for cells in body[:: len(ablation.RATES)]] == ["+ confidence", "lean", "full"]
    assert [cells[1] for cells in body[:4]] == ["0.5%", "1.0%", "2.0%", "5.0%"]
    assert {len(cells) for cells in body} == {len(head)}


def test_as_many_clean_images_are_rejected_as_it_is_told(outcomes: list[Outcome]) -> None:
    plain = outcomes[1]
    held = [plain.safe_with(rejected) for rejected in range(len(plain.right))]
    assert [int(safe.sum()) for safe in held] == sorted(int(safe.sum()) for safe in held)
    for rejected, safe in enumerate(held):
        bar = np.sort(plain.suspicion)[::-1][rejected]
        assert (plain.suspicion > bar).sum() <= rejected
        np.testing.assert_array_equal(safe, np.isinf(plain.least) | (plain.least > bar))


def test_a_card_lists_what_the_variants_add_at_two_and_five_per_cent(
    outcomes: list[Outcome],
) -> None:
    entry = ablation.entry(outcomes, THREAT, BUDGET, 10, data="40 images", command="ablate")
    figures = [Figure.of(row) for row in ablation.gains(entry)]
    rows = {row["name"]: row for row in entry["rows"]}
    names = ("gain_over_classifier", "gain_over_max_softmax")
    assert [(figure.subject.variant, figure.name) for figure in figures] == [
        (variant, f"{name}@{rate}%")
        for variant in ("lean", "full")
        for rate in (2, 5)
        for name in names
    ]
    (point,) = (p for p in rows["full"]["at"] if p["rate"] == 0.05)
    assert figures[-2].value == point["gain"]["value"]
    assert list(figures[-1].interval) == point["gain_over_max_softmax"]["interval"]
    assert figures[0].threat == str(THREAT) and figures[0].n == len(outcomes[0].right)


@pytest.mark.parametrize(
    ("more", "chosen"),
    [
        ({"full": 12}, "full"),
        ({"full": 1}, "lean"),
        ({"full": 0}, "lean"),
        ({"full": -3}, "lean"),
        ({}, "lean"),
        ({"guarded": 12}, "guarded"),
        ({"guarded": 1}, "lean"),
        ({"guarded": 12, "full": 13}, "guarded"),
        ({"guarded": 8, "full": 20}, "full"),
    ],
)
def test_what_costs_more_is_the_default_only_where_it_holds_more_beyond_chance(
    outcomes: list[Outcome], more: dict[str, int], chosen: str
) -> None:
    def of(name: str, held: int) -> Outcome:
        attacked = outcomes[0].attacked._replace(setup=ablation.Setup(name))
        least = np.where(np.arange(40) < held, np.inf, 0.0)
        return outcomes[0]._replace(least=least, attacked=attacked)

    row = ablation.default([of("lean", 20), *(of(name, 20 + n) for name, n in more.items())])
    assert row["variant"] == chosen
    assert all(name in row["why"] for name in more)


def test_detectors_of_the_variants_alone_are_checked_and_the_card_says_so(
    outcomes: list[Outcome],
) -> None:
    checked = {seen.attacked.setup.name: [c.name for c in seen.checks] for seen in outcomes}
    names = ["zero_detector_gradients", "detector_slope", "black_box", "smoothed_gradients"]
    assert checked == {name: [] for name in NAMES} | {"lean": names, "full": names}
    entry = ablation.entry(outcomes, THREAT, BUDGET, 10, data="8 images", command="ablate")
    assert {check["subject"] for check in entry["checks"]} == {"lean, detectors", "full, detectors"}
    shown = [Check(**check) for check in entry["checks"]]
    assert shown == [check for seen in outcomes for check in seen.checks]


def test_detectors_without_gradients_fail_their_self_check(
    outcomes: list[Outcome], labelled: Images
) -> None:
    full = outcomes[-1].attacked
    victim = full.victims[ablation.AIMS.index(ablation.DECIDING)]

    def masked(x: Tensor) -> View:
        seen = victim.look(x)
        assert seen.margin is not None
        return seen._replace(margin=seen.margin.round().detach())

    blind = victim._replace(look=masked)
    broken = full._replace(victims=[blind] * len(full.victims))
    rungs = ablation.ladder([broken], THREAT, BUDGET, 10)
    attempts = [Attempt(rung, to_float(labelled.image)) for rung in rungs]
    found = ablation.self_checks(broken, attempts, labelled, THREAT)
    failed = [check.name for check in found if not check.passed]
    assert {"zero_detector_gradients", "detector_slope"} <= set(failed)


def test_a_variant_whose_self_checks_failed_is_never_the_default(outcomes: list[Outcome]) -> None:
    def of(name: str, held: int, *, passed: bool = True) -> Outcome:
        attacked = outcomes[0].attacked._replace(setup=ablation.Setup(name))
        least = np.where(np.arange(40) < held, np.inf, 0.0)
        checks = (Check("black_box", name, passed, ""),)
        return outcomes[0]._replace(least=least, attacked=attacked, checks=checks)

    row = ablation.default([of("lean", 10), of("guarded", 40, passed=False)])
    assert row["variant"] == "lean" and "guarded failed a self-check" in row["why"]
    row = ablation.default([of("lean", 10), of("guarded", 40, passed=False), of("full", 30)])
    assert row["variant"] == "full"


def test_the_picture_is_drawn(outcomes: list[Outcome], tmp_path: Path) -> None:
    from rampart.hardening.report import plots

    file = plots.ablation(ablation.rows(outcomes), tmp_path / "ablation.png")
    assert file.read_bytes().startswith(b"\x89PNG")
