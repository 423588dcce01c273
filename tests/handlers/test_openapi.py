"""What deploy/openapi.yaml says of the endpoint, held against a real one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from servers import Server

FILE = Path("deploy/openapi.yaml")
# How a body that the description forbids may be refused; by itself schemathesis knows no 413.
STATUSES = "[checks.negative_data_rejection]\nexpected-statuses = [400, 403, 404, 413, 415, 422]\n"


@pytest.mark.slow
def test_schemathesis_finds_no_answer_that_the_description_does_not_allow(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "openapi.yaml").write_text(FILE.read_text().replace("[MODEL]", "[tiny]"))
    (tmp_path / "schemathesis.toml").write_text(STATUSES)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.yaml"]
    command += ["--url", server.root, "--max-examples", "30", "--no-color"]
    command += ["--generation-deterministic", "--exclude-tag", "http"]
    # A body of the right shape need not hold a picture, so it may be refused; which methods there
    # are is TorchServe's to say.
    excluded = "positive_data_acceptance,unsupported_method"
    done = subprocess.run(
        [*command, "--exclude-checks", excluded], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 6" in done.stdout


def test_every_kind_of_verdict_has_the_described_form(
    server: Server, pixels: np.ndarray, encode: Callable[..., bytes]
) -> None:
    content = yaml.safe_load(FILE.read_text())
    known = Registry().with_resource("urn:api", Resource.from_contents(content, DRAFT202012))
    body = encode(pixels)
    for name, answer in (
        ("Verdict", requests.post(server.url, data=body, timeout=60)),
        ("Error", requests.post(server.url, data=b"hello", timeout=60)),
    ):
        schema = {"$ref": f"urn:api#/components/schemas/{name}"}
        Draft202012Validator(schema, registry=known).validate(answer.json())
