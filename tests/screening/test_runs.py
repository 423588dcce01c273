"""Whole runs by processes of their own: killed, resumed, interrupted, refused."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import deadly
import psutil
import pytest
from command import run as typed
from full_disk import full
from screened import folder, pack, picture, table

from rampart.screening.parts import Tally
from rampart.screening.run import FILE, PARTS, Bar, claimed
from rampart.screening.screen import Wanted, screen
from rampart.screening.shards import Shard

pytestmark = pytest.mark.server  # each starts processes, for seconds
EACH, SHARDS = 40, 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tar files of EACH pictures, one of which is none."""
    home = tmp_path_factory.mktemp("store")
    some = [picture(number) for number in range(EACH - 1)]
    for shard in range(SHARDS):
        content = {f"{shard}-{number}.png": data for number, data in enumerate(some)}
        pack(home / f"{shard:03d}.tar", content | {f"{shard}-bad.png": b"?"})
    return home


def names(out: Path) -> Counter[str]:
    return Counter(row["name"] for row in table(out / PARTS))


def every(count: int = SHARDS) -> Counter[str]:
    each = [*map(str, range(EACH - 1)), "bad"]
    return Counter(f"{shard}-{name}.png" for shard in range(count) for name in each)


@pytest.fixture
def start(store: Path, tiny_archive: Path, tmp_path: Path) -> Iterator[Callable[[], "Run"]]:
    """Starts the command, and ends what is left of it."""
    runs: list[subprocess.Popen[str]] = []

    def begin() -> "Run":
        words = [
            sys.executable,
            "-m",
            "rampart",
            "screen",
            str(store),
            "--out",
            str(tmp_path / "o"),
        ]
        words += ["--model", str(tiny_archive), "--workers", "2"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # In the background of a script SIGINT arrives ignored, and Python leaves it so.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(words, text=True, start_new_session=True, **pipes)
        runs.append(process)
        return Run(process, tmp_path / "o")

    yield begin
    for process in runs:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Run:
    """A command at work."""

    def __init__(self, process: "subprocess.Popen[str]", out: Path) -> None:
        self.process, self.out = process, out

    def parts(self) -> int:
        return len(list((self.out / PARTS).glob("*.parquet")))

    def until(self, parts: int) -> None:
        end = time.monotonic() + 60
        while self.parts() < parts:
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.01)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def test_a_run_that_is_killed_twice_goes_on_and_has_every_picture_once(
    start: Callable[[], Run],
    wait_gone: Callable[[list[psutil.Process]], list[psutil.Process]],
) -> None:
    counts = [0]
    for more in (1, 2):
        run = start()
        run.until(counts[-1] + more)
        family = run.family()
        run.process.kill()  # the parent alone: its processes are to end with it
        run.process.wait()
        assert wait_gone(family) == []
        counts.append(run.parts())
    assert 0 < counts[1] < counts[2] < SHARDS
    before = {file.name: file.stat().st_mtime_ns for file in (run.out / PARTS).glob("*.parquet")}
    run = start()
    said, _ = run.process.communicate(timeout=120)
    assert run.process.returncode == 0, said
    assert names(run.out) == every()
    for name, when in before.items():
        assert (run.out / PARTS / name).stat().st_mtime_ns == when
    assert {file.suffix for file in (run.out / PARTS).iterdir()} == {".parquet"}
    assert f"{SHARDS * EACH} pictures in {SHARDS} shards" in said
    assert f"{SHARDS} without a verdict (column `error`): unsupported_format {SHARDS}" in said
    assert json.loads((run.out / "summary.json").read_text())["flagged"]["n"] == SHARDS * (EACH - 1)


def test_a_run_outlives_one_of_its_processes(start: Callable[[], Run]) -> None:
    run = start()
    run.until(1)
    screening = [one for one in run.family() if "spawn_main" in " ".join(one.cmdline())]
    assert len(screening) == 2
    screening[0].kill()
    said, _ = run.process.communicate(timeout=120)
    assert run.process.returncode == 0, said
    assert names(run.out) == every()


