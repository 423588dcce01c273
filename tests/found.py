"""A tiny object detector, new or trained for seconds on drawn scenes."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from drawn import CLASSES, boxed, write_voc

from rampart.hardening.model.classifier import ClassifierConfig
from rampart.hardening.objects.detector import ObjectConfig, ObjectDetector, load
from rampart.hardening.objects.scenes import divided
from rampart.hardening.objects.training import ObjectRecipe, train_objects

TINY = ClassifierConfig("resnet10", 10, 0.25)
SCALES = (0.2, 0.3, 0.4, 0.6, 0.9)


def untrained() -> ObjectDetector:
    """The same new weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ObjectDetector(ObjectConfig("ssd", CLASSES, 128, TINY, scales=SCALES)).eval()


@lru_cache(maxsize=1)
def learn_objects() -> ObjectDetector:
    """Undefended, and right on most drawn scenes."""
    with TemporaryDirectory() as place:
        home = Path(place)
        data = divided(write_voc(home / "voc", 50, parts={"train": range(48), "val": range(2)}))
        recipe = ObjectRecipe(
            "standard", epochs=1, batch_size=8, lr=4e-3, ema=0.8, passes=8, augment=("flip",)
        )
        return load(train_objects(untrained(), recipe, home / "run", (data.train, boxed(4))))
