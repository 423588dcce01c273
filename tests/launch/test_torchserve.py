"""The launcher: ready when it says so, gone when it ends, clear when it cannot."""

import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import psutil
import pytest
import requests
from servers import Server, free_port

from rampart.launch.endpoint import Endpoint, redis_failure
from rampart.launch.java import spares_torch
from rampart.launch.torchserve import GRAY

Launch = Callable[..., Server]
Gone = Callable[[list[psutil.Process]], list[psutil.Process]]


def test_ready_is_said_once_after_the_start_and_before_the_curl_lines(server: Server) -> None:
    first, *waiting, ready, function, prediction, description = server.lines
    assert first.startswith("Starting TorchServe for tiny: predictions on 127.0.0.1")
    assert all(line.startswith("Still starting") for line in waiting)
    assert ready == "Rampart is ready"
    assert function.startswith("  rampart_key() {")
    assert prediction.startswith("  curl ") and description.startswith("  curl ")


def test_the_worker_of_an_endpoint_on_the_cpu_is_spared_torch(server: Server) -> None:
    (worker,) = map(psutil.Process, server.worker_pids())
    loaded = " ".join(mapped.path for mapped in worker.memory_maps())
    assert "onnxruntime" in loaded and "libtorch" not in loaded


@pytest.mark.parametrize("model_api", [False, True])
def test_no_worker_asks_for_a_torch_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_api: bool
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    endpoint = Endpoint(tmp_path / "a.mar", device="cuda", model_api=model_api)
    assert spares_torch(endpoint)


@pytest.mark.slow
def test_a_handler_that_is_not_ours_keeps_its_torch(launch: Launch, tmp_path: Path) -> None:
    manifest = {"model": {"modelName": "other", "modelVersion": "1.0", "handler": "other.py"}}
    answer = "[str(torch.zeros(2).sum())] * len(data or [])"  # at the start data is None
    code = f"import torch\ndef handle(data, context): return {answer}\n"
    with ZipFile(tmp_path / "other.mar", "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        content.writestr("other.py", code)
    server = launch(tmp_path / "other.mar")
    assert "Rampart is ready" in server.read(), server.lines
    seen = requests.post(f"{server.root}/predictions/other", data=b"1", timeout=60)
    assert seen.text == "tensor(0.)"
    assert server.end() == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_printed_curl_lines_work_as_pasted(server: Server) -> None:
    function, *lines = server.lines[-3:]
    prediction, description = (paste(function, line) for line in lines)
    assert prediction["model"]["name"] == "tiny"
    assert description[0]["customizedMetadata"]["variant"] == "full"


def paste(*lines: str) -> Any:
    """What the last of the lines prints, read as JSON where it prints any."""
    done = subprocess.run(["sh", "-c", "\n".join(lines) + " -s"], capture_output=True, check=True)
    return json.loads(done.stdout) if done.stdout.strip() else None


def test_a_hang_up_stops_everything(launch: Launch, wait_gone: Gone, tiny_archive: Path) -> None:
    server = launch(tiny_archive)
    assert "Rampart is ready" in server.read()
    family = server.family()
    assert len(family) >= 3  # launcher, Java, worker
    assert server.end(signal.SIGHUP) == 0
    assert wait_gone(family) == []
    assert not list(server.temp.iterdir())


def test_java_and_its_workers_end_with_a_launcher_that_was_killed(
    launch: Launch, wait_gone: Gone, tiny_archive: Path
) -> None:
    server = launch(tiny_archive)
    assert "Rampart is ready" in server.read()
    family = server.family()
    assert len(family) >= 3
    server.process.kill()
    assert wait_gone(family) == []


def test_it_serves_and_stops_though_nobody_reads_what_it_says(
    launch: Launch, tiny_archive: Path, wait_gone: Gone
) -> None:
    server = launch(tiny_archive)
    server.read()
    family = server.family()
    assert len(family) >= 3 and server.process.stdout is not None
    server.process.stdout.close()
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0
    assert wait_gone(family) == []


def test_ctrl_c_while_starting_stops_everything(
    launch: Launch, wait_gone: Gone, tiny_archive: Path
) -> None:
    server = launch(tiny_archive)
    server.read(until="Starting")
    family = server.family()
    assert server.end(signal.SIGINT) == 0
    assert "Rampart is ready" not in server.lines
    assert wait_gone(family) == []
    assert not list(server.temp.iterdir())


def test_with_tokens_only_a_key_opens_it_and_ctrl_c_stops_both_workers(
    launch: Launch, wait_gone: Gone, tiny_archive: Path
) -> None:
    server = launch(tiny_archive, token_authorization=True, host="0.0.0.0", workers=2)
    server.read(until='  curl -H "Authorization: Bearer $(rampart_key API)')
    function, predict, describe, _, renew = server.lines[-5:]
    refused = requests.post(server.url, data=GRAY.read_bytes(), timeout=60)
    assert refused.status_code == 400 and "Token Authorization failed" in refused.text
    assert "label" in paste(function, predict)
    assert len(paste(function, describe)[0]["workers"]) == 2
    (keys,) = server.temp.glob("rampart-*/key_file.json")
    before = json.loads(keys.read_text())
    paste(function, renew)
    assert json.loads(keys.read_text())["inference"] != before["inference"]
    assert "label" in paste(function, predict)
    family = server.family()
    assert server.end(signal.SIGINT) == 0
    assert wait_gone(family) == []


@pytest.mark.parametrize(
    ("offset", "purpose"), [(0, "predictions"), (1, "management"), (2, "metrics")]
)
def test_a_taken_port_is_named_before_anything_starts(
    launch: Launch, tiny_archive: Path, offset: int, purpose: str
) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + offset))
        taken.listen()
        server = launch(tiny_archive, port=port)
        assert server.finish() == 1
    (line,) = server.lines
    assert line.startswith(f"error: port {port + offset} ({purpose}) on 127.0.0.1 cannot be used")
    assert "choose another --port" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_beyond_loopback_it_refuses_to_start_without_tokens(
    launch: Launch, tiny_archive: Path, host: str
) -> None:
    server = launch(tiny_archive, host=host)
    assert server.finish() == 1
    assert server.lines[0].startswith(f"error: {host} is open to other machines")
    assert "token authorization" in server.lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65534}, "the port must be between"),
        ({"workers": 0}, "at least one worker"),
        ({"grpc_port": 70_000}, "the gRPC port must be between"),
        ({"port": 29_870, "grpc_port": 29_871}, "the gRPC port must be between"),
        ({"token_minutes": 0}, "a token must be valid"),
        ({"java_memory": 63}, "Java needs at least 64 MB of memory"),
        ({"host": "::1"}, "must be an IPv4 address"),
    ],
)
def test_impossible_options_are_refused(
    launch: Launch, tiny_archive: Path, options: dict[str, object], message: str
) -> None:
    server = launch(tiny_archive, **options)
    assert server.finish() == 1
    assert message in server.lines[0]


