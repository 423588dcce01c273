"""Rampart turns an image classifier into a hardened inference endpoint.

    import rampart as rp

    train, held = rp.load_images("my_images/", size=64).hold_out()
    net = rp.Classifier.wrap(my_module, head="fc", classes=train.classes, image_size=64)
    net = rp.train(net, train, held.validation, rp.Recipe(epochs=5), out="runs/a")
    model = rp.Model.calibrate(net, held)
    print(model.evaluate(test, rp.QUICK).table())
    model.archive("mine.mar", policy=rp.Policy(on_detection="reject"))

Names load what they need when they are first asked for: this file travels in every archive, where
there is no torch.
"""

TYPE_CHECKING = False  # to type checkers it is true
if TYPE_CHECKING:
    from rampart.calibrated import Form
    from rampart.handlers.errors import ImageError
    from rampart.handlers.scenes import SceneVerdict
    from rampart.handlers.verdict import Calibration, Policy, Verdict
    from rampart.hardening.attack.ladder import QUICK, Budget
    from rampart.hardening.attack.pgd import Threat
    from rampart.hardening.model.classifier import Classifier, ClassifierConfig
    from rampart.hardening.model.images import Held, Images
    from rampart.hardening.model.purifier import Purifier
    from rampart.hardening.model.registry import register
    from rampart.hardening.train.loop import Recipe
    from rampart.model import Figures, Model
    from rampart.scenes import SceneModel
    from rampart.sources import load_images
    from rampart.training import train

_HOMES = {
    "rampart.handlers.errors": ("ImageError",),
    "rampart.handlers.scenes": ("SceneVerdict",),
    "rampart.handlers.verdict": ("Calibration", "Policy", "Verdict"),
    "rampart.hardening.attack.ladder": ("Budget", "QUICK"),
    "rampart.hardening.attack.pgd": ("Threat",),
    "rampart.hardening.model.classifier": ("Classifier", "ClassifierConfig"),
    "rampart.hardening.model.purifier": ("Purifier",),
    "rampart.hardening.model.registry": ("register",),
    "rampart.hardening.model.images": ("Held", "Images"),
    "rampart.hardening.train.loop": ("Recipe",),
    "rampart.calibrated": ("Form",),
    "rampart.model": ("Figures", "Model"),
    "rampart.scenes": ("SceneModel",),
    "rampart.sources": ("load_images",),
    "rampart.training": ("train",),
}
__all__ = [
    "QUICK", "Budget", "Calibration", "Classifier", "ClassifierConfig", "Figures", "Form", "Held",
    "ImageError", "Images", "Model", "Policy", "Purifier", "Recipe", "SceneModel", "SceneVerdict",
    "Threat", "Verdict", "load_images", "register", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """A public name, from the module that defines it."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value: object = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'rampart' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
