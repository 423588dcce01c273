import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import endpoint


def rounds(rate: float, p99: float = 20.0, cpu: float = 1.0) -> list[endpoint.Round]:
    return [endpoint.Round(rate + i, 1.0, p99, cpu) for i in range(7)]


def claim(sides: dict[str, list[endpoint.Round]], clients: int, name: str) -> dict[str, object]:
    _, claims = endpoint.table({clients: sides})
    (found,) = (one for one in claims if one["claim"] == name)
    return found


@pytest.mark.parametrize(("rate", "holds"), [(240.0, False), (270.0, True)])
def test_a_claim_holds_only_if_its_lower_bound_reaches_the_target(rate: float, holds: bool) -> None:
    sides = {"http": rounds(rate), "stock": rounds(100.0), "tuned": rounds(90.0)}
    made = claim(sides, 8, "http / stock")
    assert made["holds"] is holds
    lines, _ = endpoint.table({8: sides})
    assert any(f"http / stock: {made['ratio']:.2f}" in line for line in lines)


def test_it_is_compared_with_the_best_peer_in_rate_and_in_tail() -> None:
    sides = {
        "http": rounds(300.0, p99=10.0),
        "litserve int8": rounds(200.0, p99=30.0),
        "bentoml int8": rounds(100.0, p99=20.0),
    }
    best = "best of litserve int8, bentoml int8"
    assert claim(sides, 8, f"http / {best}")["ratio"] == pytest.approx(1.5, abs=0.02)
    assert claim(sides, 8, f"p99 of {best} / http")["ratio"] == 2.0


def test_what_the_server_takes_of_the_cpu_is_what_is_beyond_decoder_and_graph() -> None:
    sides = {"http": rounds(300.0, cpu=1.5), "floor": rounds(300.0, cpu=1.0)}
    made = claim(sides, 32, "0.4 ms / CPU of http beyond floor")
    assert made["ratio"] == 0.8
    assert not made["holds"]


def test_the_json_before_a_picture_is_as_long_as_the_header_says() -> None:
    body = endpoint.as_tensor(b"picture")
    head, rest = body[: endpoint.TENSORS], body[endpoint.TENSORS :]
    (tensor,) = json.loads(head)["inputs"]
    assert tensor["parameters"]["binary_data_size"] == len(rest)
    assert rest == len(b"picture").to_bytes(4, "little") + b"picture"


def test_open_loop_shows_what_failed_and_the_tail_of_each_side() -> None:
    rounds = [endpoint.Round(200, 10, 20 + i, failed=0.5 * (i > 3)) for i in range(7)]
    _, line = endpoint.arrivals_table({200: {"full": rounds}})
    assert line.split() == ["200", "full", "200", "0.0%", "10", "23", "20", "to", "26"]


def test_the_picture_shows_every_side(tmp_path: Path) -> None:
    sides = {name: [endpoint.Round(rate, 1, 2)] * 7 for name, rate in (("http", 5), ("stock", 3))}
    endpoint.picture({1: sides, 8: sides}, tmp_path / "endpoint.png")
    assert (tmp_path / "endpoint.png").read_bytes().startswith(b"\x89PNG")


def test_the_floor_counts_pictures_and_not_runs(tiny_archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tiny_archive) as mar:
        mar.extract("graph.onnx", tmp_path)
    engine = endpoint.Engine(tmp_path / "graph.onnx", "cpu")
    bodies = endpoint.pngs(np.zeros((8, 32, 32, 3), np.uint8))
    one, eight = (endpoint.run_floor(engine, bodies, batch, 0.3) for batch in (1, 8))
    assert eight.rate == pytest.approx(8e3 / eight.p50, rel=0.9)
    assert one.rate == pytest.approx(1e3 / one.p50, rel=0.9)
