"""`rampart.Client` against real servers: TorchServe, and Rampart's own."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from servers import Server, certificate_and_key, free_port

import rampart as rp

Start = Callable[..., Server]
Encode = Callable[..., bytes]


@pytest.fixture(params=["TorchServe", "Rampart"])
def endpoint(request: pytest.FixtureRequest) -> Server:
    """Each of the two servers in turn, on the same archive."""
    name = "server" if request.param == "TorchServe" else "front"
    found: Server = request.getfixturevalue(name)
    return found


@pytest.fixture
def picture(encode: Encode, pixels: np.ndarray) -> bytes:
    return encode(pixels)


class Busy(BaseHTTPRequestHandler):
    """A gateway that is busy as often as `times` says, and has no verdicts."""

    times, asked, pause = 0, 0, "0"
    body = b'{"well": "done"}'

    def do_POST(self) -> None:
        kind = type(self)
        kind.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = (503, b"later") if kind.asked <= kind.times else (200, kind.body)
        self.send_response(status)
        if kind.pause:
            self.send_header("Retry-After", kind.pause)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def busy() -> Iterator[tuple[type[Busy], str]]:
    """The gateway's counters, and an address behind it."""
    kind = type("Own", (Busy,), {})
    with HTTPServer(("127.0.0.1", 0), kind) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        yield kind, f"http://127.0.0.1:{gateway.server_port}/some/predictions/tiny"
        gateway.shutdown()


def test_every_way_to_name_a_picture_gets_the_verdict_that_curl_gets(
    endpoint: Server, picture: bytes, pixels: np.ndarray, tmp_path: Path
) -> None:
    told = requests.post(endpoint.url, picture, timeout=60).json()
    file = tmp_path / "sign.png"
    file.write_bytes(picture)
    with rp.Client(endpoint.url) as client:
        for way in (str(file), file, picture, Image.fromarray(pixels), pixels):
            verdict = client.predict(way)
            assert isinstance(verdict, rp.Verdict)
            assert verdict.to_dict() | {"top": list(verdict.top)} == told
        assert verdict.p_value == told["detail"]["p_value"]
        assert client.health()


def test_a_list_is_one_request_and_a_picture_at_fault_harms_no_other(
    endpoint: Server, picture: bytes, pixels: np.ndarray
) -> None:
    with rp.Client(endpoint.url) as client:
        alone = [client.predict(np.roll(pixels, step, 1)) for step in range(12)]
        many: list[bytes | np.ndarray] = [np.roll(pixels, step, 1) for step in range(12)]
        answers = client.predict([*many, b"no picture", picture])
        assert answers[:12] == alone and answers[13] == alone[0]
        error = answers[12]
        assert isinstance(error, rp.EndpointError)
        assert (error.code, error.type) == (415, "unsupported_format")
        assert client.predict([picture]) == alone[:1]
        with pytest.raises(rp.EndpointError, match="413 too_many_images"):
            client.predict([picture] * 33)
        with pytest.raises(ValueError, match="no pictures in the list"):
            client.predict(list[bytes]())


def test_an_error_has_code_type_and_message(endpoint: Server) -> None:
    with rp.Client(endpoint.url) as client, pytest.raises(rp.EndpointError) as caught:
        client.predict(b"hello")
    error = caught.value
    assert (error.code, error.type) == (415, "unsupported_format")
    assert error.message == "not a JPEG, PNG or WebP image: send one of these"
    missing = rp.Client(f"{endpoint.root}/predictions/other")
    with missing, pytest.raises(rp.EndpointError) as caught:
        missing.predict(b"hello")
    assert caught.value.code == 404 and caught.value.message


