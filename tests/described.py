"""Whether a server answers as its own description says: schemathesis asks."""

import subprocess
import sys
from pathlib import Path

import requests

# How a body that the description forbids may be refused; by itself schemathesis knows no 413.
STATUSES = "[checks.negative_data_rejection]\nexpected-statuses = [400, 403, 404, 413, 415, 422]\n"


def assert_described(root: str, folder: Path, *options: str) -> None:
    """It finds no answer that /openapi.json does not allow; what it writes goes into `folder`."""
    headers = dict(one.split(": ", 1) for one in options[1::2])
    text = requests.get(f"{root}/openapi.json", headers=headers, timeout=10).text
    (folder / "openapi.json").write_text(text)
    (folder / "schemathesis.toml").write_text(STATUSES)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json"]
    command += ["--url", root, "--max-examples", "30", "--no-color", *options]
    command += ["--generation-deterministic"]
    # A body of the right shape need not hold a picture, so it may be refused.
    excluded = "positive_data_acceptance"
    done = subprocess.run(
        [*command, "--exclude-checks", excluded], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 22" in done.stdout