@pytest.mark.slow
def test_a_redis_that_does_not_answer_is_told_serving_goes_on_and_sigterm_stops_everything(
    launch: Launch, wait_gone: Gone, tiny_archive: Path
) -> None:
    server = launch(tiny_archive, query_store="redis://:secret@127.0.0.1:1/0")
    assert "Rampart is ready" in server.read(), server.lines
    warning, *_ = server.lines
    start = "warning: query attacks are not detected until Redis answers (127.0.0.1"
    assert warning.startswith(start)
    assert "secret" not in warning
    family = server.family()
    assert len(family) >= 3
    assert server.end() == 0
    assert wait_gone(family) == []
    assert not list(server.temp.iterdir())


@pytest.mark.parametrize(
    ("answer", "alive"),
    [(b"+PONG\r\n", True), (b"-NOAUTH wants\r\n", True), (b"-LOADING\r\n", False), (b"", False)],
)
def test_a_redis_lives_that_answers_though_it_wants_a_password(answer: bytes, alive: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asked = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(100))
                connection.sendall(answer)

        redis = threading.Thread(target=serve)
        redis.start()
        port = listener.getsockname()[1]
        assert (redis_failure(f"redis://:secret@127.0.0.1:{port}/0") is None) == alive
        redis.join()
    assert asked == [b"PING\r\n"]


def test_a_redis_that_hangs_is_not_waited_for_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Of a call that waits for ever, which then hears that it was hung up on.
        end = threading.Timer(20, listener.close)
        end.start()
        failure = redis_failure(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        end.cancel()
    assert failure and "timed out" in failure


@pytest.mark.parametrize("address", ["/dev/shm/store", "http://here", "redis://here:port"])
def test_what_is_no_address_of_a_redis_is_left_to_the_handler(address: str) -> None:
    assert redis_failure(address) is None


def test_a_missing_archive_is_named(launch: Launch, tmp_path: Path) -> None:
    server = launch(tmp_path / "none.mar")
    assert server.finish() == 1
    assert f"there is no archive at {tmp_path / 'none.mar'}" in server.lines[0]
    assert f"`rampart archive model_store/none --out {tmp_path / 'none.mar'}`" in server.lines[0]
    assert "`make serve MODEL=none` in the Rampart checkout" in server.lines[0]


def test_a_file_that_is_no_archive_is_named(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "other.mar").write_text("not a zip")
    server = launch(tmp_path / "other.mar")
    assert server.finish() == 1
    assert "is not a TorchServe archive" in server.lines[0]


def test_a_changed_file_in_the_archive_stops_it_with_one_readable_line(
    launch: Launch,
    wait_gone: Gone,
    repack: Callable[[Path, Mapping[str, bytes | None]], Path],
    tmp_path: Path,
) -> None:
    server = launch(repack(tmp_path, {"calibration.json": b"{}"}))
    server.read(until="Starting")
    family = server.family()
    server.read(until="error")
    assert server.finish() == 1
    assert server.lines[-1] == (
        "error: Rampart cannot serve this archive: calibration.json is not the file that was packed"
        " (its SHA-256 differs from sha256.json): rebuild the archive, or fetch it again"
    )
    assert wait_gone(family) == []
    assert not list(server.temp.iterdir())
