"""What the documents show, run as it stands, on the shipped model.

Each block runs in a folder that looks like a checkout: `.venv` leads to this environment, and
`model_store` to the shipped models. Only the servers' ports are others.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import ROOT, block
from PIL import Image
from servers import Server, free_port

from rampart.model import Model
from rampart.samples import PHOTOGRAPHS, SIGNS, sample

pytestmark = [
    pytest.mark.server,  # each starts processes, for seconds
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]
CODE = """
import json, os, sys
from rampart import cli
os.chdir(sys.argv[1])
sys.argv = json.loads(sys.argv[2])["words"]
sys.exit(cli.main())
"""
PICTURES = {"sign": "yield", "picture": "stop", "a": "no entry", "b": "keep right"}


def checkout(folder: Path) -> Path:
    """`folder`, with what a block finds in a checkout, once the shipped model is packed."""
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "model_store").mkdir()
    for model in ("traffic-signs", "traffic-signs-undefended", "cifar10"):
        (folder / "model_store" / model).symlink_to(ROOT / "model_store" / model)
    shell(".venv/bin/rampart archive model_store/traffic-signs", folder)
    return folder


def shell(text: str, folder: Path, port: int = 8080) -> str:
    """What a block of commands prints, which speaks to a server on `port` in place of 8080."""
    words = ["bash", "-euo", "pipefail", "-c", text.replace("127.0.0.1:8080", f"127.0.0.1:{port}")]
    path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(said: str) -> list[dict[str, Any]]:
    """The JSON that stands in what was said, one after another."""
    found, rest = [], said.strip()
    while rest:
        one, end = json.JSONDecoder().raw_decode(rest)
        found.append(one)
        rest = rest[end:].lstrip()
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with pictures of drawn signs under the names that the documents use."""
    folder = checkout(tmp_path_factory.mktemp("desk"))
    for name, sign in PICTURES.items():
        sample(sign).save(folder / f"{name}.png")
    pictures = [shell(f"base64 -w0 {name}.png", folder) for name in "ab"]
    instances = {"instances": [{"b64": picture} for picture in pictures]}
    (folder / "pictures.json").write_text(json.dumps(instances))
    return folder


@pytest.fixture(scope="module")
def serve(desk: Path, launch: Callable[..., Server]) -> Callable[[str], Server]:
    """Starts the server of a block on a free port."""

    def begin(text: str) -> Server:
        port = free_port()
        words = shlex.split(text.replace("8081", str(port + 3)), comments=True)
        server = launch(desk, code=CODE, port=port, words=[*words, "--port", str(port)])
        assert "Rampart is ready" in server.read(), server.lines
        return server

    return begin


@pytest.fixture(scope="module")
def endpoint(serve: Callable[[str], Server]) -> Iterator[Server]:
    """TorchServe as `make serve` starts it, but that it explains verdicts as well."""
    server = serve(block("docs/serve.md", "rampart serve --explain"))
    yield server
    server.end()


@pytest.fixture
def python(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], dict[str, Any]]:
    """Runs a block of Python; its names."""

    def execute(text: str, port: int) -> dict[str, Any]:
        monkeypatch.chdir(desk)
        names: dict[str, Any] = {}
        exec(compile(text.replace(":8080/", f":{port}/"), "block", "exec"), names)
        return names

    return execute


