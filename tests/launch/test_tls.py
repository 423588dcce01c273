"""Predictions by https, with a token that lives as long as was asked."""

import contextlib
import ipaddress
import socket
import ssl
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from servers import Server, free_port

from rampart.launch.endpoint import LaunchError, check_tls

feature = pytest.mark.feature


def signed(key: Any, authority: Any, issuer: str) -> bytes:
    """A certificate of `key` for 127.0.0.1 by `authority`, PEM."""
    who, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in ("here", issuer))
    now, address = datetime.now(UTC), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return (
        x509.CertificateBuilder(by, who, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(authority, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that some authority signed, without that one's own, and its key."""
    folder, key = tmp_path_factory.mktemp("tls"), rsa.generate_private_key(65537, 2048)
    (folder / "c.pem").write_bytes(signed(key, rsa.generate_private_key(65537, 2048), "authority"))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "k.pem").write_bytes(private)
    return folder / "c.pem", folder / "k.pem"


def negotiated(
    port: int, ciphers: str = "ALL:@SECLEVEL=0", version: ssl.TLSVersion | None = None
) -> tuple[str, str]:
    """(version, cipher) that a client is given that takes only these, and anybody's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers(ciphers)
    if version:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is old
            context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        context.wrap_socket(plain) as connection,
    ):
        cipher = connection.cipher()
        assert cipher is not None
        return str(connection.version()), cipher[0]


def taken(port: int) -> int:
    """How many bytes of a plain request of 100 MB are taken before the server hangs up."""
    sent, block = 0, b"x" * 100_000
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n")
        while sent < 100_000_000:
            sent += connection.send(block)
    return sent


@feature("TLS", "TorchServe")
@feature("Tokens", "TorchServe")
def test_predictions_are_served_by_modern_https_to_who_has_a_token(
    launch: Callable[..., Server],
    tiny_archive: Path,
    pair: tuple[Path, Path],
    pixels: np.ndarray,
    encode: Callable[..., bytes],
) -> None:
    certificate, key = map(str, pair)
    options = {"tls": [certificate, key], "token_authorization": True, "token_minutes": 600}
    server = launch(tiny_archive, port=free_port(), **options)
    assert "Rampart is ready" in server.read(until="Keys are in"), server.lines
    assert server.lines[-1].endswith("live 600 min; for a new one:")
    url, body = server.url.replace("http:", "https:"), encode(pixels)
    known = server.keys
    token = {"Authorization": f"Bearer {known['inference']['key']}"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody here knows the authority
        answer = requests.post(url, data=body, headers=token, verify=False, timeout=60)
        stranger = requests.post(url, data=body, verify=False, timeout=60)
    assert answer.status_code == 200 and answer.json()["label"]
    assert stranger.status_code == 400
    plain = requests.post(server.url, data=body, headers=token, timeout=60)
    assert plain.status_code == 403 and "label" not in plain.text
    assert negotiated(server.port)[1] == "ECDHE-RSA-AES128-GCM-SHA256"
    assert negotiated(server.port, "ECDHE+AESGCM")[0] == "TLSv1.2"  # TorchServe takes no 1.3
    for ciphers in ("AES128-SHA", "ECDHE-RSA-AES128-SHA", "AES128-GCM-SHA256"):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            negotiated(server.port, ciphers)
    for old in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            negotiated(server.port, version=old)
    assert taken(server.port) < 10_000_000  # of a plain request without end
    ends = datetime.fromisoformat(known["inference"]["expiration time"][:26] + "+00:00")
    assert timedelta(hours=9) < ends - datetime.now(UTC) < timedelta(hours=11)
    assert server.end() == 0


def test_files_that_are_no_certificate_and_key_are_refused_before_java_starts(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    certificate, key = pair
    check_tls(certificate, key)
    for wrong in ((key, certificate), (tmp_path / "missing", key)):
        with pytest.raises(LaunchError, match="not a PEM certificate chain and its key"):
            check_tls(*wrong)


def test_a_key_that_torchserve_cannot_read_is_refused_before_java_starts(tmp_path: Path) -> None:
    made = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "c.pem").write_bytes(signed(made, made, "here"))
    private = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "k.pem").write_bytes(private)
    with pytest.raises(LaunchError, match=r"k\.pem is not an RSA key"):
        check_tls(tmp_path / "c.pem", tmp_path / "k.pem")
