"""Our attacks on an object detector beside ART's, on the same pictures.

    .venv/bin/python benchmarks/object_attacks.py --data BCCD --skip-bad

Expected: ART's PGD leaves at least the mAP50 that ours leave. ART sees the detector through its
`PyTorchObjectDetector`, which wants torchvision's contract: losses in training, boxes otherwise.
About four minutes on one core for the 36 test pictures of BCCD.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rampart.hardening.attack.ladder import in_8_bits
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.pixels import to_float
from rampart.hardening.objects import judge as judging
from rampart.hardening.objects.attack import Budget, attack
from rampart.hardening.objects.boxes import Truth
from rampart.hardening.objects.detector import ObjectDetector
from rampart.hardening.objects.scenes import Boxed
from rampart.objects import pictures
from rampart.scenes import SceneModel
from rampart.sources import Source

OURS = {"PGD": "pgd", "Auto-PGD": "apgd"}  # on the sum of the losses, as ART's


class Contract(nn.Module):
    """An object detector as torchvision's are called: its first class is 1."""

    def __init__(self, detector: ObjectDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self, x: Tensor, targets: Sequence[Mapping[str, Tensor]] = ()
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses of x (N, 3, S, S) in training, else boxes, labels and scores of each."""
        if not self.training:
            found = self.detector(x)
            return [{"boxes": f.boxes, "labels": f.labels + 1, "scores": f.scores} for f in found]
        truth = [Truth(target["boxes"], target["labels"] - 1) for target in targets]
        return {name: value.sum() for name, value in self.detector.image_losses(x, truth).items()}


def art_pgd(
    detector: ObjectDetector, x: Tensor, truth: Sequence[Truth], threat: Threat, steps: int
) -> Tensor:
    """ART's PGD on the sum of the losses; for objects it knows no random start."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.object_detection import PyTorchObjectDetector

    estimator = PyTorchObjectDetector(
        model=Contract(detector),
        input_shape=tuple(x.shape[1:]),
        clip_values=(0.0, 1.0),
        attack_losses=tuple(detector.net.loss_names),
        device_type="cpu",
    )
    crafted = ProjectedGradientDescent(
        estimator,
        eps=threat.eps,
        eps_step=threat.eps * min(1.0, 2.5 / steps),
        max_iter=steps,
        batch_size=len(x),
        verbose=False,
    )
    targets = [{"boxes": one.boxes.numpy(), "labels": one.labels.numpy() + 1} for one in truth]
    return torch.from_numpy(crafted.generate(x.numpy(), targets))


def under(craft: partial[Tensor], boxed: Boxed, threat: Threat, title: str) -> Tensor:
    """The pictures, uint8 (N, S, S, 3), after an attack."""
    parts = []
    for rows in tqdm(torch.arange(len(boxed)).split(judging.TOGETHER), title, leave=False):
        some = boxed[rows.tolist()]
        x = craft(to_float(some.image), some.truth, rows=rows)
        parts.append(in_8_bits(x, some.image, threat))
    return torch.cat(parts)


def main() -> int:
    """Attack, print the table; the exit code says whether what is expected holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--skip-bad", action="store_true")
    parser.add_argument("--model", type=Path, default=Path("model_store/blood-cells"))
    parser.add_argument("--part", default="test")
    parser.add_argument("--images", type=int)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    model = SceneModel.load(options.model)
    detector, threat = model.detector, model.threat
    source = Source(options.data, None, options.skip_bad)
    boxed = pictures(source, options.part, detector, options.images)

    def ours(how: str, x: Tensor, truth: Sequence[Truth], *, rows: Tensor) -> Tensor:
        budget, asked = Budget(options.steps), (how, "sum")
        return attack(detector, x, truth, threat, how=asked, budget=budget, noise=Noise(rows))

    def arts(x: Tensor, truth: Sequence[Truth], *, rows: Tensor) -> Tensor:
        return art_pgd(detector, x, truth, threat, options.steps)

    crafts = {f"Rampart's {name}": partial(ours, how) for name, how in OURS.items()}
    crafts["ART's PGD"] = partial(arts)
    print(f"{len(boxed)} pictures ({options.part}), {threat}, {options.steps} steps\n")
    print(judging.table({}, boxed.classes)[0])
    left = {}
    for name, craft in {"clean": None, **crafts}.items():
        image = under(craft, boxed, threat, name) if craft else boxed.image
        row = judging.figures(boxed.truth, judging.seen(detector, image), len(boxed.classes))
        print(judging.line(name, row), flush=True)
        left[name] = row.map50
    holds = min(left[name] for name in crafts if "ART" not in name) <= left["ART's PGD"]
    print("\nART's is nowhere stronger" if holds else "\nours falls short")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
