"""Prometheus itself reads the figures of each server."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from kserve_server import KServe
from prometheus import assert_well_formed, scraped
from servers import Server, free_port
from triton_server import Triton

from rampart.export.to_triton_python import to_triton_python

pytestmark = [pytest.mark.server, pytest.mark.slow]
COUNT = "sum by (job) (rampart_images_total)"
TOKEN = "a" * 20


@pytest.fixture
def picture(encode: Callable[..., bytes], pixels: np.ndarray) -> bytes:
    return encode(pixels)


def test_the_built_in_server_is_read_with_a_token(
    start: Callable[..., Server], tiny_archive: Path, picture: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(f"team {TOKEN}\n")
    server = start(tiny_archive, workers=2, port=free_port(), tokens=str(tmp_path / "tokens"))
    assert "Rampart is ready" in server.read(until="  curl"), server.lines
    own = {"Authorization": f"Bearer {TOKEN}"}
    for _ in range(3):
        assert requests.post(server.url, picture, headers=own, timeout=10).ok
    target = {"own": f"127.0.0.1:{server.port}"}
    assert scraped(tmp_path, target, COUNT, TOKEN)["own"] >= 3
    assert_well_formed(requests.get(f"{server.root}/metrics", headers=own, timeout=10).text)
    assert server.end() == 0


def test_torchserve_is_read(server: Server, picture: bytes, tmp_path: Path) -> None:
    assert requests.post(server.url, picture, timeout=60).ok
    target = f"127.0.0.1:{server.port + 2}"
    assert scraped(tmp_path, {"torchserve": target}, COUNT)["torchserve"] >= 1
    text = requests.get(f"http://{target}/metrics", timeout=10).text
    assert_well_formed(text, histograms=False)


def test_kserve_is_read(tiny_archive: Path, picture: bytes, tmp_path: Path) -> None:
    server = KServe(tiny_archive, tmp_path)
    server.wait()
    url, kind = f"{server.root}/v1/models/tiny:predict", {"Content-Type": "image/png"}
    assert requests.post(url, picture, headers=kind, timeout=30).ok
    assert scraped(tmp_path, {"kserve": f"127.0.0.1:{server.port}"}, COUNT) == {"kserve": 1}
    assert_well_formed(requests.get(f"{server.root}/metrics", timeout=10).text)
    assert server.end() == 0


def test_triton_is_read(tiny_archive: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    to_triton_python(tiny_archive, tmp_path / "repository")
    server = Triton(tmp_path / "repository", tmp_path, free_port())
    server.wait()
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    body = {"inputs": [tensor | {"data": pixels.ravel().tolist()}]}
    assert requests.post(f"{server.root}/v2/models/tiny/infer", json=body, timeout=30).ok
    target = f"127.0.0.1:{server.metrics}"
    assert scraped(tmp_path, {"triton": target}, COUNT) == {"triton": 1}
    assert_well_formed(requests.get(f"http://{target}/metrics", timeout=10).text)
    assert server.end() == 0
