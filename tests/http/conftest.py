"""A real HTTP server of ours on the tiny archive, and requests to it of all kinds."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sent import Sent
from servers import Server

Encode = Callable[..., bytes]

CODE = """
import json, sys
from pathlib import Path
from rampart.launch.http import Front, serve
options = json.loads(sys.argv[2])
for name in ("tokens", "tls", "quarantine"):
    if options.get(name):
        value = options[name]
        options[name] = Path(value) if isinstance(value, str) else tuple(map(Path, value))
sys.exit(serve(Front(archives=tuple(map(Path, sys.argv[1].split(":"))), **options)))
"""


@pytest.fixture(scope="session")
def start(launch: Callable[..., Server]) -> Callable[..., Server]:
    """Starts servers of one archive, or of several; `first` is code that runs before."""

    def begin(*archives: Path, first: str = "", **options: object) -> Server:
        return launch(Path(os.pathsep.join(map(str, archives))), code=first + CODE, **options)

    return begin


@pytest.fixture(scope="session")
def front(start: Callable[..., Server], tiny_archive: Path) -> Server:
    """One server with two workers that most tests share."""
    server = start(tiny_archive, workers=2)
    assert "Rampart is ready" in server.read(), server.lines
    return server


@pytest.fixture(scope="session")
def requests_of_all_kinds(encode: Encode, pixels: np.ndarray) -> dict[str, Sent]:
    """Requests of every protocol, good and bad, by name."""
    picture, large = encode(pixels), encode(np.tile(pixels, (7, 9, 1)), "JPEG")
    noise = encode(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8), "WEBP")
    alpha = encode(np.dstack([pixels, pixels[..., 0]]))
    text = base64.b64encode(picture).decode()
    route, v1, v2 = "/predictions/tiny", "/v1/models/tiny:predict", "/v2/models/tiny/infer"
    json_kind = {"Content-Type": "application/json"}

    def tensor(**changes: object) -> bytes:
        one = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]} | changes
        return json.dumps({"id": "7", "inputs": [one]}).encode()

    many = json.dumps({"instances": [{"b64": text}, {"b64": "bm8="}, {"b64": "!"}, 5]}).encode()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(picture) + 4},
                }
            ]
        }
    ).encode()
    binary = header + len(picture).to_bytes(4, "little") + picture
    flat = {"datatype": "UINT8", "shape": [1, 32, 32, 3], "data": pixels.flatten().tolist()}
    form = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + picture + b"\r\n--x--\r\n"
    )
    two = form.removesuffix(b"--x--\r\n") + form.replace(b'name="image"', b'name="other"')
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    return {
        "png": (route, picture, {}),
        "jpeg": (route, large, {"Content-Type": "image/jpeg"}),
        "webp": (route, noise, {"Content-Type": "application/octet-stream"}),
        "form": (route, form, multipart),
        "form of two": (route, two, multipart),
        "v1 on predictions": (route, many, json_kind),
        "v1": (v1, json.dumps({"instances": [{"b64": text}]}).encode(), json_kind),
        "v1 of many": (v1, many, json_kind),
        "v1 without instances": (v1, b"{}", json_kind),
        "v2": (v2, tensor(), json_kind),
        "v2 on predictions": (route, tensor(), json_kind),
        "v2 of pixels": (v2, tensor(**flat), json_kind),
        "v2 binary": (v2, binary, {"Inference-Header-Content-Length": str(len(header))}),
        "v2 malformed": (v2, tensor(shape=[2]), json_kind),
        "v2 of another type": (v2, tensor(datatype="FP32"), json_kind),
        "raw on v1": (v1, picture, {}),
        "alpha": (route, alpha, {}),
        "text": (route, b"hello", {}),
        "half": (route, picture[: len(picture) // 2], {}),
        "no JSON": (route, b"{", json_kind),
        "too deep": (route, b"[" * 10_000, json_kind),
        "traced": (
            route,
            picture,
            {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        ),
    }