@pytest.mark.slow
def test_a_picture_that_kills_its_process_each_time_ends_its_shard_alone_which_is_named(
    tiny_archive: Path, tmp_path: Path
) -> None:
    source, others = deadly.listed(tmp_path / "store")
    (tmp_path / "sitecustomize.py").write_text(deadly.CODE)
    words = ["screen", source, "--model", tiny_archive, "--out", tmp_path / "o", "--workers", 2]
    done = subprocess.run(
        [sys.executable, "-m", "rampart", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"no verdicts, such as {source}/000001 (its process died 2 times" in done.stderr
    assert names(tmp_path / "o") == Counter(others)
    assert f"{len(others):,} pictures in 3 shards" in done.stdout


def test_ctrl_c_ends_all_of_it_and_says_how_to_go_on(
    start: Callable[[], Run],
    wait_gone: Callable[[list[psutil.Process]], list[psutil.Process]],
) -> None:
    run = start()
    run.until(1)
    os.killpg(run.process.pid, signal.SIGSTOP)  # or it might be done before we ask it to end
    family = run.family()
    os.killpg(run.process.pid, signal.SIGINT)
    os.killpg(run.process.pid, signal.SIGCONT)
    said, _ = run.process.communicate(timeout=60)
    assert run.process.returncode == 130
    assert "progress is saved. To resume: rampart screen" in said
    assert "Traceback" not in said
    assert wait_gone(family) == []
    assert 0 < run.parts() < SHARDS


def test_a_shard_that_changed_is_screened_anew_and_what_is_new_is_added(
    tiny_archive: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (store / "sub").mkdir(parents=True)
    good = pack(tmp_path / "b.tar", {"1.png": picture(1), "2.png": picture(2)}).read_bytes()
    pack(store / "a.tar", {"0.png": picture(0)})
    (store / "b.tar").write_bytes(good[:1500])
    about = (store / "b.tar").stat()
    first = screen(str(store), tiny_archive, tmp_path / "o", workers=1).figures
    assert first["errors"] == {"unreadable": 1}
    (store / "b.tar").write_bytes(good)
    pack(store / "c.tar", {"3.png": picture(3)})
    os.utime(store / "b.tar", ns=(about.st_atime_ns, about.st_mtime_ns))
    second = screen(str(store), tiny_archive, tmp_path / "o", workers=1).figures
    assert (second["images"], second["errors"]) == (4, {})
    assert names(tmp_path / "o") == Counter(["0.png", "1.png", "2.png", "3.png"])
    (store / "c.tar").unlink()
    third = screen(str(store), tiny_archive, tmp_path / "o", workers=1).figures
    assert third["images"] == 3 == names(tmp_path / "o").total()


def test_a_picture_that_was_missing_is_asked_for_again(tiny_archive: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("0.png\n1.png\n")
    folder(tmp_path, {"0.png": picture(0)})
    runs = []
    for _ in range(2):
        source = str(tmp_path / "list.txt")
        runs.append(screen(source, tiny_archive, tmp_path / "o", workers=1).figures)
        folder(tmp_path, {"1.png": picture(1)})
    assert [run["errors"] for run in runs] == [{"unreadable": 1}, {}]


def test_a_model_folder_that_ships_its_graph_screens_without_torch(
    tiny_shipped: Path, tmp_path: Path
) -> None:
    store = folder(tmp_path / "store", {"1.png": picture(1)})
    code = (
        "import sys; from rampart import cli; sys.argv[0] = 'rampart'; code = cli.main();"
        " print(code, 'torch' in sys.modules, 'scipy' in sys.modules)"
    )
    words = ["screen", str(store), "--model", str(tiny_shipped), "--out", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--workers", "1"], capture_output=True, text=True
    )
    assert done.stdout.endswith("None False False\n"), done.stdout + done.stderr
    assert names(tmp_path / "o").total() == 1


def test_a_full_disk_makes_no_folder_forget_whose_verdicts_it_holds(
    tiny_archive: Path, tmp_path: Path
) -> None:
    store = folder(tmp_path / "store", {"1.png": picture(1)})
    out = tmp_path / "o"
    screen(str(store), tiny_archive, out, workers=1)
    content = json.loads((out / FILE).read_text())
    with full(0), claimed(out, content):  # the same run again: nothing is written
        pass
    assert json.loads((out / FILE).read_text()) == content
    (out / FILE).write_text("")
    with (
        pytest.raises(ValueError, match=r"o has verdicts, but its screen.json is damaged: choose"),
        claimed(out, content),
    ):
        pass
    new = tmp_path / "new"
    with pytest.raises(OSError, match="File too large"), full(5), claimed(new, content):
        pass
    with claimed(new, content):
        assert json.loads((new / FILE).read_text()) == content


def test_near_duplicates_of_rows_that_are_left_out_are_refused(
    tiny_archive: Path, tmp_path: Path
) -> None:
    wanted = Wanted(only_flagged=True, near_duplicates=True)
    with pytest.raises(ValueError, match="--only-flagged leaves rows out"):
        screen(str(tmp_path), tiny_archive, tmp_path / "o", wanted, workers=1)


def test_copies_that_are_wanted_later_are_those_of_another_run(
    tiny_archive: Path, tmp_path: Path
) -> None:
    store = folder(tmp_path / "store", {"1.png": picture(1)})
    screen(str(store), tiny_archive, tmp_path / "o", workers=1)
    wanted = Wanted(copies=tmp_path / "copies")
    with pytest.raises(ValueError, match=r"another run \(copies\): choose another --out"):
        screen(str(store), tiny_archive, tmp_path / "o", wanted, workers=1)


def test_a_folder_of_another_run_is_refused(tiny_archive: Path, tmp_path: Path) -> None:
    store = folder(tmp_path / "store", {"1.png": picture(1)})
    out = tmp_path / "o"
    typed("screen", store, "--model", tiny_archive, "--out", out, "--workers", 1)
    with pytest.raises(ValueError, match=r"another run \(only_flagged\): choose another --out"):
        screen(str(store), tiny_archive, out, Wanted(only_flagged=True), workers=1)
    with (
        claimed(out, json.loads((out / FILE).read_text())),
        pytest.raises(ValueError, match="another run writes to"),
    ):
        screen(str(store), tiny_archive, out, workers=1)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_estimates_its_total_by_weight_and_tells_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rampart.screening.run.POLL", 0.05)
    monkeypatch.setattr(sys, "stderr", shown := Screen())
    shards = [Shard(str(n), "tar", (), "", weight) for n, weight in enumerate((10, 20, 10))]
    futures = [Future[Tally | str]() for _ in shards]
    bar = Bar(shards, lambda: 150)  # 50 of them of a shard that is not done
    time.sleep(0.2)  # or it is too soon to draw it again
    futures[0].set_result(Tally(images=100))
    threading.Timer(0.4, futures[1].set_result, ["cut"]).start()
    threading.Timer(0.5, futures[2].set_result, [Tally(images=50)]).start()
    with bar:
        done = [shard.address for shard, _ in bar.watch(dict(zip(futures, shards, strict=True)))]
    assert done == ["0", "1", "2"]
    lines = shown.getvalue().split("\r")
    (first,) = [line for line in lines if "/400 [" in line]  # a quarter of the weight is done
    assert re.search(r"150/400 \[00:0\d<00:0\d, [\d.]+ images/s\]", first), first
    assert "150/150 [" in lines[-1]  # nobody knows how many the second had


def test_tallies_add_up() -> None:
    one, other = Tally(2, 1), Tally(3, 0)
    one.errors["cut"] = other.errors["cut"] = 1
    one.add(other)
    assert (one.images, one.detected, one.errors["cut"], one.judged) == (5, 1, 2, 3)
