"""Clients that others wrote, and what each makes of a verdict."""

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton

KSERVE = Path(sys.prefix) / "kserve" / "bin" / "python"
ASK_KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def ask(root, version, name, headers, data):
    client = InferenceRESTClient(RESTConfig(protocol=version, retries=0))
    if version == "v2":
        image = InferInput(name, [1, 32, 32, 3], "UINT8")
        image.set_data_from_numpy(np.array(data, np.uint8), binary_data=False)
        data = InferRequest("tiny", [image], request_id="7")
    answer = await client.infer(root, data, headers=headers, model_name="tiny")
    if version == "v2":
        answer = answer.to_rest()[0]
    await client.close()
    return answer

root, version, name, headers = sys.argv[1:]
print(json.dumps(asyncio.run(ask(root, version, name, json.loads(headers), json.load(sys.stdin)))))
"""


def assert_same(found: Mapping[str, Any], verdict: Mapping[str, Any]) -> None:
    """The tensors of one image say what the verdict says."""
    assert list(found["label"]) == [verdict["label"]]
    assert list(found["index"]) == [verdict["index"]]
    assert list(found["decision"]) == [verdict["decision"]]
    np.testing.assert_allclose(found["confidence"], [verdict["confidence"]], rtol=1e-5)
    np.testing.assert_allclose(found["p_value"], [verdict["detail"]["p_value"]], rtol=1e-5)


def tensors(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry["data"] for entry in answer["outputs"]}


def assert_kserves_client_gets(
    verdict: Mapping[str, Any],
    root: str,
    version: str,
    pixels: np.ndarray,
    picture: bytes,
    *,
    name: str = "image",
    headers: Mapping[str, str] = {},
) -> None:
    """KServe's own client sends the picture by v1, or its pixels by v2 in a tensor `name`."""
    data: object = [pixels.tolist()]
    if version == "v1":
        data = {"instances": [{"b64": base64.b64encode(picture).decode()}]}
    done = subprocess.run(
        [KSERVE, "-c", ASK_KSERVE, root, version, name, json.dumps(dict(headers))],
        input=json.dumps(data), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    if version == "v1":
        assert answer == {"predictions": [verdict]}
    else:
        assert answer["id"] == "7"
        own = tensors(answer)
        assert_same({key: np.ravel(data) for key, data in own.items()}, verdict)


def assert_tritons_client_gets(
    verdict: Mapping[str, Any],
    port: int,
    pixels: np.ndarray,
    *,
    binary: bool,
    headers: Mapping[str, str] = {},
) -> None:
    """Triton's HTTP client sends pixels, in JSON or behind it."""
    image = triton.InferInput("image", [1, 32, 32, 3], "UINT8")
    image.set_data_from_numpy(pixels[None], binary_data=binary)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        answer = client.infer("tiny", [image], request_id="7", headers=dict(headers))
    found = {name: answer.as_numpy(name) for name in ("index", "confidence", "p_value")}
    for name in ("label", "decision"):
        texts = answer.as_numpy(name)
        found[name] = [one.decode() if isinstance(one, bytes) else one for one in texts]
    assert_same(found, verdict)
