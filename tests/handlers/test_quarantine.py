"""Flagged images kept aside: which, how many, and what is in them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import ask, png
from PIL import Image
from test_private_folder import give_away

from rampart.handlers import quarantine
from rampart.handlers.quarantine import Quarantine
from rampart.handlers.service import Service
from rampart.handlers.verdict import Verdict

VERDICT = Verdict(
    label="a", index=0, confidence=0.5, decision="flag", top=(), model={"name": "m"}, detail=None,
    p_value=0.004, detected=True, failed=False,
)  # fmt: skip
BLACK = np.zeros((8, 8, 3), dtype=np.uint8)
DELAY = quarantine.DELAY


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "DELAY", (0, 0))


def flush(aside: Quarantine) -> None:
    """Wait until every image so far is written or dropped."""
    aside._waiting.join()


@pytest.fixture
def serving(unpacked: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The answer of a service with these settings, and a quarantine, to an image."""

    def answer(image: np.ndarray, **settings: object) -> dict[str, Any]:
        service = Service.open(unpacked, {"quarantine": str(tmp_path / "aside"), **settings})
        answer = ask(service, png(image))
        assert service._quarantine is not None
        flush(service._quarantine)
        return answer

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
    flush(aside)
    levels = []
    for path in kept(tmp_path)[5:]:
        assert path.stat().st_mode & 0o077 == 0
        with Image.open(path) as picture:
            levels.append(picture.getpixel((0, 0))[0])
    assert levels == [3, 4, 5] and len(kept(tmp_path)) == 8


def test_a_flood_is_kept_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine.time, "monotonic", lambda: 1_000.0)
    aside = Quarantine(tmp_path)
    for _ in range(20):
        aside.keep(BLACK, VERDICT)
    flush(aside)
    assert len(kept(tmp_path)) == quarantine.PER_SECOND
    assert aside.dropped == 20 - quarantine.PER_SECOND
    assert [aside.take_dropped(), aside.take_dropped()] == [20 - quarantine.PER_SECOND, 0]


def test_five_a_second_are_kept_however_long_each_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "DELAY", DELAY)
    aside, began = Quarantine(tmp_path), time.monotonic()
    for number in range(20):
        time.sleep(max(0.0, began + 0.22 * number - time.monotonic()))
        aside.keep(BLACK, VERDICT)
    flush(aside)
    assert len(kept(tmp_path)) == 20 and aside.take_dropped() == 0


def test_a_disk_that_hangs_holds_up_no_answer_and_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "PER_SECOND", 1_000)
    hangs, goes_on = threading.Event(), threading.Event()
    write = Quarantine._write

    def wait(self: Quarantine, flagged: quarantine.Flagged) -> None:
        hangs.set()
        assert goes_on.wait(60)
        write(self, flagged)

    monkeypatch.setattr(Quarantine, "_write", wait)
    aside = Quarantine(tmp_path)
    aside.keep(BLACK, VERDICT)
    assert hangs.wait(60)
    for _ in range(100):
        aside.keep(BLACK, VERDICT)
    assert kept(tmp_path) == []
    assert aside.dropped == 100 - quarantine.WAITING
    goes_on.set()
    flush(aside)
    assert len(kept(tmp_path)) == 1 + quarantine.WAITING


def test_nothing_is_written_while_the_answer_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "DELAY", DELAY)
    aside = Quarantine(tmp_path)
    began = time.monotonic()
    aside.keep(BLACK, VERDICT)
    time.sleep(0.1)
    seen, took = kept(tmp_path), time.monotonic() - began
    assert seen == [] or took > 0.2
    flush(aside)
    assert len(kept(tmp_path)) == 1


def test_names_sort_by_age_also_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second that turns over, a clock that stands still, and one that goes back.
    times = iter([10**18 - 1, 10**18, 10**18, 10**18 - 5 * 10**9])
    monkeypatch.setattr(quarantine.time, "time_ns", lambda: next(times))
    monkeypatch.setattr(quarantine.time, "monotonic", lambda: 1_000.0)
    aside = Quarantine(tmp_path)
    for level in range(4):
        aside.keep(np.full((8, 8, 3), level, dtype=np.uint8), VERDICT)
    flush(aside)
    levels = []
    for path in kept(tmp_path):
        with Image.open(path) as picture:
            levels.append(picture.getpixel((0, 0))[0])
    assert levels == [0, 1, 2, 3]
    assert kept(tmp_path)[1].name.startswith("rampart-20010909T014640-000000000-")


def test_a_folder_that_fails_at_the_start_is_one_log_line_and_is_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "aside"
    folder.write_text("in the way")
    aside = Quarantine(folder)
    aside.keep(BLACK, VERDICT)
    flush(aside)
    assert caplog.messages == [f"Cannot write to quarantine {folder}: File exists"]
    assert not aside.works and aside.dropped == 1
    folder.unlink()
    aside.keep(BLACK, VERDICT)
    flush(aside)
    assert not aside.works and aside.dropped == 2 and not folder.exists()
    monkeypatch.setattr(quarantine, "RETRY", 0)
    aside.keep(BLACK, VERDICT)
    flush(aside)
    assert aside.works and len(kept(folder)) == 1


def test_a_folder_that_cannot_be_written_to_lets_the_server_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not Quarantine(Path("/proc/aside")).works
    (message,) = caplog.messages
    assert message.startswith("Cannot write to quarantine /proc/aside: ")


def test_a_folder_that_is_not_ours_alone_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, public, link = (tmp_path / name for name in ("theirs", "public", "link"))
    for folder in (theirs, public):
        folder.mkdir(mode=0o700)
    public.chmod(0o701)
    link.symlink_to(tmp_path)
    give_away(theirs, monkeypatch)
    folders = (theirs, public, link)
    for folder in folders:
        aside = Quarantine(folder)
        aside.keep(BLACK, VERDICT)
        flush(aside)
        assert not aside.works
    reasons = ("belongs to somebody else: chmod 700", "is open to others: chmod 700", "is a link")
    for folder, reason, message in zip(
        (theirs, public, link), reasons, caplog.messages, strict=True
    ):
        assert f"{folder} {reason}" in message
    assert sorted(tmp_path.iterdir()) == [link, public, theirs]
    assert not kept(theirs) and not kept(public)


def test_a_full_disk_is_one_log_line_and_no_error(tmp_path: Path) -> None:
    code = """if True:
        import logging, resource, sys
        from pathlib import Path
        import numpy as np
        from test_quarantine import VERDICT, flush
        from rampart.handlers import quarantine
        from rampart.handlers.quarantine import Quarantine
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        aside = Quarantine(Path(sys.argv[1]))
        quarantine.RETRY = 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        for _ in range(3):
            aside.keep(noise, VERDICT)
            flush(aside)
        print(aside.works)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        aside.keep(noise, VERDICT)
        flush(aside)
        print(aside.works)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    here = str(Path(__file__).parent)  # first: the whole suite knows several files `conftest`
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.stdout.splitlines() == [
        f"Cannot write to quarantine {tmp_path}: File too large",
        "False",
        "True",
    ], out.stderr
    assert [path.suffix for path in kept(tmp_path)] == [".png"]


def test_without_the_setting_nothing_is_kept(unpacked: Path) -> None:
    assert Service.open(unpacked)._quarantine is None
