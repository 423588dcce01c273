"""While one client does its worst over HTTP, eight others are answered as if it were not there."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile.clients import Making, Target, every_attack, good_answers, share_answered
from servers import Server

feature = pytest.mark.feature


@pytest.fixture(scope="module")
def body(encode: Callable[..., bytes], pixels: np.ndarray) -> bytes:
    return encode(pixels)


@pytest.fixture(scope="module")
def single(start: Callable[..., Server], tiny_archive: Path) -> Server:
    """A server with one worker: there is no other to answer meanwhile."""
    server = start(tiny_archive)
    assert "Rampart is ready" in server.read(), server.lines
    return server


@pytest.fixture(scope="module")
def undisturbed(single: Server, body: bytes) -> int:
    """Good answers without a hostile client."""
    return good_answers(Target(single.port, 0, "tiny"), body)


@feature("Hostile clients do not block others", "Rampart")
@every_attack(grpc=False)
@pytest.mark.slow
def test_others_get_nine_tenths_of_their_answers_and_no_worker_dies(
    attack: Making, single: Server, body: bytes, undisturbed: int
) -> None:
    target = Target(single.port, 0, "tiny")
    before = [process.pid for process in single.family()]
    assert share_answered(attack, target, body, alone=undisturbed) >= 0.9
    assert [process.pid for process in single.family()] == before
    assert sum(process.memory_info().rss for process in single.family()) < 1e9
