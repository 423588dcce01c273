"""What `harden` proposes where you say nothing: what fits the data and the machine, and why."""

import math
import zipfile
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from numpy.lib import format as npy
from PIL import Image

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model.classifier import ClassifierConfig
from rampart.hardening.model.images import Images
from rampart.hardening.train import cifar10
from rampart.hardening.train.augmentation import mirroring, of_one_image, suited
from rampart.hardening.train.data import Folder, counted
from rampart.hardening.train.listing import pictures_below
from rampart.hardening.train.loop import Precision, Recipe
from rampart.hardening.train.purifier import PurifierRecipe
from rampart.hardening.train.shards import Member, is_sharded, list_samples, shards_of

T = TypeVar("T")
USUAL = ClassifierConfig("resnet18", 0)
MANY = 100  # validation images that `harden` attacks
SIZES = (32, 64, 96, 128, 160, 192, 224)  # pixels a side that are proposed
ON_CPU = 64  # and no more than that without a GPU
FEW = 2000  # training images; of fewer a smaller network, and no purifier
STEPS = 1500  # that a training should have
EPOCHS = (60, 15, 30)  # at most; at least on a CPU; at least on a GPU
BATCH, SMALLEST = 128, 8  # images a step
RATE = 0.2  # learning rate at BATCH
# Of what training from scratch would take, where you have weights: benchmarks/methods.py compares.
TUNED_EPOCHS, FEWEST_EPOCHS = 1 / 3, 5
UNBALANCED, ROOT = 4.0, 0.5  # times that classes differ in size; the balance proposed from there on
LOOKED_AT = 200  # pictures whose size is looked at


class Wishes(NamedTuple):
    """What you say of the whole way; None leaves it to the proposal."""

    threat: Threat = Threat()
    method: str = "nfgsm"
    arch: str | None = None
    width: float | None = None
    image_size: int | None = None
    net: ClassifierConfig = USUAL  # with the head and channels of a network of your own
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    augment: tuple[str, ...] | None = None
    weights: Path | None = None  # yours, to begin with
    purifier_epochs: int | None = None  # 0: no purifier
    evaluate_on: int = MANY  # validation images to attack; 0: none
    dtype: Precision | None = None
    device: str = "auto"
    sample: bool = True  # whether a held-out picture goes into the archive
    balance: float | None = None
    guarded: bool = False  # whether the variant guarded is made too


class Plan(NamedTuple):
    """What the whole way is to do."""

    net: ClassifierConfig
    recipe: Recipe
    weights: Path | None = None
    purifier_epochs: int = 2
    evaluate_on: int = MANY
    dtype: Precision | None = None
    device: str = "auto"
    sample: bool = True
    guarded: bool = False

    def check(self) -> None:
        """Raise ValueError where nothing would come of it."""
        if not (self.weights or self.recipe.epochs):
            raise ValueError("nothing to harden: pass --weights, or --epochs above 0 to train")

    def stages(self) -> int:
        """How many stages that makes."""
        asked = (self.weights, self.recipe.epochs, self.purifier_epochs, self.evaluate_on)
        return sum(map(bool, asked)) + 2  # calibrate, archive

    @property
    def purifier(self) -> PurifierRecipe:
        """How its purifier is trained."""
        recipe = self.recipe
        augment = of_one_image(recipe.augment)
        return PurifierRecipe(recipe.threat, self.purifier_epochs, augment=augment)


class Row(NamedTuple):
    """One setting that is proposed."""

    option: str
    value: Any
    why: str

    @property
    def text(self) -> str:
        """The value for people."""
        return ", ".join(self.value) if isinstance(self.value, tuple) else str(self.value)


class Proposal(NamedTuple):
    """A plan, and what in it nobody asked for."""

    plan: Plan
    rows: list[Row]

    def lines(self) -> list[str]:
        """The proposed settings as a table; nothing where all was said."""
        if not self.rows:
            return []
        cells = [(row.option, row.text, row.why) for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(2)]
        table = [f"  {o.ljust(widths[0])}  {v.ljust(widths[1])}  {why}" for o, v, why in cells]
        return ["proposed for the options that you did not set:", *table]


def image_size(data: Path, *, gpu: bool) -> Row:
    """Pixels a side, by the pictures as they are stored; none is decoded."""
    side = stored_side(data)
    if data.suffix == ".npz":
        return Row("--image-size", side, "as stored in the file")
    most = SIZES[-1] if gpu else ON_CPU
    fitting = [size for size in SIZES if size <= min(side, most)] or [SIZES[0]]
    why = f"half of the pictures have {side} pixels or more on their shorter side"
    return Row("--image-size", fitting[-1], why + ("" if gpu else f"; {ON_CPU} at most on a CPU"))


