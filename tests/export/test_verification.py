import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from rampart.export.verification import ADDED, verify
from rampart.handlers.contents import verify as check


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
    assert whole.endswith("files have the hashes that sha256.json lists; it has none itself")
    assert "no signature to check" in unsigned


def test_a_damaged_archive_is_refused(tiny_archive: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "a.mar"
    content = bytearray(tiny_archive.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mar"):
        list(verify(damaged))


def rewritten(archive: Path, out: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive with other contents."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


@pytest.mark.parametrize("name", ["model-config.yaml", "MAR-INF/MANIFEST.json", "defended.py"])
def test_an_archive_that_lacks_what_torchserve_wants_is_refused(
    unpacked: Path, repack: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    hashes = json.loads((unpacked / "sha256.json").read_text())
    del hashes[name]
    less = repack(tmp_path, {name: None, "sha256.json": json.dumps(hashes).encode()})
    with pytest.raises(ValueError, match=f"has no {name}: rebuild the archive"):
        list(verify(less))


@pytest.mark.parametrize(
    "name", ["model-config.yaml", "MAR-INF/MANIFEST.json", "defended.py", "labels.json"]
)
def test_a_changed_file_is_refused_by_us_and_by_the_handler(
    tiny_archive: Path, tmp_path: Path, name: str
) -> None:
    changed = rewritten(
        tiny_archive, tmp_path / "a.mar", lambda n, data: data + b"\n" if n == name else data
    )
    with pytest.raises(ValueError, match=rf"a\.mar: {name} is not the file that was packed"):
        list(verify(changed))
    with zipfile.ZipFile(changed) as packed:
        packed.extractall(tmp_path / "unpacked")
    with pytest.raises(ValueError, match=f"{name} is not the file that was packed"):
        check(tmp_path / "unpacked")


def test_an_archive_of_before_is_told_by_what_has_no_hash(
    tiny_archive: Path, tmp_path: Path
) -> None:
    def shorter(name: str, data: bytes) -> bytes:
        if name != "sha256.json":
            return data
        return json.dumps({n: d for n, d in json.loads(data).items() if n not in ADDED}).encode()

    old = rewritten(tiny_archive, tmp_path / "a.mar", shorter)
    whole, unlisted, unsigned = verify(old)
    assert "files have the hashes" in whole and "no signature" in unsigned
    assert unlisted == (
        "MAR-INF/MANIFEST.json, defended.py, model-config.yaml have none, as an older"
        " `rampart archive` packed them: rebuild the archive"
    )
    changed = rewritten(
        old, tmp_path / "b.mar", lambda n, data: data + b"#" if n == "defended.py" else data
    )
    with pytest.raises(ValueError, match=r"its defended\.py has changed since it was packed"):
        list(verify(changed))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"[]", r"a\.mar: sha256\.json is not a list of files"),
        (b"[" * 100_000, r"a\.mar: sha256\.json is missing or unreadable"),
        (b'{"/proc/kcore": "0"}', r"a\.mar: /proc/kcore is missing from the archive"),
        (b'{"../up": "0"}', r"a\.mar: \.\./up is missing from the archive"),
    ],
)
def test_a_list_of_hashes_reaches_no_other_file(
    tiny_archive: Path, tmp_path: Path, listed: bytes, message: str
) -> None:
    forged = rewritten(
        tiny_archive, tmp_path / "a.mar", lambda n, data: listed if n == "sha256.json" else data
    )
    with pytest.raises(ValueError, match=message):
        list(verify(forged))


def test_a_text_that_would_fill_memory_is_refused(tiny_archive: Path, tmp_path: Path) -> None:
    forged = tmp_path / "a.mar"
    with zipfile.ZipFile(tiny_archive) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("more.json", bytes(65_000_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'more\.json' of more than 64 MB: do not trust it"):
        list(verify(forged))


def test_a_signature_holds_for_its_file_and_its_key_alone(
    tiny_archive: Path, tmp_path: Path
) -> None:
    from model_signing import signing  # half a second

    (private, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "theirs")
    archive, signature = tmp_path / "a.mar", tmp_path / "a.sig"
    archive.write_bytes(tiny_archive.read_bytes())
    signing.Config().use_elliptic_key_signer(private_key=private).sign(archive, signature)
    signed, _ = verify(archive, signature, public)
    assert signed.endswith("a.mar: signed by the holder of mine.pub.pem")
    with pytest.raises(ValueError, match=r"a\.sig is not a signature of a\.mar by theirs"):
        list(verify(archive, signature, other))
    archive.write_bytes(tiny_archive.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="do not load it"):
        list(verify(archive, signature, public))
    with pytest.raises(ValueError, match="go together"):
        list(verify(archive, signature))
    with pytest.raises(FileNotFoundError, match=r"missing\.mar"):
        list(verify(tmp_path / "missing.mar"))
