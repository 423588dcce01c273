"""With `detail: public` an answer tells its verdict and nothing of how it came about."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import Server
from test_defended import png

from export.archive import archive
from handlers.engine import Engine
from handlers.verdict import Calibration, Judge, Policy
from hardening.data import Images

VARIES = {"x-request-id", "date"}


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


def test_bodies_headers_and_status_of_rejected_images_are_the_same(
    launch: Callable[..., Server],
    tiny_folder: Path,
    tiny_images: Images,
    unpacked: Path,
    tiny_calibration: Calibration,
    tmp_path: Path,
) -> None:
    policy = {"detail": "public", "on_detection": "reject", "false_alarm_rate": 0.9}
    archive(tiny_folder, tmp_path / "tiny.mar", settings={"rampart": policy})
    noise = np.random.default_rng(0)
    images = np.concatenate(
        [
            tiny_images.image[:40].numpy(),
            noise.integers(0, 256, (10, 32, 32, 3)),
            np.repeat(noise.integers(0, 256, (10, 32, 1, 3)), 32, axis=2),
            np.clip(tiny_images.image[:20].numpy() + noise.normal(0, 20, (20, 32, 32, 3)), 0, 255),
        ]
    ).astype(np.uint8)
    server = launch(tmp_path / "tiny.mar")
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    answers = [requests.post(server.url, data=png(image), timeout=60) for image in images]
    rejected = [number for number, a in enumerate(answers) if a.json()["decision"] == "reject"]
    scores = Engine(unpacked / "graph.onnx").run(images[rejected]).scores
    pairs = zip(scores.T, tiny_calibration.knots, strict=True)
    ranks = np.stack([(column[:, None] > knots).mean(axis=1) for column, knots in pairs])
    assert len(set(ranks.argmax(axis=0).tolist())) >= 3  # detectors that found them
    told = {
        (
            answers[number].status_code,
            answers[number].content,
            tuple(sorted((k, v) for k, v in answers[number].headers.items() if k not in VARIES)),
        )
        for number in rejected
    }
    assert len(told) == 1, told
    assert server.end() == 0
