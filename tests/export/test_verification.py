from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from model_signing import signing

from export.verification import verify


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key as OpenSSL writes them."""
    made = generate_private_key(SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    spki = PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(made.public_key().public_bytes(Encoding.PEM, spki))
    return private, public


def test_a_whole_archive_is_told_with_the_hash_to_compare(tiny_archive: Path) -> None:
    whole, unsigned = verify(tiny_archive)
    assert whole.endswith("files have the hashes that sha256.json lists")
    assert "no signature was checked" in unsigned


def test_a_damaged_archive_is_refused(tiny_archive: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "a.mar"
    content = bytearray(tiny_archive.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mar"):
        list(verify(damaged))


def test_a_signature_holds_for_its_file_and_its_key_alone(
    tiny_archive: Path, tmp_path: Path
) -> None:
    (private, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "theirs")
    archive, signature = tmp_path / "a.mar", tmp_path / "a.sig"
    archive.write_bytes(tiny_archive.read_bytes())
    signing.Config().use_elliptic_key_signer(private_key=private).sign(archive, signature)
    signed, _ = verify(archive, signature, public)
    assert signed.endswith("a.mar: signed by the holder of mine.pub.pem")
    with pytest.raises(ValueError, match=r"a\.sig is not the signature of a\.mar by theirs"):
        list(verify(archive, signature, other))
    archive.write_bytes(tiny_archive.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="do not load it"):
        list(verify(archive, signature, public))
    with pytest.raises(ValueError, match="go together"):
        list(verify(archive, signature))
    with pytest.raises(FileNotFoundError, match=r"missing\.mar"):
        list(verify(tmp_path / "missing.mar"))
