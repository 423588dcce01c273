"""A new version takes over from the old one while clients go on asking."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from servers import Server

from rampart.export.archive import archive

feature = pytest.mark.feature


@feature("A new version without a restart", "TorchServe")
@feature("Several models or versions", "TorchServe")
@pytest.mark.slow
def test_a_version_is_swapped_under_load_without_a_failed_request(
    launch: Callable[..., Server],
    tiny_archive: Path,
    tiny_shipped: Path,
    pixels: np.ndarray,
    encode: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(tiny_archive, store)
    archive(tiny_shipped, store / "tiny-2.mar", variant="lean", version="2.0")
    server = launch(store / "tiny.mar", model_api=True)
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines
    body, stop = encode(pixels), threading.Event()
    answers = [Counter[str]() for _ in range(8)]  # of each client, by version

    def client(own: Counter[str]) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(server.url, data=body, timeout=60)
                content = answer.json()
                version = content.get("model", {}).get("version", f"failed: {content}")
                own[version if answer.status_code == 200 else f"failed: {content}"] += 1

    def wait_for(version: str, count: int) -> None:
        """Until each client has so many answers of `version`."""
        deadline = time.monotonic() + 120
        while min(own[version] for own in answers) < count and time.monotonic() < deadline:
            time.sleep(0.1)

    clients = [threading.Thread(target=client, args=(own,)) for own in answers]
    for one in clients:
        one.start()
    try:
        wait_for("1.0", 30)
        manage = f"http://127.0.0.1:{server.port + 1}/models"
        known = {"url": "tiny-2.mar", "model_name": "tiny", "initial_workers": "1"}
        made = requests.post(
            manage, params=known | {"synchronous": "true"}, headers=server.token, timeout=120
        )
        assert made.status_code == 200, made.text
        assert set().union(*answers) == {"1.0"}
        changed = requests.put(f"{manage}/tiny/2.0/set-default", headers=server.token, timeout=60)
        changed.raise_for_status()
        wait_for("2.0", 1)  # who waits for 1.0 when it goes waits in vain
        removed = requests.delete(f"{manage}/tiny/1.0", headers=server.token, timeout=60)
        removed.raise_for_status()
        wait_for("2.0", 100)
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert set().union(*answers) == {"1.0", "2.0"}, answers
    assert min(own["2.0"] for own in answers) >= 100, answers
    versions = requests.get(f"{manage}/tiny/all", headers=server.token, timeout=60).json()
    assert [entry["modelVersion"] for entry in versions] == ["2.0"]
    assert server.end() == 0
