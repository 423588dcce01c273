"""What an ONNX file of whatever origin withstands: by its gradients, or by its answers alone."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rampart.hardening.attack.ladder import QUICK, Attack, fool
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.redteam import redteam
from rampart.hardening.attack.redteam.said import Answer, Reading, Said
from rampart.hardening.attack.victims import Answer as Guess
from rampart.hardening.attack.victims import Victim, label_victim
from rampart.hardening.judge import evaluate as judge
from rampart.hardening.judge.evaluate import Evaluation, Record, Replay, Rung
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.card import RATE, Row, Subject
from rampart.hardening.model.images import Images
from rampart.hardening.model.onnx_file import OnnxFile, Unconvertible
from rampart.hardening.model.pixels import to_uint8
from rampart.hardening.model.scaling import NAMES, SCALINGS, Layout, Name
from rampart.hardening.report import card as report
from rampart.hardening.train.data import spread, survey
from rampart.looks import TABBY, picture
from rampart.provenance import versions
from rampart.studies import Outcome, Study

GATED = 64  # images that the parity gate compares on
TRIED, CLEAR = 200, 0.05  # images that tell a range, by a lead in accuracy of so much
QUERIES, FEW = 1000, 200  # of Square an image, and in a quick study
CLASSIFIER = Subject("classifier")
BLIND = "sees its answers alone"


class Described(NamedTuple):
    """What a person says of a file's input; None is found out."""

    range: Name | None = None
    layout: Layout | None = None
    image_size: int | None = None


class Local:
    """A file that answers as an endpoint does, for attacks that see answers alone."""

    def __init__(self, file: OnnxFile, range: Name, classes: tuple[str, ...]) -> None:
        self.url, self.classes, self.reading = f"file:{file.name}", classes, Reading(classes)
        self._file, self._scaling = file, SCALINGS[range]

    def ask(self, images: Pixels) -> list[Answer]:
        """As Endpoint has it."""
        logits = self._file.logits(images, self._scaling)
        return [self.reading.answer(Said(scores=row.tolist())) for row in logits]


def evaluate(
    path: Path,
    images: Path,
    study: Study,
    *,
    described: Described = Described(),  # noqa: B008
    limit: int | None = None,
    rungs: list[str] | None = None,
    gallery: Path | None = None,
    notice: Callable[[str], object] = str,
) -> Outcome:
    """Attack the classifier in an ONNX file; write its figures into NAME-measured.json beside it,
    and the report NAME-report.html. `gallery` is a second page with attacked images in it.

    White-box where onnx2torch converts the file and the parity gate holds, else black-box. Raises
    ValueError, in a sentence, for a file or images that do not go together.
    """
    file = OnnxFile(path, layout=described.layout, size=described.image_size)
    every, _ = survey(images, train=False, size=file.entry.size, stream=True)
    if len(every.classes) != file.classes:
        raise ValueError(
            f"{path} has {file.classes} classes, but {images} has {len(every.classes)}: pass images"
            " of the model's classes, with class names in the model's order"
        )
    range, words = range_of(file, spread(every, TRIED), described.range)
    few = spread(every, limit)
    try:
        run = file.twin(spread(every, GATED).image.numpy(), SCALINGS[range])
    except Unconvertible as why:
        if rungs:
            raise ValueError(f"{path} is a black box, since {why}: leave out --rung") from why
        how = f"as a black box, since {why}; an attack with gradients would find more"
        notice(f"attacked {how}")
        found = black_box(file, range, few, study)
    else:
        how = "by gradients: its twin in torch passed the parity gate"
        attack = partial(judge.evaluate, [victim_of(file, range, run)], few, study.threat)
        found = attack(study.budget, rate=RATE, folder=study.cache, only=rungs or [])
    title = images.name if len(few) == len(every) else f"{len(few)} of {images.name}"
    found = found.on(title)
    rows = [report.row(metric, data=title, command=study.command) for metric in found.metrics]
    known = {"input": file.entry._asdict() | {"range": words}, "attacked": how}
    content = write(path, file, study, known | {"metrics": rows, "checks": found.check_rows})
    lines = [described_in_words(file, words), f"attacked {how}", report.table(rows)]
    lines += [*map(str, found.checks), str(beside(path))]
    if not rungs:
        lines += write_pages(path, content, found, gallery)
    return Outcome(content, lines, content)


def write_pages(
    path: Path, content: Row, found: Evaluation, gallery: Path | None = None
) -> list[str]:
    """The report beside the file, and the gallery; returns their names."""
    from rampart.hardening.report import page

    write = partial(page.write, card=content, rows=content["metrics"], evaluation=found)
    pictures = None
    if found.attempts:  # there are gradients to attack a picture by
        pixels = picture(None, found.images.image.shape[1])
        look = found.records[CLASSIFIER.name].victim.look
        attacked = fool(look, pixels, found.threat, QUICK)
        source = "scikit-image's CC0 cat (chelsea)."
        pictures = page.Pictures(pixels, attacked, [TABBY], source)
    lines = [str(write(report_of(path), pipeline=None, pictures=pictures))]
    if gallery:
        lines.append(str(write(gallery, pipeline=None, pictures=page.gallery(found, None))))
    return lines


