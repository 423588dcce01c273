"""Attacks on object detectors, and the figures under them."""

from pathlib import Path

import pytest
import torch
from drawn import CLASSES, boxed
from found import untrained
from torch import Tensor

from rampart.hardening.attack.ladder import in_8_bits
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.pipeline import Variant
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.registry import import_factory
from rampart.hardening.objects import judge as judging
from rampart.hardening.objects.attack import Budget, aims_of, attack, attacks_of, patches, search
from rampart.hardening.objects.boxes import Dense, Found, Truth
from rampart.hardening.objects.detector import ObjectConfig, ObjectDetector, of_factory
from rampart.hardening.objects.guard import Guard
from rampart.hardening.objects.judge import (
    ACCEPTED,
    WORST,
    Judgement,
    accepted,
    figures,
    judge,
    merit,
    own_code,
    table,
    worst,
)
from rampart.hardening.objects.step import step_towards
from rampart.scenes import SceneModel

THREAT = Threat(eps=16 / 255)
SCENES = boxed(6, seed=9)
BUDGET = Budget(steps=8, queries=20)


@pytest.fixture(scope="module")
def judgement(learned_objects: ObjectDetector) -> Judgement:
    return judge(learned_objects, SCENES, THREAT, BUDGET)


def names() -> list[str]:
    return list(attacks_of(untrained(), BUDGET))


@pytest.mark.parametrize("name", names())
def test_attacks_stay_within_the_ball(name: str) -> None:
    net, x = untrained(), to_float(SCENES.image[:2])
    how = attacks_of(net, BUDGET)[name]
    budget, noise = Budget(2, 3), Noise(torch.arange(2))
    out = attack(net, x, SCENES.truth[:2], THREAT, how=how, budget=budget, noise=noise)
    assert out.dtype == torch.float32 and out.shape == x.shape
    assert (out - x).abs().max() <= THREAT.eps + 1e-6
    assert out.min() >= 0 and out.max() <= 1
    assert not (out == x).all()


def test_each_aim_does_what_it_is_called(judgement: Judgement) -> None:
    rows = judgement.rows
    assert rows["clean"].map50 > 0.8
    assert rows["apgd vanish"].kept < 0.2 and rows["apgd vanish"].map50 < 0.2
    assert rows["apgd invert"].map50 < 0.2
    assert rows["apgd fabricate"].false > rows["clean"].false + 0.7
    assert rows["apgd fabricate"].kept > 0.6  # what is there is still found
    assert rows["apgd mislabel"].map50 < 0.6 and rows["apgd mislabel"].false > 0.7
    # Localization moves boxes, so that the figure that wants them exact falls.
    assert rows["apgd localization"].ap < rows["clean"].ap - 0.3
    assert rows[WORST].map50 < 0.2 and judgement.blind == 0


def test_the_worst_case_takes_the_worst_answer_of_each_picture(judgement: Judgement) -> None:
    tries = [found for name, found in judgement.found.items() if name != WORST]
    chosen = worst(SCENES.truth, tries, 2)
    for row, found in enumerate(chosen):
        each = [merit(SCENES.truth[row], one[row], 2) for one in tries]
        assert merit(SCENES.truth[row], found, 2) == min(each)


def test_the_worst_case_is_never_above_an_attack(judgement: Judgement) -> None:
    assert judgement.rows[WORST].map50 <= min(row.map50 for row in judgement.rows.values())


def test_the_graph_that_is_served_gets_rows_of_its_own() -> None:
    net, some, asked = untrained(), SCENES[[1, 2]], []

    def served(image: torch.Tensor) -> list[Found]:
        asked.append(image)
        return [Found(one.boxes, one.labels.float(), one.labels) for one in SCENES[[1, 2]].truth]

    rows = judge(net, some, THREAT, Budget(1), served=served).rows
    assert list(rows)[-2:] == ["clean, as served", "worst case, as served"]
    assert rows["worst case, as served"].map50 == 1 > rows["clean"].map50
    assert len(asked) == len(rows) - 3 and torch.equal(asked[0], some.image)


@pytest.fixture(scope="module")
def model(learned_objects: ObjectDetector) -> SceneModel:
    return SceneModel.calibrate(learned_objects, boxed(80, seed=4).image, guarded=True)


@pytest.fixture(scope="module")
def guard(model: SceneModel) -> Guard:
    return model.guard("lean")


def test_an_attack_that_knows_the_guard_is_flagged_less_and_still_does_harm(
    learned_objects: ObjectDetector, guard: Guard
) -> None:
    rows = judge(learned_objects, SCENES, THREAT, BUDGET, guard=guard).rows
    loud, quiet = rows["apgd fabricate"], rows["unseen fabricate"]
    assert loud.flagged is not None and quiet.flagged is not None
    assert loud.flagged > 0.5 > quiet.flagged
    assert rows[WORST].map50 <= rows[ACCEPTED].map50 < rows["clean"].map50 - 0.3
    assert rows[ACCEPTED].flagged is None and rows[WORST].flagged is None
    assert "flagged" in rows["clean"].as_json(CLASSES)


