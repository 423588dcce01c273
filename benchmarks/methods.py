"""Every method of adversarial training, given the same network and the same CPU minutes.

    .venv/bin/python benchmarks/methods.py --data cifar10/ [--held HELD.npz] [--minutes 1]

Clean, PGD-10 and AutoAttack accuracy on validation images, of the averaged weights at the end: none
is chosen by them. Each attack is the worst case with those left of it. A second table fine-tunes
the undefended network of the first for a third of the minutes, and compares it with training from
scratch. AutoAttack is short by default (--standard: as published), and so is the training:
differences are those of runs that are cut short.

A quarter of an hour of one core for a data set. Minutes are those of CPU time of this process, so a
busy machine changes nothing but the wait. Networks and figures stay in --out: after a kill, run the
same command to go on. rslad distils from the network that pgd made, whose minutes are not counted.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ratios
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rampart.handlers.engine import cpu_features
from rampart.hardening.attack.ladder import Budget, autoattack
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.objectives import View
from rampart.hardening.attack.pgd import Threat, cross_entropy, pgd10
from rampart.hardening.judge.metrics import difference, wilson
from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images, batches, split
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.train.augmentation import suited
from rampart.hardening.train.data import shuffled, spread
from rampart.hardening.train.loop import Recipe, Trainer, fast_precision
from rampart.hardening.train.methods import METHODS
from rampart.sources import Source

ARCH, WIDTH, BATCH, LR = "resnet10", 0.25, 128, 0.2
SHORT = Budget(steps=30, targets=9, queries=500, standard=False)
FIGURES = {"clean": "clean", "pgd10": "PGD-10", "autoattack": "AutoAttack"}
SCRATCH, UNDEFENDED = "nfgsm", "standard"
SHARE = 1 / 3  # of the minutes, for fine-tuning
WITHIN = -0.02  # of the accuracy from scratch
SAVED = 30.0  # seconds of CPU time after which a run is saved
CPU = torch.device("cpu")


class Entry(NamedTuple):
    """One network of the tables."""

    name: str
    recipe: Recipe
    activation: str = "relu"
    share: float = 1.0  # of the minutes
    init: str = ""  # the entry whose weights it begins with
    teacher: str = ""

    def folder(self, home: Path) -> Path:
        """Where its run and its figures are."""
        return home / self.name.replace(" ", "-").replace(",", "")


class Clock(nn.Module):
    """Seconds of CPU time that a run has had; saved with its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seconds", torch.zeros((), dtype=torch.float64))
        self.seconds: Tensor


class Lesson(NamedTuple):
    """What all entries have in common."""

    home: Path
    train: Images
    validation: Images
    threat: Threat
    minutes: float
    budget: Budget


def entries(recipe: Recipe) -> Iterator[Entry]:
    """All networks, those that others begin with or learn from before them."""
    for method in METHODS:
        plain = recipe._replace(method=method)
        if method == "rslad":
            yield Entry(method, plain._replace(smoothing=0.0), teacher="pgd")
        else:
            yield Entry(method, plain)
    base = recipe._replace(method=SCRATCH)
    yield Entry(f"{SCRATCH}, silu", base, activation="silu")
    yield Entry(f"{SCRATCH}, cutmix", base._replace(augment=(*base.augment, "cutmix")))
    yield from (Entry(name, how, share=SHARE, init=UNDEFENDED) for name, how in tuned(base))


