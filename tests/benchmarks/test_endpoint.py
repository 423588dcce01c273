import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import endpoint


@pytest.mark.parametrize(("rate", "holds"), [(100.0, False), (130.0, True)])
def test_a_claim_holds_only_if_its_lower_bound_reaches_the_target(rate: float, holds: bool) -> None:
    def rounds(mean: float) -> list[endpoint.Round]:
        return [endpoint.Round(mean + i, 1.0, 2.0) for i in range(7)]

    sides = {"full": rounds(rate), "stock": rounds(100.0), "floor": rounds(140.0)}
    lines, claims = endpoint.table({8: sides})
    assert claims[0]["claim"] == "full / stock"
    assert claims[0]["holds"] is holds
    assert any(f"full / stock: {claims[0]['ratio']:.2f}" in line for line in lines)


def test_open_loop_shows_what_failed_and_the_tail_of_each_side() -> None:
    rounds = [endpoint.Round(200, 10, 20 + i, failed=0.5 * (i > 3)) for i in range(7)]
    _, line = endpoint.arrivals_table({200: {"full": rounds}})
    assert line.split() == ["200", "full", "200", "0.0%", "10", "23", "20", "to", "26"]


def test_the_picture_shows_every_side(tmp_path: Path) -> None:
    sides = {name: [endpoint.Round(rate, 1, 2)] * 7 for name, rate in (("full", 5), ("stock", 3))}
    endpoint.picture({1: sides, 8: sides}, tmp_path / "endpoint.png")
    assert (tmp_path / "endpoint.png").read_bytes().startswith(b"\x89PNG")


def test_the_graph_side_counts_images_and_not_runs(tiny_archive: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tiny_archive) as mar:
        mar.extract("graph.onnx", tmp_path)
    engine = endpoint.Engine(tmp_path / "graph.onnx", "cpu")
    images = np.zeros((8, 32, 32, 3), np.uint8)
    one, eight = (endpoint.run_graph(engine, images, batch, 0.3) for batch in (1, 8))
    assert eight.rate == pytest.approx(8e3 / eight.p50, rel=0.9)
    assert one.rate == pytest.approx(1e3 / one.p50, rel=0.9)
