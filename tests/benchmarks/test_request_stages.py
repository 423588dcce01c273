"""What `benchmarks/stages.py` counts."""

import sys
from pathlib import Path

import numpy as np
import pytest

from rampart.handlers.image import as_png
from rampart.handlers.service import Service
from rampart.handlers.types import Incoming

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from stages import REST, STAGES, course


def test_every_stage_takes_a_share_and_all_of_them_are_the_request(unpacked: Path) -> None:
    service = Service.open(unpacked, {"false_alarm_rate": 0.05, "threads": 1})
    body = as_png(np.full((96, 96, 3), 90, np.uint8))
    found = course(lambda: service.answer([Incoming({}, [body])]), 0.2)
    assert list(found.shares) == [*STAGES, REST]
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in found.shares.values())
    assert 0.1 < found.milliseconds < 1000
