"""The sides that `benchmarks/engines.py` times for an object detector."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.slow
def test_sides_that_are_timed_against_each_other_find_the_same(
    scene_folder: Path, tmp_path: Path
) -> None:
    import engines

    sides = engines.scene_sides(scene_folder, tmp_path)
    assert list(sides) == ["eager", "bare, eager", "ONNX Runtime", "int8", "bare"]
    for batch in engines.SCENE_BATCHES:
        eager, bare_eager, graph, int8, bare = (run(batch) for run in sides.values())
        for one, other in ((eager[:2], graph[:2]), (bare_eager[:2], bare[:2]), (eager[:2], bare)):
            for mine, theirs in zip(one, other, strict=False):
                assert np.asarray(mine).shape == np.asarray(theirs).shape
                assert np.allclose(mine, theirs, atol=1e-2)
        assert len(graph) == 4 and len(bare) == 3  # without scores of suspicion
        assert [part.shape for part in int8] == [part.shape for part in graph]


def test_what_is_claimed_of_a_detector_holds_round_by_round() -> None:
    import engines

    rates = {"eager": [10.0] * 5, "ONNX Runtime": [20.0] * 5, "bare": [21.0] * 5}
    rates["int8"] = [30.0] * 5
    claims = engines.scene_claims_of(rates, 8)
    assert [made["ratio"] for made in claims] == [2.0, 3.0, 0.952]
    assert all(made["holds"] for made in claims)
    rates["bare"], rates["int8"] = [30.0] * 5, [14.0] * 5
    slower = engines.scene_claims_of(rates, 8)
    assert [made["holds"] for made in slower] == [True, False, False]
    assert {made["setting"] for made in slower} == {"batch 8"}
