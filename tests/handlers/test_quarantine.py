"""Flagged images kept aside: which, how many, and what is in them."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_defended import context, png

from handlers import quarantine
from handlers.defended import DefendedHandler
from handlers.quarantine import Quarantine
from handlers.verdict import Verdict

VERDICT = Verdict(
    label="a", index=0, confidence=0.5, decision="flag", top=(), model={"name": "m"}, detail=None,
    p_value=0.004, detected=True, failed=False,
)  # fmt: skip


@pytest.fixture
def serving(unpacked: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The answer of a handler with these settings, and a quarantine, to an image."""

    def answer(image: np.ndarray, **settings: object) -> dict[str, Any]:
        made = context(unpacked, requests=1)
        made.model_yaml_config = {"rampart": {"quarantine": str(tmp_path / "aside"), **settings}}
        handler = DefendedHandler()
        handler.initialize(made)
        return json.loads(handler.handle([{"body": png(image)}], made)[0])

    return answer


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_is_flagged_is_kept_as_the_model_saw_it_with_its_verdict(
    serving: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    answer = serving(noise, false_alarm_rate=0.999, on_detection="shadow")
    assert answer["decision"] == "accept"
    (path,) = kept(tmp_path / "aside")
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), noise)
        content = json.loads(picture.text["rampart"])
    assert content == answer | {"p_value": pytest.approx(answer["detail"]["p_value"], rel=1e-4)}
    assert (tmp_path / "aside").stat().st_mode & 0o077 == 0


def test_what_is_not_flagged_is_not_kept(
    serving: Callable[..., dict[str, Any]], tmp_path: Path, pixels: np.ndarray
) -> None:
    serving(pixels, false_alarm_rate=0)
    assert kept(tmp_path / "aside") == []


def test_only_the_newest_files_stay_and_others_files_are_left_alone(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "FILES", 3)
    monkeypatch.setattr(quarantine, "PER_SECOND", 100)
    for number in range(5):
        (tmp_path / f"mine-{number}.png").write_text("mine")
    aside = Quarantine(tmp_path)
    for level in range(6):
        aside.keep(np.full((8, 8, 3), level, dtype=np.uint8), VERDICT)
    levels = []
    for path in kept(tmp_path)[5:]:
        assert path.stat().st_mode & 0o077 == 0
        with Image.open(path) as picture:
            levels.append(picture.getpixel((0, 0))[0])
    assert levels == [3, 4, 5] and len(kept(tmp_path)) == 8


def test_a_flood_is_kept_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine.time, "time", lambda: 1_000.0)
    aside = Quarantine(tmp_path)
    for _ in range(20):
        aside.keep(np.zeros((8, 8, 3), dtype=np.uint8), VERDICT)
    assert len(kept(tmp_path)) == quarantine.PER_SECOND


def test_a_folder_that_cannot_be_written_to_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"quarantine /proc/aside: .*Name a folder"):
        Quarantine(Path("/proc/aside"))


def test_a_full_disk_is_one_log_line_and_no_error(tmp_path: Path) -> None:
    code = """if True:
        import logging, resource, sys
        from pathlib import Path
        import numpy as np
        from test_quarantine import VERDICT
        from handlers.quarantine import Quarantine
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        aside = Quarantine(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        for _ in range(3):
            aside.keep(noise, VERDICT)
        print(aside.works)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        aside.keep(noise, VERDICT)
        print(aside.works)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    here = str(Path(__file__).parent)  # first: the whole suite knows several files `conftest`
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.stdout.splitlines() == [
        "Nothing goes into quarantine: File too large",
        "False",
        "True",
    ], out.stderr
    assert [path.suffix for path in kept(tmp_path)] == [".png"]


def test_without_the_setting_nothing_is_kept(
    unpacked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handler = DefendedHandler()
    handler.initialize(context(unpacked))
    assert handler._quarantine is None
