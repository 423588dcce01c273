"""The playground's server as this machine, and others, may meet it."""

import base64
import contextlib
import io
import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from playing import Playground, playing

import rampart as rp

pytestmark = pytest.mark.server


def png(side: int = 32, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def post(playground: Playground, path: str, body: bytes, **options: Any) -> requests.Response:
    return requests.post(f"{playground.root}/api/{path}", body, timeout=60, **options)


@contextmanager
def long_attack(playground: Playground) -> Iterator[requests.Response]:
    """One that takes seconds: it may hardly change anything, and wants the unlikeliest label."""
    answer = post(playground, "verdict", png()).json()["answers"]["full"]
    labels = requests.get(f"{playground.root}/api/model", timeout=10).json()["classes"]
    likely = {one["label"] for one in answer["top"]}
    target = next(label for label in labels if label not in likely)
    order = f"attack?victim=full&eps=1&steps=100&target={target}"
    with post(playground, order, png(), stream=True) as begun:
        assert begun.status_code == 200
        yield begun


def test_a_verdict_is_that_of_the_library(playground: Playground, twinned: Path) -> None:
    answer = post(playground, "verdict", png(100)).json()
    model = rp.Model.load(twinned)
    for variant in ("full", "lean"):
        (verdict,) = model.predict([png(100)], variant=variant)
        expected = json.loads(json.dumps(verdict.to_dict()))
        assert answer["answers"][variant] == answer["answers"][variant] | expected
    shown = base64.b64decode(answer["picture"].partition(",")[2])
    assert (np.asarray(Image.open(io.BytesIO(shown))) == model.pixels([png(100)])[0].numpy()).all()
    assert answer["decoded_in"] > 0


def test_an_attack_tells_each_step_and_ends_with_what_came_of_it(playground: Playground) -> None:
    answer = post(playground, "attack?victim=undefended&eps=8&steps=5", png())
    *steps, done = map(json.loads, answer.text.splitlines())
    assert [step["kind"] for step in steps] == ["step"] * done["steps"]
    assert done["kind"] == "done" and done["result"] in ("held", "fooled")
    assert list(done["answers"]["attacked"]) == ["full", "lean", "undefended"]


def test_every_picture_on_offer_can_be_judged(playground: Playground) -> None:
    offers = requests.get(f"{playground.root}/api/model", timeout=10).json()["pictures"]
    assert [offer["name"] for offer in offers] == ["cat", "rocket", "coffee", "noise"]
    for number, offer in enumerate(offers):
        address = f"{playground.root}/api/pictures/{number}?seed="
        first, other = (requests.get(f"{address}{seed}", timeout=10) for seed in (0, 1))
        assert first.headers["content-type"] in ("image/png", "image/jpeg")
        assert (first.content != other.content) == offer["drawn"]
        assert post(playground, "verdict", first.content).status_code == 200


def test_a_picture_named_on_the_command_line_stands_first(twinned: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(png(seed=7))
    with playing(twinned, tmp_path / "mine.png", log=tmp_path / "log") as own:
        offers = requests.get(f"{own.root}/api/model", timeout=10).json()["pictures"]
        assert offers[0] == {"name": "mine.png", "drawn": False}
        first = requests.get(f"{own.root}/api/pictures/0", timeout=10)
    assert first.content == png(seed=7)


BAD = {
    "text that is called a picture": (b"no picture at all", 415, "unsupported_format"),
    "a truncated picture": (png()[:500], 422, "corrupt_image"),
    "nothing": (b"", 422, "empty_body"),
    "too many bytes": (b"\x89PNG" + bytes(7_000_000), 413, "body_too_large"),
}


@pytest.mark.parametrize("path", ["verdict", "attack"])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_picture_is_refused_as_the_endpoint_refuses_it(
    what: str, path: str, playground: Playground
) -> None:
    body, code, kind = BAD[what]
    answer = post(playground, path, body)
    assert (answer.status_code, answer.json()["type"]) == (code, kind)


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/etc/passwd", 404),
        ("GET", "/api/pictures/99", 404),
        ("GET", "/api/pictures/0?seed=-1", 404),
        ("GET", "/api/pictures/0?seed=²", 404),
        ("GET", "/api/pictures/x", 404),
        ("GET", "/api/verdict", 405),
        ("POST", "/api/attack?eps=65", 422),
        ("POST", "/api/attack?target=lion", 422),
        ("GET", "/api/p-value", 422),
        ("GET", "/api/p-value?variant=undefended", 422),
        ("GET", "/api/p-value?variant=lean&median=1", 422),
        ("GET", "/api/p-value?variant=lean&energy=nan", 422),
        ("GET", "/api/p-value?variant=lean&energy=-1", 422),
        ("GET", "/api/p-value?variant=lean&energy=x", 422),
    ],
)
def test_an_error_is_json_and_names_no_path(
    method: str, path: str, code: int, playground: Playground
) -> None:
    answer = requests.request(method, playground.root + path, data=png(), timeout=10)
    assert answer.status_code == code
    assert answer.json().keys() == {"code", "type", "message"}
    assert not re.search(r"/\w+/|\.py|Traceback", answer.text)


