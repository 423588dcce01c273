"""A real Prometheus that reads servers, and its judgement of what they show."""

import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import requests
import yaml
from servers import free_port


def assert_well_formed(text: str, *, histograms: bool = True) -> None:
    """promtool reads the figures, and finds no fault with the style of ours.

    Servers without `histograms` show the parts of ours as counters, which is no good style.
    """
    if not shutil.which("promtool"):
        pytest.skip("needs promtool of Prometheus")
    words = ["promtool", "check", "metrics"]
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr  # 3: of style
    if histograms:
        assert "rampart_" not in done.stdout + done.stderr, done.stdout + done.stderr


def scraped(
    folder: Path, targets: Mapping[str, str], query: str, token: str = ""
) -> dict[str, float]:
    """What `query` says of each target, HOST:PORT, once Prometheus has read them all."""
    if not (program := shutil.which("prometheus")):
        pytest.skip("needs Prometheus")
    own: dict[str, object] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    if token:
        own["authorization"] = {"credentials": token}
    jobs = [
        own | {"job_name": name, "static_configs": [{"targets": [target]}]}
        for name, target in targets.items()
    ]
    file, address = folder / "prometheus.yml", f"127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump({"scrape_configs": jobs}))
    words = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    words += [f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    found: dict[str, float] = {}
    try:
        end = time.monotonic() + 60
        while set(found) != set(targets):
            assert process.poll() is None and time.monotonic() < end, (
                found,
                (folder / "prometheus.log").read_text()[-3000:],
            )
            time.sleep(0.5)
            found = _asked(address, f"({query}) and on(job) (up == 1)")
    finally:
        process.terminate()
        process.wait(30)
    return found


def _asked(address: str, query: str) -> dict[str, float]:
    try:
        url = f"http://{address}/api/v1/query"
        answer = requests.get(url, params={"query": query}, timeout=5).json()
    except requests.RequestException:
        return {}
    return {one["metric"]["job"]: float(one["value"][1]) for one in answer["data"]["result"]}
