"""A new version takes over from the old one while clients go on asking."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import requests
from servers import Server

from rampart.export.archive import archive


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
    body, seen, stop = encode(pixels), Counter[str](), threading.Event()
    lock = threading.Lock()

    def client() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(server.url, data=body, timeout=60)
                content = answer.json()
                version = content.get("model", {}).get("version", f"failed: {content}")
                with lock:
                    seen[version if answer.status_code == 200 else f"failed: {content}"] += 1

    def asked(least: int) -> None:
        deadline = time.monotonic() + 120
        while sum(seen.values()) < least and time.monotonic() < deadline:
            time.sleep(0.1)

    clients = [threading.Thread(target=client) for _ in range(8)]
    for one in clients:
        one.start()
    try:
        asked(300)
        manage = f"http://127.0.0.1:{server.port + 1}/models"
        known = {"url": "tiny-2.mar", "model_name": "tiny", "initial_workers": "1"}
        made = requests.post(
            manage, params=known | {"synchronous": "true"}, headers=server.token, timeout=120
        )
        assert made.status_code == 200, made.text
        asked(600)
        assert set(seen) == {"1.0"}
        changed = requests.put(f"{manage}/tiny/2.0/set-default", headers=server.token, timeout=60)
        changed.raise_for_status()
        asked(1_200)
        removed = requests.delete(f"{manage}/tiny/1.0", headers=server.token, timeout=60)
        removed.raise_for_status()
        asked(2_000)
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert set(seen) == {"1.0", "2.0"} and sum(seen.values()) >= 2_000, seen
    versions = requests.get(f"{manage}/tiny/all", headers=server.token, timeout=60).json()
    assert [entry["modelVersion"] for entry in versions] == ["2.0"]
    assert server.end() == 0
