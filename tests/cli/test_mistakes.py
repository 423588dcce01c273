"""First mistakes at the command line: told at once, in a line that names the input and a remedy."""

import errno
import json
import shlex
import shutil
import signal
import socket
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
from mistakes import Terminal, terminal

from rampart import cli, inputs

if TYPE_CHECKING:
    from rampart.hardening.model.pipeline import DefendedClassifier

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with what people name by mistake."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("empty.npz", "empty.pth", "empty.mar", "empty.png", "empty.safetensors"):
        (folder / name).touch()
    for name in ("lfs.npz", "lfs.pth", "lfs.mar", "lfs.png"):
        (folder / name).write_text(POINTER)
    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("x", "y")
    for name in ("other.mar", "my,own.mar"):
        shutil.copy(folder / "a.zip", folder / name)
    with zipfile.ZipFile(folder / "good.mar", "w") as packed:
        packed.writestr(
            "MAR-INF/MANIFEST.json", '{"model": {"modelName": "g", "modelVersion": "1"}}'
        )
    shutil.copy(folder / "good.mar", folder / "a,b.mar")
    (folder / "page.pth").write_text("<!DOCTYPE html><title>Sign in</title>")
    (folder / "words.txt").write_text("text")
    (folder / "lfs.onnx").write_text(POINTER)
    (folder / "x.onnx").write_bytes(b"x")
    (folder / "nothing").mkdir()
    np.savez(folder / "good.npz", image=np.zeros((1, 32, 32, 3), np.uint8), label=[0])
    shutil.copytree(tiny_folder, folder / "tiny")
    lean = shutil.ignore_patterns("calibration-full.json")
    shutil.copytree(tiny_folder, folder / "bare", ignore=lean)
    (shutil.copytree(tiny_folder, folder / "pulled") / "weights.safetensors").write_text(POINTER)
    return folder


@pytest.fixture(scope="module")
def prompt(desk: Path) -> Iterator[Terminal]:
    with terminal(desk, COLUMNS="300") as opened:
        yield opened


