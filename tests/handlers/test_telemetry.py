"""The figures of a model in memory."""

from dataclasses import replace

import pytest

from rampart.handlers import telemetry
from rampart.handlers.telemetry import Metrics, Pulse
from rampart.handlers.verdict import Verdict

IMAGES = ("rampart_images_total", ("accept",))


def verdict(p_value: float) -> Verdict:
    return Verdict("cat", 3, 0.5, "accept", (), {}, None, p_value, False, False)


def test_drift_is_told_of_a_hundred_images_on() -> None:
    figures = Metrics()
    figures.calibration_images = 900
    for number in range(99):
        figures.count_verdict(verdict((number + 1) / 200))  # below 0.5, where half should be above
    assert ("rampart_drift", ()) not in figures.take()
    figures.count_verdict(verdict(0.5))
    changes = figures.take()
    assert changes["rampart_drift", ()] == pytest.approx(0.5)
    assert changes["rampart_drift_limit", ()] == pytest.approx(0.143357, abs=1e-6)
    assert figures.take() == {}  # nothing new


def test_shadows_and_failures_of_the_defence_are_counted() -> None:
    figures = Metrics()
    figures.count_verdict(replace(verdict(0.001), detected=True))
    figures.count_verdict(replace(verdict(0.001), detected=True, decision="flag"))
    figures.count_verdict(replace(verdict(1.0), failed=True))
    found = figures.take()
    assert found["rampart_p_value_count", ()] == 2  # the third has none that counts
    for decision in ("shadow", "flag", "accept"):
        assert found["rampart_images_total", (decision,)] == 1
    assert found["rampart_errors_total", ("defence_failure",)] == 1


def test_changes_are_taken_once() -> None:
    figures = Metrics()
    figures.count_verdict(verdict(0.5))
    assert figures.take()[IMAGES] == 1
    figures.count_verdict(verdict(0.5))
    figures.set("rampart_quarantine_up", 1.0)
    changes = figures.take()
    assert changes[IMAGES] == 1 and changes["rampart_quarantine_up", ()] == 1
    figures.set("rampart_quarantine_up", 1.0)  # told again: another worker may have said 0
    assert figures.take() == {("rampart_quarantine_up", ()): 1.0}


def test_figures_take_no_more_memory_however_many_there_are() -> None:
    figures = Metrics()
    for number in range(3000):
        figures.observe("rampart_stage_seconds", number / 1000, "graph")
    found = figures.take()
    assert found["rampart_stage_seconds_bucket", ("graph", "0.001")] == 2
    assert found["rampart_stage_seconds_bucket", ("graph", "+Inf")] == 3000
    assert len(found) == len(telemetry.BOUNDS["rampart_stage_seconds"]) + 3


def test_a_batch_that_never_ends_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = Pulse()
    assert pulse.alive()
    with pulse.busy():
        assert pulse.alive()
        monkeypatch.setattr(telemetry, "STUCK", 0.0)
        assert not pulse.alive()
    assert pulse.alive()
