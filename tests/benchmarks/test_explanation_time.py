"""What `benchmarks/explanations.py` times."""

import sys
from pathlib import Path

import pytest

from rampart.handlers.budget import BATCH_SECONDS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.slow
@pytest.mark.training
def test_a_verdict_at_224_pixels_is_explained_before_the_batch_must_end(tmp_path: Path) -> None:
    import explanations

    folder, picture = explanations.pack("resnet18", 224, tmp_path)
    seconds, content = explanations.answered(folder, picture, explain=True)
    assert seconds < BATCH_SECONDS  # 3.4 on two busy cores
    for part in ("label", "suspicion"):
        assert len(content["explanation"][part]["effect"]) == 8
    _, plain = explanations.answered(folder, picture, explain=False)
    assert plain["label"] == content["label"] and "explanation" not in plain