def test_asyncio_asks_many_at_once(endpoint: Server, picture: bytes, pixels: np.ndarray) -> None:
    async def ask() -> tuple[list[Any], bool]:
        async with rp.AsyncClient(endpoint.url) as client:
            each = [client.predict(np.roll(pixels, step, 0)) for step in range(8)]
            answers: list[Any] = await asyncio.gather(*each)
            answers += await client.predict([picture, b"hello"])
            with pytest.raises(rp.EndpointError, match="415"):
                await client.predict(b"hello")
            return answers, await client.health()

    answers, health = asyncio.run(ask())
    with rp.Client(endpoint.url) as client:
        assert answers[:8] == [client.predict(np.roll(pixels, step, 0)) for step in range(8)]
    assert answers[8] == answers[0] and answers[9].code == 415 and health


def test_metadata_are_rampart_servers_and_torchserve_says_that_it_has_none(
    front: Server, server: Server
) -> None:
    with rp.Client(front.url) as client:
        told = client.metadata()
    assert told["name"] == "tiny" and told["card"]["variant"] == "full"
    with rp.Client(f"{front.url}/1.0") as client:
        assert client.metadata() == told

    async def ask() -> dict[str, Any]:
        async with rp.AsyncClient(front.url) as client:
            return await client.metadata()

    assert asyncio.run(ask()) == told
    with rp.Client(server.url) as client, pytest.raises(rp.EndpointError, match="404"):
        client.metadata()


def test_a_token_opens_and_a_certificate_is_trusted(
    start: Start, tiny_archive: Path, picture: bytes, tmp_path: Path
) -> None:
    (certificate, key), tokens = certificate_and_key(tmp_path), tmp_path / "tokens"
    tokens.write_text(f"team {'a' * 20}\nslow {'c' * 20} 0.01 1\n")
    files = {"tokens": str(tokens), "tls": [str(certificate), str(key)]}
    server = start(tiny_archive, port=free_port(), **files)
    assert "Rampart is ready" in server.read(), server.lines
    url = server.url.replace("http:", "https:")
    with rp.Client(url, token="a" * 20, certificate=certificate) as client:
        assert client.predict(picture).decision in ("accept", "flag")
    with rp.Client(url, token="b" * 20, certificate=str(certificate)) as client:
        assert client.health()  # needs no token
        with pytest.raises(rp.EndpointError, match="401 no_token"):
            client.predict(picture)
    with rp.Client(url, token="c" * 20, certificate=certificate) as client:
        client.predict(picture)
        with pytest.raises(rp.EndpointError, match="429 too_many_requests"):  # not asked again
            client.predict(picture)
    with (
        rp.Client(url, token="a" * 20) as client,
        pytest.raises(rp.EndpointError, match=r"0 no_answer.*certificate"),
    ):
        client.predict(picture)


def test_a_chain_without_its_root_is_trusted(
    start: Start, tiny_archive: Path, picture: bytes, tmp_path: Path
) -> None:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=tmp_path)

    (tmp_path / "above.txt").write_text("basicConstraints=critical,CA:TRUE\n")
    (tmp_path / "below.txt").write_text("subjectAltName=IP:127.0.0.1\n")
    new = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl("req", "-x509", *new, "root.key", "-out", "root.pem", "-subj", "/CN=root")
    issuer = "root"
    for name, more in (("middle", "above.txt"), ("leaf", "below.txt")):
        openssl("req", *new, f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key", "-CAcreateserial")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem"),
            *(*signed, "-extfile", more),
        )
        issuer = name
    chain = tmp_path / "chain.pem"
    chain.write_text((tmp_path / "leaf.pem").read_text() + (tmp_path / "middle.pem").read_text())
    server = start(tiny_archive, port=free_port(), tls=[str(chain), str(tmp_path / "leaf.key")])
    assert "Rampart is ready" in server.read(), server.lines
    url = server.url.replace("http:", "https:")
    with rp.Client(url, certificate=chain) as client:
        assert client.predict(picture).decision in ("accept", "flag")