def stored_side(data: Path) -> int:
    """The median of the shorter sides of pictures in `data`; 32 where that cannot be known."""
    if data.suffix == ".npz" and data.is_file():
        return npz_side(data)
    files: Sequence[Path | Member] = []
    if is_sharded(data):
        files = list_samples(shards_of(data)[:1]).members
    elif data.is_dir() and not cifar10.lies_in(data):
        files = pictures_below(data)
    sides = []
    for file in files[:: max(1, len(files) // LOOKED_AT)]:
        try:
            stored = BytesIO(file.read()) if isinstance(file, Member) else file
            with Image.open(stored) as picture:
                sides.append(min(picture.size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # the survey names it
    return sorted(sides)[len(sides) // 2] if sides else SIZES[0]


def npz_side(file: Path) -> int:
    """The height of the images in an .npz file, off its head alone."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("image.npy") as stream:
            read = npy.read_array_header_1_0
            shape = read(stream)[0] if npy.read_magic(stream) == (1, 0) else ()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        shape = ()
    return int(shape[1]) if len(shape) == 4 else SIZES[0]


def propose(wishes: Wishes, train: Images | Folder | None, *, gpu: bool) -> Proposal:
    """A plan for `train` images, None where they cannot be read; the image size is given."""
    count = len(train) if train is not None else FEW
    net, rows = network(wishes, count, gpu=gpu)
    net = net._replace(image_size=wishes.image_size or USUAL.image_size)
    pick = partial(taken, rows)
    why = f"for {count:,} training images"
    batch = pick("--batch-size", wishes.batch_size, batch_for(count), why)
    rate = round(RATE * min(1.0, batch / BATCH) ** 0.5, 3)
    why = f"{RATE} at {BATCH} images per step, scaled by the square root for smaller batches"
    lr = pick("--lr", wishes.lr, rate, why)
    epochs = epochs_for(count, batch, gpu=gpu)
    why = f"{epochs * max(1, count // batch):,} steps; the aim is {STEPS:,}, in 15 to 60 epochs"
    if wishes.weights:
        why = f"a third of the {epochs} epochs from scratch, {FEWEST_EPOCHS} at least"
        epochs = max(FEWEST_EPOCHS, math.ceil(epochs * TUNED_EPOCHS))
    epochs = pick("--epochs", wishes.epochs, epochs, why)
    why = f"{FEW:,} images or more" if count >= FEW else f"with fewer than {FEW:,} images it"
    why += " allow one" if count >= FEW else " withstands only static attacks"
    cleaned = pick("--purifier-epochs", wishes.purifier_epochs, 2 if count >= FEW else 0, why)
    classes = train.classes if train is not None else ()
    augment = pick("--augment", wishes.augment, suited(classes), mirroring(classes)[1])
    recipe = Recipe(wishes.method, wishes.threat, epochs, batch, lr, augment=augment)
    recipe = recipe._replace(balance=balance(wishes, train, rows))
    rest = (wishes.weights, cleaned, wishes.evaluate_on, wishes.dtype, wishes.device)
    return Proposal(Plan(net, recipe, *rest, wishes.sample, wishes.guarded), rows)


def balance(wishes: Wishes, train: Images | Folder | None, rows: list[Row]) -> float:
    """How far classes are drawn alike: as is said, else by the root where their sizes differ much.

    Alike in full would show few images so often that they are learned by heart.
    """
    if wishes.balance is not None or train is None:
        return wishes.balance or 0.0
    sizes = {name: count for name, count in counted(train).items() if count}
    if not sizes or max(sizes.values()) < UNBALANCED * min(sizes.values()):
        return 0.0
    large = max(sizes, key=lambda name: sizes[name])
    small = min(sizes, key=lambda name: sizes[name])
    why = f"{large} has {sizes[large]:,} images, {small} has {sizes[small]:,}: small classes are"
    return taken(rows, "--balance", None, ROOT, f"{why} shown more often")


def taken(rows: list[Row], option: str, said: T | None, proposed: T, why: str) -> T:
    """What was said, else what is proposed, which `rows` then tell."""
    if said is not None:
        return said
    rows.append(Row(option, proposed, why))
    return proposed


def network(wishes: Wishes, count: int, *, gpu: bool) -> tuple[ClassifierConfig, list[Row]]:
    """The network that is asked for, or one for so many images."""
    net = wishes.net._replace(width=1.0 if wishes.width is None else wishes.width)
    if wishes.arch or wishes.weights:
        return net._replace(arch=wishes.arch or USUAL.arch), []
    arch = USUAL.arch if count >= FEW else "resnet10"
    width = (1.0 if gpu else 0.5) if count >= FEW else 0.25
    rows = [Row("--arch", arch, f"for {count:,} training images")]
    if wishes.width is None:
        rows.append(Row("--width", width, f"on a {'GPU' if gpu else 'CPU'}"))
        net = net._replace(width=width)
    return net._replace(arch=arch), rows


def batch_for(count: int) -> int:
    """Images a step: a power of two that gives an epoch 8 steps or more, if so few can."""
    size = BATCH
    while size > SMALLEST and size * 8 > count:
        size //= 2
    return size


def epochs_for(count: int, batch: int, *, gpu: bool) -> int:
    """Passes over so many images that make STEPS, within the bounds."""
    most, on_cpu, on_gpu = EPOCHS
    wanted = -(-STEPS // max(1, count // batch))
    return min(most, max(on_gpu if gpu else on_cpu, wanted))
