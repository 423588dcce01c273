from pathlib import Path

import pytest


def test_a_learning_curve_runs_on_over_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from rampart.hardening.train.curve import learning_curve

    runs = [
        [{"clean": 0.5, "pgd10": 0.3}, {"clean": 0.6, "pgd10": 0.4}],
        [
            {"clean": 0.55, "pgd10": 0.35},
            {"clean": 0.7, "pgd10": 0.38},
            {"clean": 0.7, "pgd10": 0.3},
        ],
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: drawn.append(self))
    learning_curve(runs, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}
    assert lines["clean"] == [[1, 0.5], [2, 0.6], [3, 0.55], [4, 0.7], [5, 0.7]]
    assert lines["most robust epoch of the last run"][0][0] == 4
    assert [line.get_xdata()[0] for line in axes.lines[3:]] == [2.5]
