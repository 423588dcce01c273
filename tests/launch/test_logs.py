"""Logs: kept when the server has gone, for its owner alone, and without what clients sent."""

import io
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from servers import Server

from rampart.launch import logs

MARK = "SECRETMARK"
HOSTILE: list[tuple[dict[str, str], str, bytes]] = [
    (
        {"Content-Type": "application/x-www-form-urlencoded"},
        "",
        f"a={MARK}%zz{MARK}&{MARK}%".encode(),
    ),
    ({"Content-Type": "application/x-www-form-urlencoded"}, "", f"%{MARK}={MARK}".encode()),
    ({"Content-Type": "application/x-www-form-urlencoded"}, "", f"\x89PNG\r\n{MARK}".encode()),
    ({"Content-Type": "multipart/form-data"}, "", MARK.encode()),
    (
        {"Content-Type": "multipart/form-data; boundary=b"},
        "",
        f"--b\r\nContent-Disposition: form-data; name={MARK}\r\nContent-Type: {MARK}; charset="
        f"{MARK}\r\n\r\n{MARK}\r\n--b--\r\n".encode(),
    ),
    (
        {"Content-Type": "multipart/form-data; boundary=b"},
        "",
        f'--b\r\nContent-Disposition: form-data; name="a"; filename="{MARK}"\r\n'
        f"Content-Length: {MARK}\r\nContent-Transfer-Encoding: {MARK}\r\n\r\n{MARK}".encode(),
    ),
    ({"Content-Type": "multipart/form-data; boundary=b"}, "", f"--b\r\n{MARK}\r\n\r\n".encode()),
    ({"Content-Type": "application/json"}, "", f'{{"instances": ["{MARK}'.encode()),
    ({"Content-Type": "image/png"}, "", b"\x89PNG\r\n\x1a\n" + MARK.encode() * 20),
    ({"Content-Type": MARK, "traceparent": MARK, "X-Request-Id": MARK}, "", MARK.encode()),
    ({}, f"?{MARK}=%zz{MARK}", MARK.encode()),
]


def test_nothing_that_a_client_sent_gets_into_a_log(server: Server) -> None:
    statuses = []
    for headers, query, body in HOSTILE:
        answer = requests.post(f"{server.url}{query}", body, headers=headers, timeout=60)
        statuses.append(answer.status_code)
    requests.get(f"{server.root}/predictions/{MARK}%zz{MARK}", timeout=60)
    assert 500 in statuses or 403 in statuses  # these TorchServe would have logged
    time.sleep(1)
    written = {path.name: path.read_bytes() for path in server.logs.iterdir()}
    assert {"torchserve.log", "worker.log", "java.log"} <= set(written)
    assert [name for name, content in written.items() if MARK.encode() in content] == []


@pytest.mark.slow
def test_logs_stay_for_their_owner_alone_and_the_next_run_adds_to_them(
    launch: Callable[..., Server], tiny_archive: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    for runs in (1, 2):
        server = launch(tiny_archive, log_folder=str(folder))
        assert f"logs in {folder}" in server.read(until="Starting")[0]
        assert "Rampart is ready" in server.read(until="  curl '"), server.lines
        assert server.end() == 0 and not list(server.temp.iterdir())
        worker = (folder / "worker.log").read_text()
        assert worker.count(logs.BEGIN) == runs and "Torch worker started" in worker
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_failure_of_an_earlier_run_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    logs.place(tmp_path, "m", 8080, tmp_path)
    with (tmp_path / logs.WORKER).open("a") as log:
        log.write("t | Backend worker process died.\nt | ValueError: first\n")
        log.write("t | Backend worker process died.\nt | ValueError: last\n")
    assert logs.worker_failure(tmp_path) == "last"
    logs.place(tmp_path, "m", 8080, tmp_path)
    assert logs.worker_failure(tmp_path) is None


def test_without_a_folder_of_ones_own_logs_go_where_sockets_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    named = logs.place(None, "../m", 8080, tmp_path)
    assert named == tmp_path / "rampart" / ".._m-8080"
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/none")
    assert logs.place(None, "m", 8080, tmp_path) == tmp_path


def test_a_folder_that_cannot_be_made_is_named(
    launch: Callable[..., Server], tiny_archive: Path
) -> None:
    server = launch(tiny_archive, log_folder="/dev/null/logs")
    assert server.finish() == 1
    assert server.lines[0].startswith("error: cannot write logs to /dev/null/logs: ")


def test_what_java_prints_is_bounded(tmp_path: Path) -> None:
    lines = (b"Exception in thread 1" * 20 + b"\n") * 10_000  # 4.2 MB
    logs.keep(io.BytesIO(lines), tmp_path).join()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"java.log", "java.1.log"}
    assert max(sizes.values()) <= logs.JAVA_BYTES
