"""Whether an archive is whole, and whose it is. Its hashes reveal damage, a signature attacks too:
OpenSSF Model Signing, by a key, over the whole file (sigstore/model-transparency).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rampart.export.unpacking import ADDED, unpack
from rampart.handlers.contents import HASHES
from rampart.handlers.engine import sha256
from rampart.hardening.model.presence import check_archive, check_file


def verify(archive: Path, signature: Path | None = None, key: Path | None = None) -> Iterator[str]:
    """A line for people about each check that passes. Raises ValueError about one that fails."""
    if (signature is None) != (key is None):
        raise ValueError("--signature and --public-key go together")
    check_archive(archive)
    for file in filter(None, (signature, key)):
        check_file(file, "signature" if file == signature else "key", "name the file of it")
    if signature and key:
        yield signed(archive, signature, key)
    with tempfile.TemporaryDirectory() as scratch:
        hashes = unpack(archive, Path(scratch))
    free = {name for name, digest in hashes.items() if digest is None} - {HASHES}
    if more := free - ADDED:
        raise ValueError(f"{archive} holds {', '.join(sorted(more))}, which nobody packed")
    count = len(hashes) - len(free) - 1
    yield f"{archive}: {count} files have the hashes that {HASHES} lists; it has none itself"
    if free:
        yield (
            f"{', '.join(sorted(free))} have none, as an older `rampart archive` packed them:"
            " rebuild the archive"
        )
    if signature is None:
        yield f"no signature to check: compare {sha256(archive)} with what its maker says"


def signed(archive: Path, signature: Path, key: Path) -> str:
    """A line, if the holder of `key` (PEM) made `signature` for this very file."""
    try:
        from model_signing import verifying
    except ImportError as error:
        raise RuntimeError("signatures need `pip install model-signing pyopenssl`") from error
    try:
        config = verifying.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_verifier(public_key=key).verify(archive, signature)
    except Exception as error:  # of cryptography, of JSON, its own: they have no common type
        raise ValueError(
            f"{signature.name} is not a signature of {archive.name} by {key.name}: do not load it"
        ) from error
    return f"{archive}: signed by the holder of {key.name}"