# What is typed, the input that the answer names, and its remedy.
MISTAKES = [
    ("train --data nope --out o", "nope", "rampart download"),
    ("train --data empty.npz --out o", "empty.npz", "copy or download it again"),
    ("train --data lfs.npz --out o", "lfs.npz", "git lfs pull"),
    ("train --data nothing --out o", "nothing", "nothing/CLASS/NAME"),
    ("train --data a.zip --out o", "a.zip", "unpack it"),
    ("train --data words.txt --out o", "words.txt", "one sub-folder a class"),
    ("train --data good.npz --out words.txt/run", "words.txt", "choose another place"),
    ("train --data good.npz --out o --arch resnet19", "resnet19", "choose one of resnet10"),
    ("train --data good.npz --out o --image-size 50", "--image-size 50", "multiple of 8"),
    ("train --data good.npz --out o --method fsgm", "fsgm", "'nfgsm'"),
    ("train --data good.npz --out o --method rslad", "rslad", "--teacher go together"),
    ("train --data good.npz --out o --method pgd --steps 0", "--steps 0", "at least one step"),
    ("train --data good.npz --out o --epoch 3", "--epoch", "--epochs"),
    ("train --data good.npz --out o --batch-size all", "--batch-size", "valid integer"),
    ("train --data good.npz", "--out", "rampart train --help"),
    ("train --data good.npz --out o --init lfs.pth", "lfs.pth", "git lfs pull"),
    ("trian --data good.npz --out o", "trian", "'train'"),
    ("harden --data good.npz --out mine.zip", "mine.zip", "end in .mar"),
    ("harden --data good.npz --out my,own.mar", "my,own.mar", "letters, digits"),
    ("harden --data good.npz --out m.mar --weights empty.pth", "empty.pth", "download it again"),
    ("harden --data good.npz --out m.mar --weights page.pth", "page.pth", "weights file itself"),
    ("harden --data good.npz --out m.mar --epochs 0", "nothing to harden", "pass --weights"),
    ("harden --data good.npz --out m.mar --method rslad", "rslad", "`rampart train`"),
    ("average nope.safetensors other --out c", "nope.safetensors", "rampart train"),
    ("adopt nope.pth --arch resnet18 --classes 9 --out c", "nope.pth", "pass a .pth"),
    ("adopt lfs.pth --arch resnet18 --classes 9 --out c", "lfs.pth", "git lfs pull"),
    ("adopt nothing --arch resnet18 --classes 9 --out c", "nothing", "pass a .pth"),
    (
        "calibrate new --data good.npz --classifier empty.safetensors",
        "empty.safetensors",
        "download it again",
    ),
    ("calibrate new --data good.npz --classifier words.txt", "words.txt", "safetensors"),
    ("calibrate --archive nope.mar --images nothing", "nope.mar", "rampart archive"),
    ("purifier --data good.npz --classifier nope --out p", "nope", "rampart train"),
    ("evaluate nothing --images good.npz", "nothing", "rampart calibrate"),
    ("evaluate pulled --images good.npz", "pulled/weights.safetensors", "git lfs pull"),
    ("evaluate good.mar --images good.npz", "good.mar", "pass the folder"),
    ("evaluate tiny --images good.npz --rung pdg20", "pdg20", "pgd20"),
    ("evaluate tiny --images good.npz --variant lean", "--variant", "--rung"),
    ("evaluate tiny --images good.npz --held good.npz", "--held", "--part"),
    ("evaluate bare --images good.npz --rung pgd20 --variant full", "bare", "leave out --variant"),
    ("evaluate nope.onnx --images good.npz", "nope.onnx", "name the ONNX file"),
    ("evaluate lfs.onnx --images good.npz", "lfs.onnx", "git lfs pull"),
    ("evaluate x.onnx --images good.npz --variant lean", "x.onnx", "leave out --variant"),
    ("ablate tiny --data good.npz --row energy", "energy", "+ energy"),
    ("ablate tiny --data good.npz --row lean --test good.npz", "--test", "does not work"),
    ("quantize tiny --data good.npz --precision int4", "int4", "'int8'"),
    ("export tiny --out X.mar", "X.mar", "rampart archive"),
    ("evaluate tiny --images good.npz --int8", "int8", "rampart quantize"),
    ("export tiny --out x.onnx --precision fp16", "fp16", "rampart quantize"),
    ("export tiny", "--out FILE.onnx", "pass one of"),
    ("export tiny --tensorrt t.plan --precision int8", "int8", "fp16"),
    ("export tiny --ship --images good.npz", "--ship", "does not take --images"),
    ("export tiny --out x.onnx --model-version 2", "--model-version", "needs --triton"),
    ("export good.mar --triton t --backend python --variant lean", "good.mar", "out --variant"),
    ("export good.mar --triton t --backend python --images good.npz", "good.mar", "out --images"),
    ("archive nothing", "nothing", "rampart calibrate"),
    ("archive tiny --out x.zip", "x.zip", "end in .mar"),
    ("archive tiny --model-version two", "two", "numbers with dots"),
    ("archive tiny --plan nope.plan", "nope.plan", "check the path"),
    ("inspect nope.mar", "nope.mar", "rampart archive"),
    ("inspect a.zip", "a.zip", "pass one of these"),
    ("inspect lfs.mar", "lfs.mar", "git lfs pull"),
    ("verify empty.mar", "empty.mar", "copy or download it again"),
    ("verify good.mar --signature nope.sig --public-key words.txt", "nope.sig", "name the file"),
    ("serve --archive nope.mar", "nope.mar", "rampart archive"),
    ("serve --archive nope.mar --port PORT", "nope.mar", "rampart archive"),
    ("serve --archive a.zip", "a.zip", "pass a file of `rampart archive`"),
    ("serve --archive lfs.mar --server http", "lfs.mar", "git lfs pull"),
    ("serve --archive other.mar", "other.mar", "rebuild it"),
    ("serve --archive a,b.mar", "a,b.mar", "rename"),
    ("screen nothing --model nope.mar", "nope.mar", "rampart archive"),
    ("screen nothing --model nothing", "nothing", "rampart calibrate"),
    ("screen nothing --model bare --out words.txt", "words.txt", "a folder is expected"),
    ("screen nope --model good.mar", "nope", "there is no such file"),
    ("screen nothing --model good.mar", "nothing", "pass a folder of pictures"),
    ("screen nothing --model good.mar --out s3://bucket/a", "s3:/bucket/a", "copy what is written"),
    ("screen words.txt --model lfs.mar", "lfs.mar", "git lfs pull"),
    (
        "screen nothing --model good.mar --ray auto",
        "needs ray",
        'pip install "rampart-endpoint[ray]"',
    ),
    ("screen nothing --model good.mar --ray auto --device cuda", "cuda", "leave out --device"),
    ("attack empty.png --model tiny", "empty.png", "copy or download it again"),
    ("attack nope.png --model tiny", "nope.png", "pass a JPEG"),
    ("attack lfs.png --model tiny", "lfs.png", "git lfs pull"),
    ("uses bare --images good.npz", "bare", "pass a model that has one"),
    ("purify --model bare", "bare", "pass a model that has one"),
    ("certify --model tiny --sigma 0", "--sigma 0", "above 0"),
    ("redteam localhost:8080 good.npz", "localhost:8080", "http://127.0.0.1:8080/predictions/NAME"),
    ("redteam http://127.0.0.1:1/predictions/a good.npz --attack fgsm", "fgsm", "square"),
    ("redteam http://127.0.0.1:1/a good.npz --header token", "--header token", "NAME: VALUE"),
    ("table nothing", "nothing", "rampart calibrate"),
    ("probe --metrics http://127.0.0.1:1/metrics", "127.0.0.1:1", "start a server"),
    ("download mnist", "mnist", "cifar10"),
    ("download cifar10 words.txt", "words.txt", "choose another place"),
]


