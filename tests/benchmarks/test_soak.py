"""What `benchmarks/soak.py` finds, in made-up runs and in a short real one."""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import soak
from load import Load, Slip
from outages import OUTAGES
from soak import Outcome, Soak, growth, lost_images, near_told, recovery, report

from rampart.handlers.quarantine import FILES

BEGAN = 1000.0
KILL = OUTAGES["kill"]


@pytest.fixture
def quiet() -> Iterator[Soak]:
    """A soak of which nothing is wrong yet, with an outage 10 s after its start."""
    load = Load("http://127.0.0.1:1/predictions/x", np.zeros((2, 32, 32, 3), np.uint8), 0.05)
    load.expected = [{"label": "cat", "decision": "accept", "confidence": 0.9}] * 2
    load.near = [(BEGAN + second, True) for second in range(60)]
    run = Soak.__new__(Soak)
    run.load, run.ended = load, []
    run.sizes = [300.0] * 30
    run.outcomes = [Outcome("kill", BEGAN + 10, BEGAN + 10, 4.0, [])]
    load.threads = [None] * 3  # type: ignore[list-item]
    yield run


def held(run: Soak) -> bool:
    return report(run, BEGAN)[1]


def row(run: Soak) -> str:
    return report(run, BEGAN)[0][-1]


def test_a_run_in_which_all_is_right_holds(quiet: Soak) -> None:
    assert held(quiet)
    assert row(quiet).split() == ["kill", "10", "0", "4.0", "right"]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, False),
        ({"confidence": 0.905}, False),
        ({"confidence": 0.88}, True),
        ({"label": "dog"}, True),
        ({"decision": "flag"}, True),
        ({"label": None}, True),
    ],
)
def test_an_answer_is_wrong_where_label_decision_or_confidence_is_another(
    quiet: Soak, change: dict[str, object], wrong: bool
) -> None:
    assert bool(quiet.load.wrong(1, quiet.load.expected[1] | change)) is wrong


@pytest.mark.parametrize(
    ("second", "lost", "holds"),
    [
        (9.0, True, False),  # before the kill
        (10.0 + KILL.window / 2, True, True),
        (10.0 + KILL.window / 2, False, False),  # no kill excuses a wrong answer
        (11.0 + KILL.window, True, False),
    ],
)
def test_only_what_is_lost_shortly_after_a_kill_was_in_flight(
    quiet: Soak, second: float, lost: bool, holds: bool
) -> None:
    quiet.load.slips = [Slip(BEGAN + second, lost, "good: 500")]
    assert held(quiet) is holds
    assert (row(quiet).split()[2] == "1") is (lost and 10 <= second < 10 + KILL.window)
    assert any("good: 500" in line for line in report(quiet, BEGAN)[0]) is not holds


def test_more_than_each_client_had_in_flight_is_too_much(quiet: Soak) -> None:
    quiet.load.slips = [Slip(BEGAN + 11, True, "cut")] * 3
    assert held(quiet)
    quiet.load.slips *= 2
    assert not held(quiet) and "6 requests cut of 3 clients" in row(quiet)


def test_no_request_may_be_lost_where_no_worker_was_killed(quiet: Soak) -> None:
    quiet.outcomes = [quiet.outcomes[0]._replace(name="swap")]
    assert held(quiet)
    quiet.load.slips = [Slip(BEGAN + 11, True, "cut")]
    assert not held(quiet)


def test_a_recovery_that_is_late_or_never_comes_is_told_with_what_is_missing() -> None:
    begin = time.monotonic()

    def missing() -> str:
        return "" if time.monotonic() - begin > 0.5 else "the count of alerts"

    back, late = recovery(missing, 5)
    assert 0.4 < back < 5 and not late
    assert recovery(lambda: "workers", 0.3) == (math.inf, ["not right within 0.3 s: workers"])
    slow = iter(["the count of alerts", ""])  # right, but only once the time was over

    def late_answer() -> str:
        time.sleep(0.4)
        return next(slow)

    back, late = recovery(late_answer, 0.7)
    assert math.isinf(back) and late[0].startswith("not right within 0.7 s: only after")


def test_what_an_outage_left_wrong_is_told(quiet: Soak) -> None:
    quiet.outcomes = [quiet.outcomes[0]._replace(wrong=["3 quarantined images are gone"])]
    assert not held(quiet) and row(quiet).endswith("3 quarantined images are gone")


def test_a_worker_that_ended_by_itself_and_memory_that_grows_are_told(quiet: Soak) -> None:
    quiet.sizes = [300.0] * 20 + [349.0] * 10
    assert held(quiet)
    quiet.sizes = [300.0] * 20 + [351.0] * 10
    assert growth(quiet.sizes) == 51 and not held(quiet)
    quiet.sizes = [300.0]
    assert held(quiet)
    quiet.ended = ["1 workers ended between outages"]
    assert not held(quiet)


def test_near_queries_must_be_told_outside_of_outages(quiet: Soak) -> None:
    near = [(BEGAN + second, not 10 <= second <= 14) for second in range(60)]
    assert near_told(near, quiet.outcomes) == (55, 55)
    quiet.load.near = near
    assert held(quiet)
    quiet.load.near = [(when, known and when > BEGAN + 8) for when, known in near]
    assert not held(quiet)


def test_only_the_oldest_quarantined_images_may_go_and_only_for_new_ones() -> None:
    before = {f"rampart-{number:06}.png" for number in range(FILES)}
    later = {f"rampart-{number:06}.png" for number in range(20, FILES + 20)}
    assert lost_images(before, later) == 0
    assert lost_images(before, before - {"rampart-000500.png"}) == 1
    assert lost_images({"rampart-000000.png"}, {"rampart-000001.png"}) == 1


@pytest.mark.slow
@pytest.mark.server
def test_a_short_soak_with_a_kill_holds(tiny_shipped: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    command = [sys.executable, soak.__file__, "--model", str(tiny_shipped), "--minutes", "0.3"]
    command += ["--faults", "kill", "--store", "folder", "--pause", "0.2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert "wrong or failed: 0" in lines
    assert lines[-1].startswith("kill ") and lines[-1].endswith(" right")