def test_the_p_value_of_some_detectors_is_told_with_its_decision(playground: Playground) -> None:
    parts = post(playground, "verdict", png()).json()["answers"]["lean"]
    row = {part["name"]: part["surprise"] for part in parts["parts"]}

    def asked(**surprise: float) -> dict[str, Any]:
        query = {"variant": "lean", **surprise}
        return requests.get(f"{playground.root}/api/p-value", query, timeout=10).json()

    everyone = asked(**row)
    assert everyone["p_value"] == pytest.approx(parts["p_value"])
    assert everyone["decision"] == parts["decision"] and not everyone["estimated"]
    assert asked() == {"p_value": 1.0, "estimated": False, "decision": "accept"}
    assert asked(confidence=50)["decision"] == "flag"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil:80", "[", ""]
)
def test_who_calls_this_machine_by_another_name_is_turned_away(
    host: str, playground: Playground
) -> None:
    for path in ("/", "/api/model"):
        answer = requests.get(playground.root + path, headers={"Host": host}, timeout=10)
        assert answer.status_code in (400, 403), path
        assert "tiny" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:9", "[::1]:9"])
def test_this_machines_own_names_are_answered_at_any_port(
    host: str, playground: Playground
) -> None:
    answer = requests.get(f"{playground.root}/api/model", headers={"Host": host}, timeout=10)
    assert answer.json()["name"] == "tiny"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_from_elsewhere_may_neither_send_nor_read(
    origin: str, playground: Playground
) -> None:
    answer = post(playground, "attack?eps=1", png(), headers={"Origin": origin})
    assert (answer.status_code, answer.json()["type"]) == (403, "not_this_machine")
    own = post(playground, "verdict", png(), headers={"Origin": playground.root})
    assert own.status_code == 200
    for one in (answer, own):
        assert not [name for name in one.headers if name.lower().startswith("access-control")]


def test_the_page_may_load_nothing_from_elsewhere(playground: Playground) -> None:
    answer = requests.get(playground.root, timeout=10)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy
    assert "http:" not in policy and "*" not in policy
    outside = re.findall(r'(?:src|href)="(?!data:)([^"]*)"', answer.text)
    assert not outside
    for word in ('<link rel="stylesheet', "@import", "url(http", "<iframe"):
        assert word not in answer.text


@pytest.mark.parametrize("path", ["/", "/api/pictures/0", "/api/model", "/nowhere"])
def test_no_other_page_may_embed_an_answer_and_no_cache_keeps_it(
    path: str, playground: Playground
) -> None:
    headers = requests.get(playground.root + path, timeout=10).headers
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_one_attack_at_a_time_and_who_goes_away_ends_it(playground: Playground) -> None:
    with long_attack(playground) as begun:
        lines = begun.iter_lines()
        assert json.loads(next(lines))["step"] == 1
        second = post(playground, "attack?eps=1&steps=1", png())
        assert json.loads(next(lines))["kind"] == "step"
    assert (second.status_code, second.json()["type"]) == (409, "attack_under_way")
    assert '"done"' in post(playground, "attack?victim=undefended&eps=1&steps=1", png()).text


def test_a_verdict_does_not_wait_for_an_attack(playground: Playground) -> None:
    with long_attack(playground) as begun:
        lines = begun.iter_lines()
        next(lines)
        assert post(playground, "verdict", png()).status_code == 200
        assert json.loads(next(lines))["kind"] == "step"


@pytest.mark.slow
def test_ctrl_c_ends_it_in_the_middle_of_an_attack(twinned: Path, tmp_path: Path) -> None:
    with playing(twinned, log=tmp_path / "log") as own, long_attack(own) as begun:
        lines = begun.iter_lines()
        assert json.loads(next(lines))["kind"] == "step"
        assert own.end() == 0
        with contextlib.suppress(requests.exceptions.ChunkedEncodingError):
            assert not any(b'"done"' in line for line in lines)
    assert (tmp_path / "log").read_text() == ""


def test_a_port_that_is_taken_is_told_in_a_line(twinned: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "rampart", "play", "--model", str(twinned), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"rampart: port {port} on 127.0.0.1 cannot be used")
    assert done.stderr.count("\n") == 1


def test_curl_alone_gets_a_verdict(playground: Playground, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    line = f"curl -sT {shlex.quote(str(tmp_path / 'a.png'))} {playground.root}/api/verdict"
    done = subprocess.run(shlex.split(line), capture_output=True, text=True)
    assert "answers" in json.loads(done.stdout)