def tuned(base: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Ways to fine-tune an undefended network."""
    yield "fine-tuned, lr as from scratch", base
    yield "fine-tuned, lr a quarter", base._replace(lr=base.lr / 4)
    yield "fine-tuned, lr a quarter, ramp", base._replace(lr=base.lr / 4, ramp=0.3)


def network(entry: Entry, lesson: Lesson) -> Classifier:
    """The network of an entry as its training begins."""
    if entry.init:
        file = lesson.home / entry.init / "classifier.safetensors"
        return load_classifier(file).requires_grad_(True)
    torch.manual_seed(entry.recipe.seed)
    size = lesson.train.image.shape[1]
    config = ClassifierConfig(ARCH, len(lesson.train.classes), WIDTH, size)
    return Classifier(config._replace(activation=entry.activation))


def train(entry: Entry, lesson: Lesson) -> dict[str, Any]:
    """Train the network of an entry for its minutes; its file is then in the entry's folder."""
    folder = entry.folder(lesson.home)
    file = folder / "classifier.safetensors"
    teacher = None
    if entry.teacher:
        teacher = load_classifier(lesson.home / entry.teacher / "classifier.safetensors")
    trainer, clock = Trainer(network(entry, lesson), entry.recipe, folder, teacher), Clock()
    run, seconds = trainer.run, 60 * lesson.minutes * entry.share
    run.parts["clock"] = clock
    run.settings += f" for {seconds:.0f} s on images {lesson.train.digest()[:16]}"
    run.resume()
    if not file.is_file():
        with tqdm(
            total=round(seconds), initial=int(clock.seconds), desc=entry.name, unit="s"
        ) as bar:
            steps(trainer, clock, lesson, seconds, bar)
        content = {"classifier": trainer.model.config._asdict(), "training": repr(entry.recipe)}
        checkpoint.save(file, trainer.ema, content)
    epochs = run.steps * BATCH / len(lesson.train)
    return {"steps": run.steps, "epochs": round(epochs, 2), "seconds": float(clock.seconds)}


def steps(trainer: Trainer, clock: Clock, lesson: Lesson, seconds: float, bar: "tqdm[Any]") -> None:
    """The steps left until the clock says `seconds`; the run is saved on the way and at the end."""
    run, recipe = trainer.run, trainer.recipe
    size = min(BATCH, len(lesson.train))
    since, saved = time.process_time(), float(clock.seconds)
    while True:
        rest = shuffled(
            lesson.train,
            size,
            seed=recipe.seed,
            epoch=run.epoch,
            skip=run.done,
            augmentations=recipe.augment,
            balance=recipe.balance,
        )
        for batch in rest:
            progress = min(1.0, float(clock.seconds) / seconds)
            torch.manual_seed(recipe.seed + run.steps)
            run.loss = run.loss + trainer.step(batch, progress)
            run.done += 1
            now = time.process_time()
            clock.seconds += now - since
            since = now
            bar.update(int(clock.seconds) - bar.n)
            over = float(clock.seconds) >= seconds
            if over or float(clock.seconds) - saved > SAVED:
                run.save()
                since, saved = time.process_time(), float(clock.seconds)
            if over:
                return
        run.epoch, run.done = run.epoch + 1, 0


def judge(net: Classifier, lesson: Lesson) -> dict[str, list[bool]]:
    """Which validation images are labelled right, by figure."""
    right: dict[str, list[bool]] = {name: [] for name in FIGURES}
    pieces = tqdm(batches(lesson.validation, 50), "attacks", -(-len(lesson.validation) // 50))
    for x, label in pieces:
        noise = Noise(torch.arange(len(x)))
        near = pgd10(cross_entropy(net, label), x, lesson.threat, noise=noise)
        far = autoattack(lambda x: View(net(x)), x, label, lesson.threat, lesson.budget)
        views = {"clean": x, "pgd10": near, "autoattack": far}
        with torch.no_grad():
            held = {name: net(view).argmax(1) == label for name, view in views.items()}
        # Each column is a worst case of what stands left of it.
        held["pgd10"] &= held["clean"]
        held["autoattack"] &= held["pgd10"]
        for name, values in held.items():
            right[name] += values.tolist()
    return right


def figures(entry: Entry, lesson: Lesson) -> dict[str, Any]:
    """What was found of an entry, now or before."""
    file = (
        entry.folder(lesson.home)
        / f"figures-{len(lesson.validation)}-{lesson.budget.standard}.json"
    )
    if not file.is_file():
        found = train(entry, lesson)
        net = load_classifier(entry.folder(lesson.home) / "classifier.safetensors").eval()
        found |= {"right": judge(net, lesson)}
        file.with_suffix(".partial").write_text(json.dumps(found))
        file.with_suffix(".partial").replace(file)
    row: dict[str, Any] = json.loads(file.read_text())
    return row


def cell(right: Sequence[bool]) -> str:
    """A share with its interval."""
    value = sum(right) / len(right)
    low, high = wilson(value, len(right))
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Rows as Markdown, in their order."""
    head = ["method", "CPU minutes", "epochs", *FIGURES.values()]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['seconds'] / 60:.2f}", f"{row['epochs']:.1f}"]
        cells += [cell(row["right"][figure]) for figure in FIGURES]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def claims_of(rows: dict[str, dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """By how much fine-tuned networks differ from the one from scratch, on the same images."""
    made = []
    for name in (name for name in rows if name.startswith("fine-tuned")):
        for figure in ("clean", "autoattack"):
            pair = (np.array(rows[which]["right"][figure]) for which in (name, SCRATCH))
            gap, (low, _) = difference(*pair)
            made.append(
                {
                    "claim": f"{name}: {FIGURES[figure]} less that from scratch",
                    "setting": setting,
                    "ratio": round(gap, 3),
                    "low": round(low, 3),
                    "target": WITHIN,
                    "holds": low >= WITHIN,
                }
            )
    return made


def lesson_of(options: argparse.Namespace) -> Lesson:
    """Images and what they are attacked with."""
    train, held = Source(options.data, options.held).read(options.size)
    few = spread(split(held, "validation"), options.n)
    home = options.out / (options.name or options.data.stem)
    budget = Budget() if options.standard else SHORT
    threat = Threat("Linf", options.eps / 255)
    return Lesson(home, spread(train, options.images), few, threat, options.minutes, budget)


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="as in `rampart train`")
    parser.add_argument("--held", type=Path)
    parser.add_argument("--name", default="", help="of the data; default that of their file")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--eps", type=float, default=8, help="of Linf, n/255")
    parser.add_argument("--minutes", type=float, default=1, help="of CPU time, per method")
    parser.add_argument("--images", type=int, default=10_000, help="training images, at most")
    parser.add_argument("--n", type=int, default=200, help="validation images, at most")
    parser.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    parser.add_argument("--standard", action="store_true", help="AutoAttack as published")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    """Print both tables; the exit code says whether the targets of fine-tuning hold."""
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    lesson = lesson_of(options)
    recipe = Recipe(SCRATCH, lesson.threat, batch_size=BATCH, lr=LR, smoothing=options.smoothing)
    augment, precision = suited(lesson.train.classes), fast_precision(CPU, cpu_features())
    recipe = recipe._replace(augment=augment, precision=precision)
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries(recipe):
        rows[entry.name] = figures(entry, lesson)
        print(table({entry.name: rows[entry.name]})[-1], flush=True)
    attack = "standard AutoAttack" if options.standard else f"short AutoAttack ({SHORT})"
    setting = f"{lesson.home.name}, {options.minutes:g} min, n = {len(lesson.validation)}"
    print(f"\n{setting}, {len(lesson.train):,} training images, {ARCH} x {WIDTH}, {lesson.threat},")
    print(f"{precision}, {attack}; {ratios.machine()}\n")
    print("\n".join(table(rows)))
    claims = claims_of(rows, setting)
    for claim in claims:
        print(
            f"     {claim['claim']}: {claim['ratio']:+.1%}, at least {claim['low']:+.1%} (95%);"
            f" target {claim['target']:+.0%}"
        )
    if options.json:
        ratios.write(options.json, claims)
    return int(not all(claim["holds"] for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