def test_the_first_endpoint_answers_curl_and_python_as_the_tutorial_shows(
    desk: Path,
    endpoint: Server,
    python: Callable[[str, int], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = block("docs/tutorials/first-endpoint.md", "curl -T model_store")
    assert f"\n    {text}" in (ROOT / "README.md").read_text()
    (told,) = answers(shell(text, desk, endpoint.port))
    shown = (ROOT / "docs" / "tutorials" / "first-endpoint.md").read_text()
    start = f'{{"label": "{told["label"]}", "index": {told["index"]}, "confidence": 0.99'
    assert start in shown and f'"decision": "{told["decision"]}"' in shown
    assert told["confidence"] == pytest.approx(0.997384, abs=2e-3)
    text = block("docs/tutorials/first-endpoint.md", "rp.Client")
    verdict = python(text, endpoint.port)["verdict"]
    assert verdict.to_dict() | {"top": list(verdict.top)} == told
    assert capsys.readouterr().out == f"stop accept {verdict.p_value}\n"


def pasted(desk: Path, server: Server) -> list[tuple[str, dict[str, Any]]]:
    """The captions of the three lines that a server prints at its start, and what these give."""
    while len(lines := [line for line in server.lines if line.startswith("  curl -T ")]) < 3:
        server.read(until="  curl -T ")
    captions = [above for above, line in pairwise(server.lines) if line in lines]
    told = [answers(shell(line, desk, server.port))[0] for line in lines]
    return list(zip(captions, told, strict=True))


def test_the_start_prints_how_to_send_a_sign_the_same_attacked_and_no_sign(
    desk: Path, endpoint: Server
) -> None:
    """The undefended twin takes the attacked sign for another one, as its caption says."""
    told = pasted(desk, endpoint)
    assert [above.partition(",")[0] for above, _ in told] == [
        "the model's sample:",
        "the model's sample",
        "cat.png",
    ]
    sign, attacked, other = (answer for _, answer in told)
    assert (sign["label"], sign["decision"]) == (attacked["label"], "accept") == ("stop", "accept")
    assert attacked["decision"] == "accept" and other["decision"] == "flag"
    twin = Model.load(ROOT / "model_store" / "traffic-signs-undefended")
    with Image.open(ROOT / "model_store" / "traffic-signs" / "sample-attacked.png") as picture:
        (verdict,) = twin.predict(np.array(picture)[None])
    (said,) = re.findall(r"an undefended network answers '([\w ]+)',", told[1][0])
    assert verdict.label == said != "stop"


@pytest.mark.slow
def test_a_drawn_sign_is_attacked_and_sent_as_the_first_pages_show(
    desk: Path, endpoint: Server
) -> None:
    text = block("README.md", "rampart attack signs/stop-0.png")
    ways = block("docs/tutorials/first-endpoint.md", "rampart attack signs/stop-0.png")
    ways += block("docs/tutorials/first-endpoint.md", "curl -T attacked/attacked.png")
    assert ways == text
    said = shell(text, desk, endpoint.port)
    before, _, answer = said.partition("attacked/panel.png\n")
    (told,) = answers(answer)
    clean, attacked = (
        np.asarray(Image.open(desk / "attacked" / f"{name}.png")).astype(int)
        for name in ("clean", "attacked")
    )
    assert 1 <= np.abs(clean - attacked).max() <= 4
    assert f"attacked/attacked.png: Rampart: {told['label']} " in before
    assert len(list((desk / "signs").iterdir())) == len(SIGNS) + len(PHOTOGRAPHS)


def test_pictures_are_sent_alone_as_json_as_a_form_and_from_python(
    desk: Path,
    endpoint: Server,
    python: Callable[[str, int], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (told,) = answers(shell(block("docs/serve.md", "curl -T picture.png"), desk, endpoint.port))
    assert told["label"] == PICTURES["picture"]
    text = block("docs/serve.md", "curl -F a=@a.png")
    for several in answers(shell(text, desk, endpoint.port)):
        labels = [verdict["label"] for verdict in several["predictions"]]
        assert labels == [PICTURES["a"], PICTURES["b"]]
    names = python(block("docs/serve.md", "answers = client.predict("), endpoint.port)
    assert [verdict.label for verdict in names["answers"]] == labels
    assert capsys.readouterr().out == "yield accept True\n"


def test_a_verdict_is_explained_to_who_asks(desk: Path, endpoint: Server) -> None:
    (told,) = answers(shell(block("docs/serve.md", "/explanations/"), desk, endpoint.port))
    assert told["label"] == PICTURES["sign"] and told["explanation"]


def test_the_built_in_server_starts_by_its_command_and_gives_the_same_answers(
    desk: Path, endpoint: Server, serve: Callable[[str], Server]
) -> None:
    own = serve(block("docs/serve.md", "--server http --workers 2"))
    text = block("docs/serve.md", "curl -T picture.png")
    first, second = (answers(shell(text, desk, one.port)) for one in (endpoint, own))
    assert first == second
    assert pasted(desk, own) == pasted(desk, endpoint)
    assert own.end() == 0


def test_beyond_loopback_a_token_and_a_certificate_open_the_server(
    desk: Path, serve: Callable[[str], Server]
) -> None:
    names = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out chain.pem"
    shell(f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 {names}", desk)
    (desk / "tokens.txt").write_text(f"team {'a' * 20}\n")
    server = serve(block("docs/serve.md", "rampart serve --host 0.0.0.0"))
    ask = block("docs/serve.md", "curl -T picture.png").replace("http://", "https://")
    ask = ask.replace("curl", "curl --cacert chain.pem")
    (refused,) = answers(shell(ask, desk, server.port))
    assert refused["code"] == 401
    ask = ask.replace("curl", f"curl -H 'Authorization: Bearer {'a' * 20}'")
    (told,) = answers(shell(ask, desk, server.port))
    assert told["label"] == PICTURES["picture"]
    assert server.end() == 0


@pytest.fixture(scope="module")
def mine(desk: Path) -> str:
    """model_store/mine of the documents, here the shipped model, and its archive; its address."""
    (desk / "model_store" / "mine").symlink_to(ROOT / "model_store" / "traffic-signs")
    shell(".venv/bin/rampart archive model_store/mine", desk)
    return "127.0.0.1:8080/predictions/mine"


def test_an_archive_of_your_own_is_served(
    desk: Path, serve: Callable[[str], Server], mine: str
) -> None:
    server = serve(block("docs/tutorials/photographs.md", "rampart serve --archive"))
    (told,) = answers(shell(f"curl -T picture.png {mine}", desk, server.port))
    assert told["label"] == PICTURES["picture"]
    server.end()


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_an_archive_of_your_own_is_calibrated_on_your_traffic(desk: Path) -> None:
    shell(".venv/bin/rampart samples my_traffic --count 10", desk)
    text = block("docs/tutorials/photographs.md", "rampart calibrate --archive")
    assert text == block("docs/watch.md", "rampart calibrate --archive")
    count = 10 * len(SIGNS) + len(PHOTOGRAPHS)
    assert f"of these {count} pictures (promised: 1.0%)" in shell(text, desk)
    assert (desk / "model_store" / "mine-recalibrated.mar").is_file()


def test_queries_are_kept_where_the_command_says(
    desk: Path, serve: Callable[[str], Server]
) -> None:
    text = block("docs/watch.md", "rampart serve --query-store /dev/shm/rampart")
    server = serve(text.replace("/dev/shm/rampart", str(desk / "queries")))
    shell(block("docs/serve.md", "curl -T picture.png"), desk, server.port)
    assert (desk / "queries" / "data.mdb").is_file()
    server.end()


@pytest.mark.slow
def test_the_next_version_takes_over_from_the_one_that_is_served(
    desk: Path, serve: Callable[[str], Server], mine: str
) -> None:
    server = serve(".venv/bin/rampart serve --archive model_store/mine.mar --model-api")
    (key,) = [line for line in server.read("  curl '") if line.startswith("  rampart_key")]
    text = block("docs/serve.md", "rampart_key management")
    shell(f"{key}\n{text}".replace("8081", str(server.port + 1)), desk)
    (told,) = answers(shell(f"curl -T picture.png {mine}", desk, server.port))
    assert told["model"] == {"name": "mine", "version": "2.0"}
    server.end()


@pytest.mark.slow
def test_models_are_exported_to_repositories_of_triton(desk: Path) -> None:
    shell(block("docs/serve.md", "--triton"), desk)
    for model, file in (("models/traffic-signs", "model.py"), ("graphs/cifar10", "model.onnx")):
        assert (desk / model / "config.pbtxt").is_file() and (desk / model / "1" / file).is_file()


def test_a_folder_of_pictures_is_screened(desk: Path) -> None:
    (desk / "pictures").mkdir()
    for name in SIGNS:
        sample(name).save(desk / "pictures" / f"{name}.png")
    said = shell(block("docs/screen.md", "rampart screen pictures/"), desk)
    assert said.startswith(f"{len(SIGNS)} pictures in 1 shards: accept {len(SIGNS)}\n")
    rows = shell(block("docs/screen.md", "import pyarrow.dataset"), desk)
    assert [row["label"] for row in ast.literal_eval(rows)] == sorted(SIGNS)


@pytest.mark.slow
def test_a_test_report_is_written_for_auditors(desk: Path) -> None:
    text = block("docs/attack.md", "rampart evidence")
    shell(text.replace(".pdf", ".html"), desk)  # which needs no browser
    assert "MITRE ATLAS" in (desk / "evidence.html").read_text()


def test_the_object_detector_finds_the_boxes_that_its_tutorial_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(block("docs/tutorials/objects.md", "rp.SceneModel.load"), names)
    verdict = names["verdict"]
    first = verdict.boxes[0]
    shown = (ROOT / "docs" / "tutorials" / "objects.md").read_text()
    (told,) = re.findall(r'\{"boxes": \[(\{.*?\}),', shown)
    assert json.loads(told).keys() == first.keys()
    assert (json.loads(told)["label"], verdict.decision) == (first["label"], "accept")
    assert json.loads(told)["confidence"] == pytest.approx(first["confidence"], abs=2e-3)
    assert json.loads(told)["box"] == pytest.approx(first["box"], abs=0.5)
    assert capsys.readouterr().out.count("\n") == len(verdict.boxes)


@pytest.mark.slow
def test_handwritten_digits_are_written_in_three_parts(desk: Path) -> None:
    shell(block("docs/harden.md", "rampart digits"), desk)
    parts = {name: np.load(desk / "digits" / f"{name}.npz")["label"] for name in ("train", "held")}
    assert {name: len(label) for name, label in parts.items()} == {"train": 1097, "held": 400}
