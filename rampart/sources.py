"""Images by where they lie: for training, held out of it, and to measure on."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from rampart import inputs
from rampart.hardening.model import folder as folders
from rampart.hardening.model.detectors import FITTED
from rampart.hardening.model.images import Held, Images, hold_out, least_held, split
from rampart.hardening.model.promise import FEWEST, RATES, finest_rate, held_for, in_words
from rampart.hardening.model.provenance import check_unseen, trained_on
from rampart.hardening.train import cifar10
from rampart.hardening.train.data import Folder, counted, load, load_training, spread, survey
from rampart.hardening.train.loop import say
from rampart.hardening.train.shards import is_sharded, shards_of

if TYPE_CHECKING:
    from rampart.model import Model

Part = Literal["validation", "tuning", "calibration"]


def load_images(path: Path | str, *, size: int, train: bool = True) -> Images | Folder:
    """The labelled images under `path`: an .npz file, CIFAR-10's batches or one folder a class.

    They are brought to `size` pixels a side; `train` picks the half of CIFAR-10. A folder too large
    for memory stays on disk. Raises FileNotFoundError or ValueError that name the remedy.
    """
    where = Path(path)
    return load_training(where, size=size) if train else load(where, train=False, size=size)


class Source(NamedTuple):
    """Images of training, and those held out of it where they lie elsewhere."""

    data: Path
    held: Path | None = None
    skip_bad: bool = False  # leave out pictures that cannot be read

    @property
    def name(self) -> str:
        """What a card calls the held-out images."""
        return (self.held or self.data).name

    def read(self, size: int) -> tuple[Images | Folder, Images]:
        """(training images, held-out images), `size` pixels a side.

        Prints what there is. Raises ValueError where the held-out ones lie among those of training
        or are too few, or where a class has no image to train on.
        """
        return self._read(size, Path.cwd())

    @lru_cache(maxsize=1)  # noqa: B019  # the stages of `harden` read the same, in the same folder
    def _read(self, size: int, _: Path) -> tuple[Images | Folder, Images]:
        data, held, skip_bad = self
        if held and lies_in(held, data):
            raise ValueError(f"--held {held} lies in --data {data}: training would use its images")
        images, summary = survey(data, size=size, stream=True, skip_bad=skip_bad)
        say("\n".join(summary.lines(size)))
        held_out = None
        if held:
            apart, summary = survey(held, size=size, skip_bad=skip_bad)
            say("\n".join(summary.lines(size)))
            # Names in a folder are its own; only a file of twins names pictures of another.
            whole = apart.whole()
            held_out = whole if held.suffix == ".npz" else replace(whole, paths=())
        check_classes(data, images)
        train, out = hold_out(images, held_out, least=least_held(len(images)))
        check_held(held or data, out)
        check_trained(data, train)
        say(f"{len(train)} training images, {len(out)} held out")
        for line in doubts(out):
            say(line)
        return train, out


def lies_in(held: Path, data: Path) -> bool:
    """Whether training on `data` would use the pictures of a folder or of shards."""
    if is_sharded(held) and is_sharded(data):
        ours, theirs = (map(Path.resolve, shards_of(path)) for path in (held, data))
        return not set(ours).isdisjoint(theirs)
    return held.is_dir() and held.resolve().is_relative_to(data.resolve())


def check_classes(data: Path, images: Images | Folder) -> None:
    """Raise ValueError where there are not two classes at least, or one of them has no image."""
    counts = counted(images)
    if len(counts) < 2:
        raise ValueError(
            f"{data} has one class, {next(iter(counts), '')!r}: pass two or more classes, each in"
            " its own folder"
        )
    if missing := [name for name, count in counts.items() if not count]:
        raise ValueError(
            f"{data} has no image of {named(missing)}: number classes from 0 without gaps, or add"
            " images of each"
        )


def check_held(name: Path, held: Images) -> None:
    """Raise ValueError where so few images are held out that nothing can be promised."""
    ranked = len(split(held, "calibration"))
    if ranked < FEWEST:
        least = held_for(FEWEST)
        raise ValueError(
            f"{name} leaves {len(held)} held-out images, {ranked} of them to calibrate on: even"
            f" false alarms of {RATES[-1]:.0%} need {FEWEST}, so pass at least {2 * least} images"
            f" as --data ({2 * held_for(100)} for {RATES[0]:.0%}; half of a small set is held out,"
            f" a tenth from 2,000 images on), or {least} or more separate images as --held"
        )


def doubts(held: Images) -> list[str]:
    """What a small set of held-out images can promise, and of which classes it says nothing."""
    ranked, lines = split(held, "calibration"), list[str]()
    rate = finest_rate(len(ranked))
    if rate > RATES[0]:
        lines.append(
            f"  warning: a small set; its promise: {in_words(rate, len(ranked))};"
            f" {held_for(100)} held-out images allow {RATES[0]:.0%}"
        )
    present = set(ranked.label.tolist())
    if missing := [name for i, name in enumerate(held.classes) if i not in present]:
        lines.append(
            f"  warning: no image of {named(missing)} is among those for calibration: the rate of"
            " false alarms on such images is unknown"
        )
    return lines


def check_trained(data: Path, train: Images | Folder) -> None:
    """Raise ValueError where none of the images that detectors are fitted on is of a class."""
    if not len(train):  # all are held out: then detectors are fitted on those
        return
    rows = torch.arange(min(FITTED, len(train))) * len(train) // min(FITTED, len(train))
    present = set(train.label[rows].tolist())
    missing = [name for index, name in enumerate(train.classes) if index not in present]
    if missing:
        raise ValueError(
            f"{data} has too few images of {named(missing)}: all of them are held out, and none is"
            " left to train on. Add some of each, or pass --held"
        )


def named(classes: Sequence[str]) -> str:
    """The first of several classes by name, and how many more there are."""
    first = ", ".join(classes[:10])
    more = f" and {len(classes) - 10:,} more" if len(classes) > 10 else ""
    return f"{'class' if len(classes) == 1 else 'the classes'} {first}{more}"


class Sample(NamedTuple):
    """Images to measure on, and what a card calls them."""

    images: Images
    name: str
    warning: str = ""  # what makes its figures doubtful
    summary: Sequence[str] = ()  # what was found where the images are, in words


def sample_of(
    model: "Model",
    source: Source,
    *,
    name: str = "",
    part: Part | None = None,
    limit: int | None = None,
) -> Sample:
    """The images of a source that a model is measured on, at most `limit`, evenly spaced.

    With `part` they are a split of those held out, or of the tenth that training leaves out; an
    .npz that was not trained on is taken for held-out images itself.
    """
    data, held, _ = source
    inputs.sample(held, part)
    familiar = folders.trained_on(model.card, data)
    title, warning, lines = name or source.name, "", list[str]()
    if part and (held or familiar or data.suffix != ".npz"):
        every = held_images(model, source)
    else:
        skip_bad = source.skip_bad or folders.skipped_bad(model.card, data)
        read = partial(survey, data, train=False, size=model.image_size, skip_bad=skip_bad)
        found, summary = read(stream=part is None)
        lines = summary.lines(model.image_size)
        count, every = len(found), found if isinstance(found, Images) else spread(found, limit)
        if familiar and not cifar10.lies_in(data):  # this is its test half
            warning = f"{data} has the name of the training data: on training images,"
            warning += " every figure is too high"
        warning = training_warning(model, every, held_out=part is not None) or warning
    if part:
        every, title = split(every, part), f"{part} split of {title}"
        count = len(every)
    images = spread(every, limit)
    whole = len(images) == count
    return Sample(images, title if whole else f"{len(images)} of {title}", warning, lines)


def training_warning(model: "Model", images: Images, *, held_out: bool) -> str:
    """A warning where a model was trained on some of `images`, by their pixels; else "".

    Raises ValueError where they pass as `held_out`.
    """
    if model.folder is None:
        return ""
    if held_out:
        check_unseen(model.folder, images)
    found = trained_on(model.folder, images)
    if found is None or not found.any():
        return ""
    seen = f"{found.sum()} of these {len(images)} images"
    return f"{model} was trained on {seen}: every figure is too high"


def held_images(model: "Model", source: Source) -> Images:
    """The held-out images of a source, for a model that is made.

    Raises ValueError where it was made with a --held and none is given now: a tenth of the data
    would be images that it was trained on.
    """
    if source.held is None and (named := folders.held_beside(model.card, source.data)):
        raise ValueError(f"{model} was made with --held {named[0]}: pass it here too")
    skip_bad = source.skip_bad or folders.skipped_bad(model.card, source.data)
    images = source._replace(skip_bad=skip_bad).read(model.image_size)[1]
    if model.folder is not None:
        check_unseen(model.folder, images)
    return images


def calibration_images(model: "Model", source: Source) -> Images:
    """The held-out images of a source, for a model that is calibrated in one more form.

    Raises ValueError where its forms are calibrated on others, or where splits differ: an image
    that chose or tuned one form would rank another.
    """
    images = held_images(model, source)
    model.check_classes(images)
    noted = model.card.get("images", {})
    if any(noted.get(name, found) != found for name, found in Held(images).sets.items()):
        raise ValueError(
            f"{model} is calibrated on other held-out images than those of {source.name}, or on the"
            " same in another order: pass --data and --held as for its other forms"
        )
    return images