@pytest.mark.parametrize("name", ["vanish", "fabricate"])
def test_no_picture_that_passes_is_flagged_after_an_attack_that_knows_the_guard(
    name: str, learned_objects: ObjectDetector, guard: Guard
) -> None:
    x, large, how = to_float(SCENES.image), Threat(eps=24 / 255), ("unseen", name)
    noise, budget = Noise(torch.arange(len(x))), Budget(2)
    out = attack(
        learned_objects,
        x,
        SCENES.truth,
        large,
        how=how,
        budget=budget,
        noise=noise,
        guard=guard,
    )
    sent = in_8_bits(out, SCENES.image, large)
    assert not (guard.flags(sent) & ~guard.flags(SCENES.image)).any()
    aim = aims_of(learned_objects)[name]
    gains = [aim(learned_objects, one, SCENES.truth) for one in (to_float(sent), x)]
    assert (gains[0] >= gains[1]).all() and (gains[0] > gains[1]).sum() >= 2


def test_the_step_raises_what_is_expected_and_leads_no_gradient_astray() -> None:
    net, x = untrained(), to_float(SCENES.image[:3])
    x[:, :, :40] = 1
    x.requires_grad_()
    near = step_towards(net, x, 2 / 255)
    assert (near - x).abs().max() <= 2 / 255 + 1e-6 and near.min() >= 0 and near.max() <= 1
    before, after = (net.dense(one).logits.softmax(2)[:, :, 1:].sum((1, 2)) for one in (x, near))
    assert (after > before).all()
    # Where it left [0, 1] too, as in white pixels, a change of the picture is one of what it shows.
    (slope,) = torch.autograd.grad(near.sum(), x)
    assert torch.equal(slope, torch.ones_like(x))


def test_the_answer_to_another_guard_is_attacked_anew(model: SceneModel) -> None:
    guard = model.guard("guarded")
    further = model.pipeline("guarded")
    further.radius = 2 * guard.pipeline.radius
    assert guard.digest() != guard._replace(pipeline=further).digest()
    assert guard.digest() != model.guard("lean").digest()


@pytest.mark.parametrize("variant", ["lean", "guarded"])
def test_what_the_guard_sees_is_what_is_served(variant: Variant, model: SceneModel) -> None:
    guard = model.guard(variant)
    some = boxed(30, seed=5).image
    some[::2] = torch.randint(0, 256, some[::2].shape, dtype=torch.uint8)  # noise
    decisions = [one.decision for one in model.predict(list(some.numpy()), variant=variant)]
    flags = guard.flags(some)
    assert flags.tolist() == [decision == "flag" for decision in decisions]
    assert flags.any() and not flags.all()
    assert torch.equal(guard.margin(to_float(some)) > 0, flags)


def test_flagged_answers_do_no_harm() -> None:
    box, label = torch.tensor([[1.0, 1, 30, 30]]), torch.zeros(1, dtype=torch.int64)
    right, none = Found(box, torch.ones(1), label), Found(box[:0], torch.ones(0), label[:0])
    truth = [Truth(box, label)] * 2
    tries = {"clean": [right, right], "vanish": [none, none]}
    passed = accepted(truth, tries, {"clean": [False, False], "vanish": [True, False]}, 1)
    assert passed is not None and [*passed[1]] == [right, none]
    passed = accepted(truth, tries, {"clean": [True, False], "vanish": [True, True]}, 1)
    assert passed is not None and (passed[0], [*passed[1]]) == (truth[1:], [right])
    assert accepted(truth, tries, {name: [True, True] for name in tries}, 1) is None


@pytest.mark.parametrize("name", patches())
def test_a_patch_changes_one_square_and_does_harm(
    name: str, learned_objects: ObjectDetector
) -> None:
    x, truth = to_float(SCENES.image[1:4]), SCENES.truth[1:4]
    noise = Noise(torch.arange(3))
    out = attack(learned_objects, x, truth, THREAT, how=patches()[name], budget=BUDGET, noise=noise)
    changed = (out != x).any(1)
    for mask in changed:
        rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
        assert rows.max() - rows.min() < 24 and columns.max() - columns.min() < 24
    assert out.min() >= 0 and out.max() <= 1
    gray = torch.where(changed[:, None], torch.tensor(0.5), x)
    loss = [sum(learned_objects.image_losses(one, truth).values()) for one in (x, gray, out)]
    assert (loss[2] > loss[1] + 0.1).all() and (loss[2] > loss[0] + 0.1).all()


