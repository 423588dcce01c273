"""With `detail: public` an answer tells its verdict and nothing of how it came about."""

import json

import numpy as np
import pytest

from rampart.handlers.verdict import Calibration, Judge, Policy


@pytest.mark.parametrize("on_detection", ["flag", "reject", "shadow"])
def test_whichever_detector_it_was_the_answer_is_the_same(
    tiny_calibration: Calibration, on_detection: str
) -> None:
    policy = Policy(0.05, on_detection=on_detection, detail="public")
    judge = Judge(tuple("abcdefghij"), tiny_calibration, policy, {"name": "m", "version": "1"})
    alarming = np.diag(tiny_calibration.knots[:, -1] + 10 * np.ptp(tiny_calibration.knots, axis=1))
    calm = np.broadcast_to(tiny_calibration.knots[:, 0], alarming.shape)
    scores = np.where(np.eye(len(alarming), dtype=bool), alarming, calm).astype(np.float32)
    logits = np.tile(np.arange(10, dtype=np.float32), (len(scores), 1))
    verdicts = judge.verdicts(logits, logits[:, ::-1], scores)
    assert all(verdict.detected for verdict in verdicts) and len(verdicts) >= 5
    assert len({json.dumps(verdict.to_dict()) for verdict in verdicts}) == 1
