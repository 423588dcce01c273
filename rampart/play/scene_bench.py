"""What every variant of an object detector finds in one picture, and its twin."""

from typing import Any

import torch
from PIL import Image

from rampart.handlers.engine import SceneOutputs
from rampart.handlers.image import View
from rampart.handlers.scenes import SceneJudge, SceneVerdict
from rampart.handlers.verdict import Policy
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.objects.attack import aims_of
from rampart.hardening.objects.defended import DefendedDetector
from rampart.hardening.objects.detector import TASK
from rampart.play.bench import UNDEFENDED, Answer, Defence, levels, png_uri, timed
from rampart.scene_looks import Victim, within
from rampart.scenes import SceneModel

# What each detector asks, for people.
QUESTIONS = {
    "emptiness": "Does too little look like an object?",
    "crowd": "Does too much look like an object?",
    "doubt": "Are the objects of no clear class?",
    "disagreement": "Does smoothing change what is found?",
    "purification": "Does the purifier change the picture much?",
    "purified": "Does the purifier change what is found?",
    "consistency": "Does a small step bring up more objects?",
}
# What each aim is, for people; the losses of a detector stand under their own names.
AIMS = {
    "vanish": "objects vanish",
    "fabricate": "false objects appear",
    "mislabel": "objects get another label",
    "invert": "false boxes are surer than true ones",
    "sum": "all losses together",
}


class SceneBench:
    """An object detector's variants and, where there is one, its undefended twin."""

    def __init__(
        self, model: SceneModel, twin: SceneModel | None = None, *, rate: float | None = None
    ) -> None:
        self.model, self.twin = model, twin
        self.rate, self.name = model.chosen_rate(rate), str(model.card["model"])
        self.defences: dict[str, Defence[DefendedDetector]] = {
            v: Defence(model.pipeline(v), model.calibration(v), self.rate) for v in model.variants
        }
        self._judges: dict[str, SceneJudge] = {
            v: model.judge(Policy(self.rate), v) for v in model.variants
        }
        self._victims = {v: Victim(*one[:2]) for v, one in self.defences.items()}
        if twin:
            self._judges[UNDEFENDED] = twin.judge()
            table = twin.calibration(twin.best_variant)
            self._victims[UNDEFENDED] = Victim(twin.pipeline(), table)
        # The first pass of a network takes longer than those that follow.
        self.answers(View(torch.zeros(model.image_size, model.image_size, 3).byte().numpy()))

    @property
    def names(self) -> list[str]:
        """Whoever answers, the default first."""
        best = self.model.best_variant
        others = [v for v in self.defences if v != best]
        return [best, *others, *([UNDEFENDED] if self.twin else [])]

    @property
    def aims(self) -> dict[str, str]:
        """What an attack may be after, with what that is for people; the default first."""
        known = aims_of(self.model.detector)
        usual = {name: words for name, words in AIMS.items() if name in known}
        return usual | {name: f"loss of {name}" for name in known if name not in usual}

    def victim(self, name: str) -> Victim:
        """One of them as an attacker has it. KeyError for another name."""
        return self._victims[name]

    def verdict(self, name: str, outputs: Any, view: View) -> SceneVerdict:
        """What one of them says, from what its pipeline gives of a view."""
        arrays = SceneOutputs(*(part.detach().numpy() for part in outputs))
        return self._judges[name].of(arrays, [view])[0]

    def answers(self, view: View) -> dict[str, Answer]:
        """What each says of a picture; of the twin, which flags nothing, the boxes alone."""
        pixels, found = torch.from_numpy(view.pixels)[None], {}
        for name in self.names:
            with torch.no_grad():
                outputs, milliseconds = timed(self._victims[name].pipeline, pixels)
            verdict = self.verdict(name, outputs, view)
            found[name] = {"boxes": verdict.boxes, "milliseconds": milliseconds}
            if name != UNDEFENDED:
                told = {**verdict.to_dict(), "p_value": verdict.p_value}
                found[name] |= told | self.defences[name].suspicion(outputs.scores)
        return found

    def see(self, data: bytes) -> View:
        """What the model sees of a picture. Raises ImageError."""
        return self.model.view(data)

    def seen(self, view: View) -> Answer:
        """What the page shows of it: boxes are in pixels of a picture of `sides`."""
        sides = view.frame[1:] if view.frame else view.pixels.shape[1::-1]
        return {"picture": shown(view, view.pixels), "sides": sides}

    def described(self) -> dict[str, Any]:
        """What the page has to know of the model."""
        return {
            "name": self.name,
            "task": TASK,
            "classes": self.model.classes,
            "size": self.model.image_size,
            "names": self.names,
            "variants": {v: one.described(QUESTIONS) for v, one in self.defences.items()},
            "eps": levels(self.model.card),
            "aims": [{"name": name, "words": words} for name, words in self.aims.items()],
        }


def shown(view: View, pixels: Pixels) -> str:
    """Pixels (S, S, 3) of a view as a page shows them, without the border."""
    left, top, width, height = within(view)
    return png_uri(Image.fromarray(pixels[top : top + height, left : left + width]))
