"""What tests of query stores share."""

import pytest
from clock import Clock

from rampart.handlers.queries import stores, watch


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Redis on a busy machine: what serves waits for a tenth of a second."""
    monkeypatch.setattr(stores, "TIMEOUT", 30.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The stores' and the watch's."""
    clock = Clock()
    monkeypatch.setattr(stores, "time", clock)
    monkeypatch.setattr(watch, "time", clock)
    return clock