def test_an_empty_picture_is_worst_where_most_is_seen() -> None:
    empty = SCENES.truth[0]
    box = torch.tensor([[1.0, 1, 30, 30]])
    none = Found(box[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    some = Found(box, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    assert worst([empty], [[none], [some]], 2) == [some]


def test_figures_stand_in_a_table_and_in_cards(judgement: Judgement) -> None:
    lines = table(judgement.rows, CLASSES)
    assert len(lines) == len(judgement.rows) + 1 and lines[-1].startswith(WORST)
    row = judgement.rows["clean"].as_json(CLASSES)
    assert row["n"] == 6 and set(row["classes"]) == set(CLASSES)
    low, high = row["interval"]
    assert low <= row["map50"] <= high


class Rounding(ObjectDetector):
    """A defence that hides its gradient: pixels are rounded to few levels first."""

    def dense(self, x: Tensor) -> Dense:
        return super().dense((x * 8).round() / 8)

    def image_losses(self, x, truth):
        return super().image_losses((x * 8).round() / 8, truth)


def test_a_hidden_gradient_is_told_and_does_not_stop_the_search(
    learned_objects: ObjectDetector,
) -> None:
    net = Rounding(learned_objects.config).eval().requires_grad_(False)
    net.load_state_dict(learned_objects.state_dict())
    some, large = SCENES[[1, 2, 3]], Threat(eps=40 / 255)
    found = judge(net, some, large, Budget(2, 50))
    assert found.blind == len(some)
    assert found.rows["random search"].ap < found.rows["apgd sum"].ap - 0.1
    # What is crafted on the network without it goes through as well.
    passed = judge(net, some, large, Budget(4), source=learned_objects)
    assert passed.rows[WORST].map50 < found.rows["apgd sum"].map50 - 0.3


def test_a_judgement_goes_on_with_what_it_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, budget, told = untrained(), Budget(1), []
    first = judge(net, SCENES[[1, 2]], THREAT, budget, cache=tmp_path)
    monkeypatch.setattr(judging, "attack", lambda *_, **__: pytest.fail("it attacks anew"))
    again = judge(
        net,
        SCENES[[1, 2]],
        THREAT,
        budget,
        cache=tmp_path,
        notice=lambda name, row: told.append(name),
    )
    assert told == list(first.rows)
    for name, row in first.rows.items():
        assert again.rows[name].as_json(CLASSES) == row.as_json(CLASSES)


def test_a_search_that_is_added_repeats_no_attack_by_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, some, made = untrained(), SCENES[[1]], []
    judge(net, some, THREAT, Budget(1), cache=tmp_path)

    def noted(*args, how, **more):
        made.append(how[0])
        return attack(*args, how=how, **more)

    monkeypatch.setattr(judging, "attack", noted)
    judge(net, some, THREAT, Budget(1, 2), cache=tmp_path)
    assert made == ["search"]
    judge(net, some, THREAT, Budget(2, 2), cache=tmp_path)
    assert len(made) > 1 and "search" not in made[1:]


def test_what_other_code_of_a_network_of_yours_left_is_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import owned

    file = tmp_path / "yours.py"
    file.write_text(Path(owned.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    codes = set()
    for factory in ("yours:Whole", "yours:ssd"):  # parts that are yours, and torchvision's
        import_factory(factory)
        net = of_factory(factory, CLASSES, 128)
        before = own_code(net)
        assert before == own_code(net)
        file.write_text(file.read_text() + "# changed\n")
        codes |= {before, own_code(net)}
    assert len(codes) == 3 and own_code(untrained()) not in codes


def test_a_detector_of_one_class_cannot_be_mislabelled() -> None:
    one = ObjectDetector(ObjectConfig("ssdlite", ("cell",), 128))
    assert "apgd mislabel" not in attacks_of(one, BUDGET)
    assert "apgd vanish" in attacks_of(one, BUDGET)


def test_the_random_search_is_of_linf_alone() -> None:
    with pytest.raises(ValueError, match="Linf alone"):
        x, noise, large = to_float(SCENES.image[:1]), Noise(torch.arange(1)), Threat("L2", 1.0)
        how = ("search", "sum")
        attack(untrained(), x, SCENES.truth[:1], large, how=how, budget=BUDGET, noise=noise)


def test_the_random_search_reaches_every_corner() -> None:
    x, noise = torch.full((4, 1, 4, 4), 0.5), Noise(torch.arange(4))

    def bright(near: Tensor) -> Tensor:
        return (near[..., 0, 0] + near[..., -1, -1]).sum(1)

    out = search(bright, x, THREAT, queries=400, noise=noise)
    assert torch.allclose(bright(out), bright(x + THREAT.eps))


def test_nothing_found_is_nothing_kept() -> None:
    none = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    row = figures(SCENES.truth, [none] * 6, 2)
    assert (row.map50, row.kept, row.false) == (0, 0, 0)
