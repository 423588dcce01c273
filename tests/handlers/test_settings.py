"""What an operator may set, and where it comes from."""

import pytest

from rampart.handlers import settings
from rampart.handlers.settings import override, read_max_pixels, read_policy, read_threads


def test_threads_come_from_settings_or_the_share_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "available_cores", lambda: 8)
    assert [read_threads({}, workers) for workers in (1, 3, 8, 9)] == [8, 2, 1, 1]
    assert read_threads({"threads": 3}, 1) == 3


def test_the_environment_comes_before_the_archives_own_settings() -> None:
    own = {"threads": 3, "device": "cuda", "detail": "public"}
    assert override(own, {}) == override(own, {"RAMPART_THREADS": ""}) == own
    environment = {"RAMPART_THREADS": "5", "RAMPART_QUARANTINE": "/q", "RAMPART_QUERY_STORE": "/s"}
    news = override(own, environment | {"RAMPART_DEVICE": "cpu", "PATH": "/bin"})
    assert news == {
        "threads": "5", "device": "cpu", "detail": "public", "quarantine": "/q", "query_store": "/s"
    }  # fmt: skip
    assert read_threads(news, 1) == 5


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown rampart setting"):
        read_policy({"false_alarm": 0.1})
    for pixels in (10, 1e6, "many", True):
        with pytest.raises(ValueError, match="max_pixels must be a whole number from 1024"):
            read_max_pixels({"max_pixels": pixels}, 32)
