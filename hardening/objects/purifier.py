"""Training of a purifier in front of a frozen object detector, in the loop of classifiers.

The attacks climb the sum of the detector's losses through both networks, and the purifier descends
it (AToP's task loss, Lin et al. 2024, section 3.3), beside what it loses in front of a classifier.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rampart.hardening.attack.pgd import Loss
from rampart.hardening.model.purifier import described
from rampart.hardening.objects.detector import ObjectDetector
from rampart.hardening.objects.jitter import check_jitters
from rampart.hardening.objects.scenes import Boxed, Lessons, Scenes
from rampart.hardening.objects.training import fit, total, validate
from rampart.hardening.train import loop
from rampart.hardening.train.purifier import PurifierRecipe, PurifierTrainer


class ScenePurifierTrainer(PurifierTrainer):
    """Trains generator and critic in turns; the object detector stays frozen."""

    figure: ClassVar[str] = "validation mAP50"
    check_augmentations = staticmethod(check_jitters)
    net: ObjectDetector

    def loss(self, batch: Any) -> Loss:
        """The sum of the detector's losses (N,) by pixels in place of a batch's pictures."""
        return total(self.net, batch.truth)


def train_scene_purifier(
    detector: ObjectDetector,
    config: Any,
    recipe: PurifierRecipe,
    folder: Path,
    scenes: tuple[Scenes, Boxed],
    *,
    commands: Sequence[str] = (),
) -> Path:
    """Train a purifier in front of `detector` on `scenes` (training, validation), in `folder`.

    Returns the file of the epoch whose boxes, found in purified pictures, have the best mAP50 under
    PGD-10 that knows the purifier.
    """
    trainer = ScenePurifierTrainer(detector, config, recipe, folder)
    alone = validate(detector, scenes[1].to(trainer.device), recipe.threat)
    loop.say(f"without the purifier: clean {alone['clean']:.4g}  pgd10 {alone['pgd10']:.4g}")
    both, file = detector.behind(trainer.ema), folder / "purifier.safetensors"
    lessons = Lessons(scenes[0], detector.config.size, 1, trainer.device)
    content = {"purifier": described(trainer.model)}
    fit(trainer, both, (lessons, scenes[1]), file, content, commands=commands)
    return file
