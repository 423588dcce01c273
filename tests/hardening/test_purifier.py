from pathlib import Path

import pytest
import torch
from blobs import blobs

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import load_purifier
from rampart.hardening.model.purifier import Purifier, PurifierConfig
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

SMALL = PurifierConfig(width=8, depth=1)


def test_an_untrained_purifier_is_the_identity() -> None:
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(Purifier(PurifierConfig())(x), x)


def test_the_purified_view_of_one_image_ignores_its_neighbours() -> None:
    torch.manual_seed(0)
    purifier = Purifier(SMALL).train()
    torch.nn.init.normal_(purifier.residual[-2].weight, std=0.1)
    x = torch.rand(5, 3, 16, 16)
    assert not torch.equal(purifier(x), x)
    torch.testing.assert_close(purifier(x)[2:3], purifier(x[2:3]))


def test_purified_pixels_stay_in_range() -> None:
    purifier = Purifier(SMALL)
    torch.nn.init.constant_(purifier.residual[-2].bias, 3.0)
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
