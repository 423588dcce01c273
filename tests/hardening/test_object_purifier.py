"""A purifier in front of an object detector: its training, what is served behind it, attacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import boxed, write_voc
from found import untrained
from torch import nn

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import checkpoint
from rampart.hardening.model.pipeline import load_purifier
from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.purifier import BlockPurifier, BlockPurifierConfig
from rampart.hardening.objects import defended
from rampart.hardening.objects.attack import Budget, losses_together
from rampart.hardening.objects.defended import RADIUS, VARIANTS, as_variant, variants_of
from rampart.hardening.objects.detector import ObjectDetector, load
from rampart.hardening.objects.judge import judge
from rampart.hardening.objects.purifier import ScenePurifierTrainer, train_scene_purifier
from rampart.hardening.objects.scenes import SceneBatch, divided
from rampart.hardening.objects.suspicions import FULL, LEAN
from rampart.hardening.train.purifier import PurifierRecipe
from rampart.scenes import SceneModel

SMALL = BlockPurifierConfig(width=8, blocks=1)
SCENES = boxed(4, seed=3)
X = to_float(SCENES.image)


def darkening(by: float = 0.1) -> BlockPurifier:
    """A purifier that takes the same from every pixel, and a little more by what is there."""
    purifier = BlockPurifier(SMALL)
    last = purifier.residual[-2]
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(last.bias, -by)
    return purifier.eval().requires_grad_(False)


def full(detector: ObjectDetector) -> defended.DefendedDetector:
    return as_variant(detector, "full", variants_of(detector)["full"], RADIUS)


def test_all_that_attacks_climb_goes_through_the_purifier() -> None:
    torch.manual_seed(0)
    net, purifier, x = untrained(), darkening(), X.clone().requires_grad_()
    both = net.behind(purifier)
    assert net.purifier is None
    losses = losses_together(both, x, SCENES.truth)
    seen = purifier(X)
    assert torch.equal(losses, losses_together(net, seen, SCENES.truth))
    assert torch.equal(both.dense(X).logits, net.dense(seen).logits)
    (slope,) = torch.autograd.grad(losses.sum(), x)
    behind = seen.clone().requires_grad_()
    (own,) = torch.autograd.grad(losses_together(net, behind, SCENES.truth).sum(), behind)
    moved = X.clone().requires_grad_()
    (chained,) = torch.autograd.grad(purifier(moved), moved, own)
    torch.testing.assert_close(slope, chained)
    assert not torch.equal(slope, own)


def test_full_serves_the_purified_view_and_scores_how_both_views_differ(
    learned_objects: ObjectDetector,
) -> None:
    torch.manual_seed(0)
    both = learned_objects.behind(darkening(0.3))
    out, bare = full(both).defend(X), full(learned_objects).defend(X)
    names = variants_of(both)["full"]
    assert names == (*FULL, "purification", "purified")
    scores = dict(zip(names, out.scores.T, strict=True))
    assert both.purifier is not None
    seen = learned_objects.candidates(both.purifier(X))
    torch.testing.assert_close(out.confidences, seen.scores)
    torch.testing.assert_close(out.boxes, seen.boxes)
    assert not torch.allclose(out.confidences, bare.confidences, atol=0.01)
    change = (both.purifier(X) - X).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(scores["purification"], change, rtol=1e-3, atol=1e-4)
    gap = (seen.scores - bare.confidences).abs().sum(1)
    torch.testing.assert_close(scores["purified"], gap / (seen.scores + bare.confidences).sum(1))
    # Smoothing is held against the picture as sent.
    torch.testing.assert_close(scores["disagreement"], bare.scores[:, FULL.index("disagreement")])


def test_a_purifier_that_does_nothing_changes_no_box_and_raises_no_score(
    learned_objects: ObjectDetector,
) -> None:
    out = full(learned_objects.behind(BlockPurifier(SMALL))).defend(X)
    bare = full(learned_objects).defend(X)
    for mine, other in zip(out[:3], bare[:3], strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(out.scores[:, :4], bare.scores)
    assert out.scores[:, 4:].abs().max() < 1e-4


def test_every_score_of_both_views_has_a_gradient(learned_objects: ObjectDetector) -> None:
    torch.manual_seed(0)
    x = X[1:3].clone().requires_grad_()
    for score in full(learned_objects.behind(darkening())).defend(x).scores.T:
        (slope,) = torch.autograd.grad(score.sum(), x, retain_graph=True)
        assert slope.isfinite().all() and (slope.flatten(1).abs().sum(1) > 0).all()


def test_a_file_has_the_purifier_for_full_alone(
    tmp_path: Path, learned_objects: ObjectDetector
) -> None:
    torch.manual_seed(0)
    both, file = learned_objects.behind(darkening()), tmp_path / "weights.safetensors"
    defended.save(file, both)
    again, _ = defended.load(file, "full")
    lean, _ = defended.load(file, "lean")
    for mine, other in zip(again.defend(X), full(both).defend(X), strict=True):
        assert torch.equal(mine, other)
    assert lean.detector.purifier is None and lean.detectors.names == LEAN
    alone = load(file)  # what goes on with training has none
    assert alone.purifier is None and torch.equal(
        alone.dense(X).logits, lean.detector.raw(X).logits
    )
    assert checkpoint.digest(alone) == checkpoint.digest(learned_objects) != checkpoint.digest(both)


def test_a_file_without_a_purifier_is_what_it_was(
    tmp_path: Path, learned_objects: ObjectDetector
) -> None:
    file = tmp_path / "weights.safetensors"
    defended.save(file, learned_objects)
    config, state = checkpoint.read(file)
    assert "purifier" not in config and all(name.startswith("net.") for name in state)
    assert config["variants"] == {name: list(parts) for name, parts in VARIANTS.items()}
    pipeline, _ = defended.load(file)
    assert pipeline.detectors.names == FULL and pipeline.defend(X).scores.shape == (4, 4)


def test_attacks_on_full_know_its_purifier_and_its_scores(learned_objects: ObjectDetector) -> None:
    torch.manual_seed(0)
    both = learned_objects.behind(darkening())
    model = SceneModel.calibrate(both, boxed(80, seed=4).image)
    assert model.pipeline("lean").detector.purifier is None
    guard, served = model.guard("full"), model.pipeline("full").detector
    rows = judge(served, SCENES, Threat(eps=16 / 255), Budget(2), guard=guard).rows
    assert rows["clean"].flagged is not None and "unseen sum" in rows
    assert rows["worst case"].map50 < rows["clean"].map50 - 0.3


def recipe(**changes: Any) -> PurifierRecipe:
    usual = PurifierRecipe(Threat(eps=4 / 255), batch_size=4, lr=3e-3, augment=("flip",))
    return usual._replace(**changes)


def batch() -> SceneBatch:
    """The same one, with the same noise to come."""
    return SceneBatch(X, list(SCENES.truth), Noise(torch.arange(4)))


def test_training_climbs_and_descends_the_losses_of_the_detector(tmp_path: Path) -> None:
    net = untrained()
    before = checkpoint.digest(net)
    trainer = ScenePurifierTrainer(net, SMALL, recipe(replays=8), tmp_path)
    attacked = trainer.craft(batch())
    same = (attacked == X).flatten(1).all(1)
    assert same.tolist() == [True, False, False, False]
    assert (attacked - X).abs().max() <= 4 / 255 + 1e-6
    lost = trainer.loss(batch())
    assert (lost(attacked)[1:] > lost(X)[1:]).all()
    first = float(trainer.descend(batch(), attacked))
    for _ in range(12):
        last = float(trainer.descend(batch(), attacked))
    assert last < 0.97 * first
    assert checkpoint.digest(net) == before


def test_a_static_recipe_attacks_the_detector_alone(tmp_path: Path) -> None:
    for static in (True, False):
        trainer = ScenePurifierTrainer(untrained(), SMALL, recipe(static=static), tmp_path)
        before = trainer.craft(batch())
        nn.init.normal_(trainer.model.residual[-2].weight, std=0.3)
        assert torch.equal(trainer.craft(batch()), before) is static


def test_a_run_that_was_cut_ends_as_one_that_was_not_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, held = divided(write_voc(tmp_path / "voc", 12)), boxed(2, seed=1)
    short = recipe(epochs=2, replays=2)

    def learn(name: str, net: ObjectDetector) -> Path:
        return train_scene_purifier(net, SMALL, short, tmp_path / name, (data.train, held))

    whole = learn("whole", untrained())
    with monkeypatch.context() as patch:
        ended = ScenePurifierTrainer.step
        steps = iter(range(3))

        def step(self: ScenePurifierTrainer, *what: Any) -> torch.Tensor:
            value = ended(self, *what)
            self.run.stop.asked = next(steps) == 1
            return value

        patch.setattr(ScenePurifierTrainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            learn("cut", untrained())
    again = learn("cut", untrained())
    one, other = (checkpoint.read(file) for file in (whole, again))
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    config = one[0]
    assert config["purifier"]["kind"] == "blocks" and "task" not in config
    assert config["training"].startswith("PurifierRecipe(")
    assert config["history"][0][0].keys() >= {"loss", "clean", "pgd10"}
    assert (tmp_path / "whole" / "curve.png").is_file()
    assert not torch.equal(load_purifier(whole)(X), X)
    with pytest.raises(ValueError, match="other settings"):
        other_net = untrained()
        nn.init.normal_(next(other_net.parameters()))
        learn("cut", other_net)


def test_a_jitter_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose among flip"):
        ScenePurifierTrainer(untrained(), SMALL, recipe(augment=("warp",)), tmp_path)