@pytest.mark.parametrize(
    ("times", "pause", "asked", "error"),
    [
        (2, "0", 3, "200 unknown"),  # answered at last, though with no verdict
        (9, "0", 4, "503 unknown: the answer, with status 503, is not one of Rampart"),
        (9, "3600", 1, "503"),
        (9, "", 1, "503"),
        (9, "soon", 1, "503"),
    ],
)
def test_only_a_server_that_says_when_is_asked_again_and_not_for_ever(
    busy: tuple[type[Busy], str], times: int, pause: str, asked: int, error: str
) -> None:
    kind, url = busy
    kind.times, kind.pause = times, pause
    with rp.Client(url) as client, pytest.raises(rp.EndpointError, match=error):
        client.predict(b"picture")
    assert kind.asked == asked

    async def ask() -> None:
        async with rp.AsyncClient(url) as client:
            await client.predict(b"picture")

    kind.asked = 0
    with pytest.raises(rp.EndpointError, match=error):
        asyncio.run(ask())
    assert kind.asked == asked


VERDICT = {"label": "a", "index": 0, "confidence": 1.0, "decision": "accept", "top": []}
STRANGE = VERDICT | {"model": {}, "detail": {"p_value": 1.0, "scores": []}}


@pytest.mark.parametrize(
    ("content", "count", "error"),
    [
        ({"boxes": [], "decision": "accept", "model": {}}, 1, "200 boxes: this endpoint detects"),
        ({"predictions": [{"boxes": []}] * 2}, 2, "200 boxes: this endpoint detects objects"),
        ({"predictions": [5, "code"]}, 2, "200 unknown"),
        ({"predictions": [VERDICT, {"code": "none"}]}, 2, "200 unknown"),
        ({"predictions": [VERDICT]}, 2, "200 unknown"),
        (STRANGE, 1, "200 unknown"),
    ],
)
def test_an_answer_that_is_no_verdict_on_a_class_is_an_error_of_the_endpoint(
    busy: tuple[type[Busy], str], content: dict[str, Any], count: int, error: str
) -> None:
    kind, url = busy
    kind.body = json.dumps(content).encode()
    with rp.Client(url) as client, pytest.raises(rp.EndpointError, match=error):
        client.predict([b"picture"] * count if count > 1 else b"picture")


def test_where_nobody_listens_the_error_names_the_address() -> None:
    url = f"http://127.0.0.1:{free_port()}/predictions/tiny"
    with rp.Client(url, timeout=5) as client:
        assert not client.health()
        with pytest.raises(rp.EndpointError) as caught:
            client.predict(b"picture")
    assert (caught.value.code, caught.value.type) == (0, "no_answer")
    assert url in caught.value.message


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080/predictions/a", "http://a", "http://a/predictions/", "http://a/v1/b"]
)
def test_an_address_that_is_none_of_predictions_is_refused_at_once(url: str) -> None:
    for kind in (rp.Client, rp.AsyncClient):
        with pytest.raises(ValueError, match="rampart serve"):
            kind(url)


def test_what_is_no_picture_is_refused_before_it_is_sent() -> None:
    wrong: list[Any] = [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 3)), 5]
    with rp.Client("http://127.0.0.1:1/predictions/tiny") as client:
        for picture in wrong:
            with pytest.raises(ValueError, match="pixels uint8"):
                client.predict(picture)
        with pytest.raises(FileNotFoundError):
            client.predict("missing.png")


def test_a_pillow_image_is_sent_as_it_is_shown(front: Server, pixels: np.ndarray) -> None:
    turned, stream = Image.Exif(), BytesIO()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(stream, "JPEG", exif=turned, quality=100)
    camera = Image.open(stream)
    with rp.Client(front.url) as client:
        as_file = client.predict(stream.getvalue())
        assert client.predict(camera) == as_file
        assert client.predict(np.array(camera)) != as_file
        ink = Image.fromarray(pixels).convert("CMYK")
        assert client.predict(ink) == client.predict(ink.convert("RGB"))


def test_without_its_package_the_client_says_what_to_install_and_torch_stays_away() -> None:
    blocked = "import sys; sys.modules['httpx2'] = None\nimport rampart as rp\nrp.Client"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert 'pip install "rampart-endpoint[client]"' in done.stderr
    code = "import json, sys, rampart; rampart.Client; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnxruntime"} & set(json.loads(done.stdout))
