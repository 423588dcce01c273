"""Explanations by real servers: the same on every way to ask for one, and dear."""

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from servers import Server, free_port

import rampart as rp

feature = pytest.mark.feature
Start = Callable[..., Server]
Encode = Callable[..., bytes]


@pytest.fixture(scope="module")
def servers(launch: Start, start: Start, tiny_archive: Path) -> list[Server]:
    """TorchServe and Rampart's own, which explain."""
    found = [start(tiny_archive, explain=True, port=free_port())]
    assert "Rampart is ready" in found[0].read(), found[0].lines
    found.append(launch(tiny_archive, explain=True, port=free_port()))
    assert "Rampart is ready" in found[1].read(until="  curl '"), found[1].lines
    return found


@pytest.fixture
def picture(encode: Encode, pixels: np.ndarray) -> bytes:
    return encode(pixels)


def ask(server: Server, path: str, body: bytes) -> tuple[int, Any]:
    answer = requests.post(server.root + path, body, timeout=60)
    return answer.status_code, answer.json()


@feature("Explanations", "TorchServe", "Rampart")
def test_every_way_to_ask_gives_the_same_explanation(servers: list[Server], picture: bytes) -> None:
    v1 = json.dumps({"instances": [{"b64": base64.b64encode(picture).decode()}]}).encode()
    whole = []
    for server in servers:
        status, content = ask(server, "/explanations/tiny", picture)
        assert status == 200 and np.array(content["explanation"]["label"]["effect"]).shape == (8, 8)
        assert ask(server, "/explanations/tiny/1.0", picture) == (200, content)
        with rp.Client(server.url) as client:
            assert client.predict(picture, explain=True).explanation == content["explanation"]
            assert client.predict(picture).explanation is None
        whole.append(dict(content))
        reasons = content.pop("explanation")
        expected = {"predictions": [content], "explanations": [reasons]}
        assert ask(server, "/v1/models/tiny:explain", v1) == (200, expected)
        assert ask(server, "/predictions/tiny", picture) == (200, content)
    assert whole[0] == whole[1]


def test_ramparts_server_knows_a_parameter_too(servers: list[Server], picture: bytes) -> None:
    own, _ = servers
    content = ask(own, "/explanations/tiny", picture)
    for query in ("?explain=true", "/1.0?explain=1", "?explain"):
        assert ask(own, f"/predictions/tiny{query}", picture) == content
    plain = ask(own, "/predictions/tiny", picture)
    assert ask(own, "/predictions/tiny?explain=false", picture) == plain
    status, refused = ask(own, "/predictions/tiny?explain=perhaps", picture)
    assert (status, refused["type"]) == (422, "explain_value")


def test_what_cannot_be_explained_is_refused_alike(servers: list[Server], picture: bytes) -> None:
    text = base64.b64encode(picture).decode()
    two = json.dumps({"instances": [{"b64": text}] * 2}).encode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    for path, body, kind in (
        ("/explanations/tiny", two, "explain_one"),
        ("/v1/models/tiny:explain", two, "explain_one"),
        ("/explanations/tiny", json.dumps({"inputs": [tensor]}).encode(), "explain_one"),
        ("/explanations/tiny", b"hello", "unsupported_format"),
    ):
        own, other = (ask(server, path, body) for server in servers)
        assert own == other, path
        assert own[1]["type"] == kind and own[0] == own[1]["code"], path


def test_without_the_operators_leave_there_is_none(
    server: Server, front: Server, picture: bytes
) -> None:
    for one in (server, front):
        with rp.Client(one.url) as client:
            with pytest.raises(rp.EndpointError, match="403 not_explained"):
                client.predict(picture, explain=True)
            assert client.predict(picture).explanation is None


def test_an_explanation_is_paid_with_the_tokens_of_65_requests_however_it_is_spelled(
    start: Start, tiny_archive: Path, picture: bytes, tmp_path: Path
) -> None:
    names = ("start", "plain", "path", "query", "hidden", "v1", "poor")
    lines = [f"{name} {name.ljust(16, 'x')} 0.01 {9 if name == 'poor' else 70}" for name in names]
    (tmp_path / "tokens").write_text("\n".join(lines))
    server = start(tiny_archive, explain=True, tokens=str(tmp_path / "tokens"), port=free_port())
    assert "Rampart is ready" in server.read(), server.lines

    def statuses(name: str, path: str, times: int) -> list[int]:
        own = {"Authorization": f"Bearer {name.ljust(16, 'x')}"}
        asked = (requests.post(server.root + path, picture, headers=own) for _ in range(times))
        return [answer.status_code for answer in asked]

    assert statuses("plain", "/predictions/tiny", 71) == [200] * 70 + [429]
    for name, path in (
        ("path", "/explanations/tiny"),
        ("query", "/predictions/tiny?explain=true"),
        ("hidden", "/predictions/tiny?%65xplain=%74rue"),
        ("v1", "/v1/models/tiny:explain"),
    ):
        assert statuses(name, path, 2) == [200, 429], name
        assert statuses(name, "/predictions/tiny?explain=false", 6) == [200] * 5 + [429], name
    # Whose bucket never holds so much gets one when it is full, and nothing else for long.
    assert statuses("poor", "/explanations/tiny", 1) == [200]
    assert statuses("poor", "/predictions/tiny", 1) == [429]


@feature("Hostile clients do not block others", "TorchServe", "Rampart")
def test_who_asks_for_nothing_but_explanations_keeps_nobody_from_verdicts(
    servers: list[Server], picture: bytes
) -> None:
    for server in servers:
        ends, told = threading.Event(), list[int]()

        def hostile(url: str, ends: threading.Event, told: list[int]) -> None:
            while not ends.is_set():
                told.append(requests.post(url, picture, timeout=60).status_code)

        url = f"{server.root}/explanations/tiny"
        threads = [threading.Thread(target=hostile, args=(url, ends, told)) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            statuses = [ask(server, "/predictions/tiny", picture)[0] for _ in range(50)]
        finally:
            ends.set()
            for thread in threads:
                thread.join()
        assert statuses == [200] * 50
        assert set(told) == {200, 503}
