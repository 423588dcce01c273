import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import claims
import ratios
import training


def test_the_table_says_of_each_claim_whether_it_holds_and_counts_them() -> None:
    made = [
        ratios.claim("ours / theirs", "batch 1", [3.0, 3.1], [1.0, 1.0], 2.0),
        ratios.claim("ours / best", "batch 8", [1.0, 1.0], [1.0, 1.0], 2.0),
    ]
    lines = claims.table(claims.rows("engines", made))
    assert lines[1].split() == ["engines", "ours", "/", "theirs", "batch", "1", "2.00", "3.05",
                                "3.00", "holds"]  # fmt: skip
    assert lines[2].endswith("does NOT hold")
    assert lines[-1] == "1 of 2 claims hold"


def test_a_name_that_is_none_of_the_benchmarks_is_refused() -> None:
    command = [sys.executable, str(claims.HERE / "claims.py"), "engine"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such benchmark: engine" in done.stderr


def test_every_benchmark_of_it_is_there_and_can_write_its_claims() -> None:
    for name in claims.SHORT:
        assert "--json" in (claims.HERE / f"{name}.py").read_text()


def test_training_is_compared_with_art_in_arts_own_precision_too() -> None:
    rates = {"rampart": [6.0] * 3, "ART FBF": [2.0] * 3, "ideal": [6.0] * 3}
    rates |= {"rampart fp32": [2.5] * 3, "ideal fp32": [2.6] * 3}
    made = {claim["claim"]: claim for claim in training.claims_of("single step", rates)}
    assert made["rampart / ART FBF"]["ratio"] == 3.0
    assert made["rampart fp32 / ART FBF"]["ratio"] == 1.25
    assert not made["rampart fp32 / ART FBF"]["holds"]
    assert made["rampart fp32 / ideal fp32"]["holds"]


@pytest.mark.parametrize(("flags", "words"), [({"avx2"}, "AVX2"), (set[str](), "no AVX2")])
def test_figures_name_the_cpu_features_that_matter(
    flags: set[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ratios, "cpu_features", lambda: flags)
    assert ratios.machine().endswith(f"cores, {words}")