@pytest.mark.parametrize(("line", "named", "remedy"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_before_torch_is_loaded(
    prompt: Terminal, line: str, named: str, remedy: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = prompt.type(*line.replace("PORT", str(taken.getsockname()[1])).split())
    print(f"{told.seconds:.2f} s of CPU: {told.text}")
    assert told.code in (1, 2)
    assert told.text.count("\n") == 1 and "Traceback" not in told.text
    assert named in told.text and remedy in told.text
    assert not told.torch


def test_there_are_forty_of_them_and_no_verb_without_one() -> None:
    verbs = {line.split()[0] for line, *_ in MISTAKES}
    assert len(MISTAKES) >= 40
    assert {"train", "harden", "evaluate", "archive", "serve", "inspect", "attack"} <= verbs


def test_what_nobody_foresaw_is_one_line_and_its_traceback_is_there_for_the_asking(
    desk: Path,
) -> None:
    odd = shutil.copytree(desk / "tiny", desk / "odd")
    entries = {"format": "rampart-1", "config": '{"classes": []}'}
    head = json.dumps({"__metadata__": entries}).encode()
    (odd / "weights.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    with terminal(desk) as plain, terminal(desk, RAMPART_DEBUG="1") as debugging:
        told, shown = plain.type("archive", "odd"), debugging.type("archive", "odd")
    assert told.code == 1 and told.text.count("\n") == 1 and "Traceback" not in told.text
    assert "`rampart archive odd` failed (KeyError: 'classifier')" in told.text
    assert "RAMPART_DEBUG=1" in told.text
    assert "Traceback" in shown.text and "KeyError: 'classifier'" in shown.text


@pytest.mark.parametrize(
    ("words", "resumes", "part"),
    [
        (["train", "--data", "good.npz", "--out", "run"], True, "sources.survey"),
        (["harden", "--data", "good.npz", "--out", "a.mar"], True, "sources.survey"),
        (["evaluate", "tiny", "--images", "good.npz", "--rung", "pgd20"], True, "model.Model.load"),
        (["outside", "tiny", "--images", "good.npz"], True, "model.Model.load"),
        (["uses", "tiny", "--images", "good.npz"], True, "model.Model.load"),
        (["alarms", "tiny", "--data", "good.npz"], False, "model.Model.load"),
    ],
)
def test_ctrl_c_prints_the_line_that_goes_on_where_a_verb_keeps_what_it_has_done(
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    resumes: bool,
    part: str,
) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setattr("sys.argv", ["rampart", *words])

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(f"rampart.{part}", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        assert cli.main() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    (line,) = capsys.readouterr().err.splitlines()
    goes_on = f"; progress is saved. To resume: rampart {shlex.join(words)}"
    assert line == f"rampart: interrupted{goes_on if resumes else ''}"


def test_a_damaged_card_is_named(desk: Path) -> None:
    (shutil.copytree(desk / "tiny", desk / "torn") / "card.json").write_text("{")
    with terminal(desk) as opened:
        told = opened.type("archive", "torn")
    assert "torn/card.json is truncated or damaged" in told.text and "copy it again" in told.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "o/state.pt"),
            ["o/state.pt", "free some space"],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.mar"),
            ["a.mar", "change the permissions"],
        ),
        (MemoryError(), ["not enough memory", "RAMPART_DEBUG=1"]),
        (IndexError("list index out of range"), ["IndexError: list index out of range"]),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), ["rampart train", "invalid"]),
        (ValueError("a.npz is cut: copy it again"), ["a.npz is cut: copy it again"]),
    ],
)
def test_every_kind_of_error_has_words_for_people(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rampart", "train", "--data", "a.npz"])
    assert all(word in cli.told(error) for word in words)


def test_the_names_that_are_checked_early_are_those_that_there_are() -> None:
    from rampart.hardening.attack.ladder import RUNGS
    from rampart.hardening.attack.redteam import ATTACKS
    from rampart.hardening.attack.redteam.protocols import NAMES as PROTOCOLS
    from rampart.hardening.model.classifier import ACTIVATIONS, ARCHITECTURES
    from rampart.hardening.model.scaling import NAMES as SCALED
    from rampart.hardening.train.augmentation import AUGMENTATIONS, MIXTURES
    from rampart.hardening.train.methods import METHODS

    assert inputs.NETWORKS == ARCHITECTURES
    assert get_args(inputs.Method) == tuple(METHODS)
    assert get_args(inputs.Activation) == tuple(ACTIVATIONS)
    assert tuple(rung.name for rung in RUNGS) == inputs.RUNGS
    assert tuple(ATTACKS) == inputs.TEAM
    assert get_args(inputs.Protocol) == PROTOCOLS
    assert get_args(inputs.Scaled) == SCALED
    assert (*AUGMENTATIONS, "none") == inputs.AUGMENTATIONS
    assert inputs.MIXTURES == MIXTURES


def test_every_row_of_an_ablation_is_among_those_that_are_checked_early(
    tiny_pipeline: "DefendedClassifier",
) -> None:
    from rampart.hardening.judge import ablation

    names = [setup.name for setup in ablation.setups(tiny_pipeline)]
    assert [name for name in inputs.ROWS if name != "+ rectified"] == names