def beside(path: Path) -> Path:
    """The file for the figures of an ONNX file."""
    return path.with_name(f"{path.stem}-measured.json")


def report_of(path: Path) -> Path:
    """The report page of an ONNX file."""
    return path.with_name(f"{path.stem}-report.html")


def write(path: Path, file: OnnxFile, study: Study, entries: dict[str, Any]) -> dict[str, Any]:
    """Write what was measured; returns it."""
    content = {
        "model": file.name,
        "sha256": {path.name: file.digest},
        "threat_model": str(study.threat),
        "versions": versions(),
    } | entries
    beside(path).write_text(json.dumps(content, indent=1) + "\n")
    return content


def victim_of(file: OnnxFile, range: Name, run: Callable[[Any], Any]) -> Victim:
    """The file under attack: gradients of its twin, and its own answers in 8 bits."""

    def deployed(image: Any) -> Guess:
        guess = file.logits(image.cpu().numpy(), SCALINGS[range]).argmax(1)
        return Guess(guess, np.ones(len(guess), bool), np.zeros(len(guess)))

    return label_victim("classifier", run, f"{file.digest} {range}")._replace(deployed=deployed)


def range_of(file: OnnxFile, images: Images, named: Name | None) -> tuple[Name, str]:
    """The range that pixels are wanted in, and how that is known. Raises ValueError where it is
    neither named nor to be told by accuracy.
    """
    if file.entry.type == "tensor(uint8)":
        return "bytes", "bytes, by its type"
    if named:
        return named, f"{named}, as said"
    pixels, label = images.image.numpy(), images.label.numpy()
    right = {
        name: float((file.logits(pixels, SCALINGS[name]).argmax(1) == label).mean())
        for name in NAMES
    }
    best, second = sorted(right, key=lambda name: -right[name])[:2]
    shown = ", ".join(f"{name} {share:.1%}" for name, share in right.items())
    if right[best] - right[second] < CLEAR:
        raise ValueError(
            f"{file.name} is right on {shown} of {len(label)} images, which does not decide the"
            " range: pass --range, and check that your classes are in the model's order"
        )
    return best, f"{best}, found by accuracy on {len(label)} images: {shown}"


def described_in_words(file: OnnxFile, words: str) -> str:
    """What a file takes and gives."""
    entry = file.entry
    batch = f"batches of {entry.batch}" if entry.batch else "any batch"
    text = f"{file.name} takes {entry.layout}, {entry.size} pixels a side, {batch}; range {words}"
    return f"{text}; {file.classes} classes{', its softmax cut off' if file.was_cut else ''}"


def black_box(file: OnnxFile, range: Name, images: Images, study: Study) -> Evaluation:
    """Clean accuracy, and what Square leaves (Andriushchenko et al. 2020). Raises ValueError for
    another norm than Linf.
    """
    if study.threat.norm != "Linf":
        raise ValueError("Rampart attacks a black box only within Linf: leave out --norm")
    queries, eps = FEW if study.quick else QUERIES, round(study.threat.eps * 255)
    endpoint = Local(file, range, images.classes)
    run = partial(redteam, attacks=["square"], limit=len(images), eps=eps, budget=queries)
    outcomes = run(endpoint, images, study.cache / f"{file.digest[:16]}-{range}-{eps}-{queries}")

    def answer(x: Tensor) -> Tensor:
        return torch.from_numpy(file.logits(to_uint8(x).cpu().numpy(), SCALINGS[range]))

    victim, threat = victim_of(file, range, answer), Threat("Linf", eps / 255)
    effort = f"Square, {queries:,} queries, on 8-bit images"
    square = Attack("square", "label", unmade, lambda *_: effort, lambda _: 0, "")
    rung = Rung(victim, square, threat, study.budget, effort)
    said = victim.deployed(images.image)
    clean = np.array([not outcome.clean_wrong for outcome in outcomes])
    left = np.array([outcome.success is None for outcome in outcomes])
    before, after = (Replay(right, right, ~said.accepted, said, ~right) for right in (clean, left))
    record = Record(victim, before, [(rung, after)], "")
    metrics = [record.metric("clean", clean), record.metric("square", left, rung)]
    return Evaluation(images, threat, metrics, [], {victim.name: record}, [], BLIND, "under Square")


def unmade(*_: Any, **__: Any) -> Tensor:
    """Stands where an attack makes images: Square's stay in the run of the red team."""
    raise NotImplementedError
