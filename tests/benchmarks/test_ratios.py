import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ratios


def test_the_lower_bound_lies_below_the_median_and_tightens_with_agreement() -> None:
    loose, tight = np.array([1.0, 1.5, 2.0, 2.5, 3.0]), np.array([1.9, 1.95, 2.0, 2.05, 2.1])
    assert ratios.lower_bound(loose) < ratios.lower_bound(tight) <= 2.0


@pytest.mark.parametrize(("target", "holds"), [(1.9, True), (2.0, False)])
def test_a_claim_is_made_round_by_round_and_judged_by_its_lower_bound(
    target: float, holds: bool, tmp_path: Path
) -> None:
    # A machine that slows down and recovers slows both sides: the ratio stays.
    made = ratios.claim("a / b", "c=8", [20, 2.1, 19.5, 40], [10, 1, 10, 20], target)
    assert (made["ratio"], made["holds"]) == (2.0, holds)
    assert ratios.in_words(made).strip() == (
        f"a / b: 2.00, at least {made['low']:.2f} (95%); target {target:.2f}"
    )
    ratios.write(tmp_path / "claims.json", [made])
    content = json.loads((tmp_path / "claims.json").read_text())
    assert content["claims"] == [made]
    assert " cores, " in content["machine"]
