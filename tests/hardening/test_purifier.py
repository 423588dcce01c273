from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import blobs
from torch import nn

from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import load_purifier
from rampart.hardening.model.purifier import (
    BlockPurifier,
    BlockPurifierConfig,
    Purifier,
    PurifierConfig,
    build,
    described,
    of_config,
)
from rampart.hardening.train import state as states
from rampart.hardening.train.data import Batch
from rampart.hardening.train.loop import Precision, Recipe, augmentations_of
from rampart.hardening.train.purifier import (
    Critic,
    PurifierRecipe,
    PurifierTrainer,
    train_purifier,
)

pytestmark = pytest.mark.training

SMALL = BlockPurifierConfig(width=8, blocks=1)
KINDS = pytest.mark.parametrize("config", [SMALL, PurifierConfig(width=8, depth=1)])


def last(purifier: Purifier) -> nn.Conv2d:
    """The layer whose weights are zero before training."""
    layer = purifier.residual[-2]
    assert isinstance(layer, nn.Conv2d)
    return layer


@KINDS
def test_an_untrained_purifier_is_the_identity(config: Any) -> None:
    x = torch.rand(3, 3, 34, 30)
    assert torch.equal(of_config(config)(x), x)


def test_blocks_keep_the_scale_that_plain_layers_fade() -> None:
    x, scales = torch.randn(4, 3, 32, 32), list[float]()
    for kind in (BlockPurifier, Purifier):
        torch.manual_seed(0)
        inner = nn.Sequential(*list(kind(kind.Config(width=48)).residual)[:-2])
        scales.append(float(inner(x).detach().square().mean().sqrt()))
    assert scales[0] > 0.5 and scales[1] < 0.2


def test_a_file_that_names_no_kind_holds_plain_layers_and_a_new_one_names_its_own() -> None:
    assert type(build({"width": 8, "depth": 1})) is Purifier
    entries = described(BlockPurifier(SMALL))
    assert entries == {"kind": "blocks", "width": 8, "blocks": 1}
    assert type(build(entries)) is BlockPurifier


@KINDS
def test_the_purified_view_of_one_image_ignores_its_neighbours(config: Any) -> None:
    torch.manual_seed(0)
    purifier = of_config(config).train()
    nn.init.normal_(last(purifier).weight, std=0.1)
    x = torch.rand(5, 3, 16, 16)
    assert not torch.equal(purifier(x), x)
    torch.testing.assert_close(purifier(x)[2:3], purifier(x[2:3]))


def test_purified_pixels_stay_in_range() -> None:
    purifier = BlockPurifier(SMALL)
    nn.init.constant_(last(purifier).get_parameter("bias"), 3.0)
    assert purifier(torch.rand(2, 3, 8, 8)).max() == 1


def test_the_critic_scores_patches() -> None:
    assert Critic(8)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_helps_against_the_attack_it_sees_and_leaves_the_classifier_alone(
    precision: Precision, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    recipe = PurifierRecipe(Threat("Linf", 2 / 255), epochs=3, batch_size=32, ema=0.5)
    recipe = recipe._replace(precision=precision)
    images = blobs(256, size=16), blobs(64, size=16, seed=1)
    best = train_purifier(classifier, SMALL, recipe, tmp_path, images)
    state = states.read(tmp_path)
    assert state is not None
    losses = [row["loss"] for row in state["history"]]
    assert losses[-1] < losses[0]
    other = Classifier(classifier.config)
    with pytest.raises(ValueError, match="other settings"):
        train_purifier(other, SMALL, recipe, tmp_path, images)
    x = images[1].image.permute(0, 3, 1, 2).float() / 255
    assert not torch.equal(load_purifier(best)(x), x)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def batch() -> Batch:
    """The same one, with the same noise to come."""
    image = blobs(16, size=16)
    x = image.image.permute(0, 3, 1, 2).float() / 255
    return Batch(x, image.label, Noise(torch.arange(16)))


def trainer(folder: Path, **changes: Any) -> PurifierTrainer:
    """Of a small untrained classifier."""
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16))
    return PurifierTrainer(classifier, SMALL, PurifierRecipe()._replace(**changes), folder)


def test_a_batch_that_was_attacked_once_serves_several_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, four = trainer(tmp_path, replays=1), trainer(tmp_path, replays=4)
    crafts, craft = list[Batch](), four.craft
    monkeypatch.setattr(four, "craft", lambda batch: crafts.append(batch) or craft(batch))
    before = last(four.model).weight.detach().clone()
    assert torch.equal(one.step(batch(), 0.5), four.step(batch(), 0.5))  # of the untrained purifier
    assert len(crafts) == 1 and (one.run.steps, four.run.steps) == (1, 4)
    moved = [(last(t.model).weight - before).norm() for t in (one, four)]
    assert moved[1] > 1.5 * moved[0] > 0


def test_a_static_recipe_attacks_the_classifier_alone(tmp_path: Path) -> None:
    for static in (True, False):
        one = trainer(tmp_path, static=static, steps=3)
        before = one.craft(batch())
        nn.init.normal_(last(one.model).weight, std=0.3)
        assert torch.equal(one.craft(batch()), before) is static


def test_one_image_in_four_is_learned_from_as_it_is(tmp_path: Path) -> None:
    same = (trainer(tmp_path).craft(batch()) == batch().x).flatten(1).all(1)
    assert same.tolist() == [True, False, False, False] * 4


@pytest.mark.parametrize(("augment", "mirrored"), [(("flip",), True), (("crop",), False)])
def test_a_purifier_sees_mirrored_images_only_where_its_recipe_says_so(
    augment: tuple[str, ...], mirrored: bool, tmp_path: Path
) -> None:
    image = torch.zeros(64, 16, 16, 3, dtype=torch.uint8)
    image[:, :, 8:] = 255
    images = Images(image, torch.zeros(64, dtype=torch.int64), ("arrow", "other"))
    classifier = Classifier(ClassifierConfig("resnet10", 2, width=0.125, image_size=16))
    recipe = PurifierRecipe(augment=augment)
    trainer = PurifierTrainer(classifier, SMALL, recipe, tmp_path)
    bright_left = list[bool]()

    def step(batch: Batch, _: float) -> torch.Tensor:
        bright_left.extend((batch.x[..., :4].mean((1, 2, 3)) > 0.5).tolist())
        return torch.zeros(())

    trainer.run.pass_over(images, step, epochs=1, batch_size=32)
    assert len(bright_left) == 64 and any(bright_left) is mirrored and not all(bright_left)


@pytest.mark.parametrize(
    ("training", "found"),
    [
        (repr(Recipe(augment=("crop",), after=repr(Recipe()))), ("crop",)),
        (repr(Recipe(after=repr(Recipe(augment=())))), ("flip", "crop")),
        (repr(Recipe(augment=())), ()),
        ("adopted from w.pth", None),
    ],
)
def test_the_augmentation_of_a_training_is_read_off_its_recipe(
    training: str, found: tuple[str, ...] | None
) -> None:
    assert augmentations_of(training) == found
