"""Whether an archive is whole, and whose it is.

    rampart verify NAME.mar --signature NAME.sig --public-key signer.pem

The hashes inside tell damage, and nothing of an attacker, who writes them anew. A signature tells
both: OpenSSF Model Signing, by a key, over the whole file (sigstore/model-transparency).
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rampart.export.archive import sha256
from rampart.export.unpacking import unpack
from rampart.handlers.contents import HASHES

# What torch-model-archiver adds: in archives of before it has no hash, though defended.py is
# compared with the listed one.
ADDED = {"MAR-INF/MANIFEST.json", "model-config.yaml", "defended.py"}


def verify(archive: Path, signature: Path | None = None, key: Path | None = None) -> Iterator[str]:
    """Lines for people, once each holds. Raises ValueError that says what does not."""
    if (signature is None) != (key is None):
        raise ValueError("--signature and --public-key go together")
    for file in (archive, signature, key):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no file at {file}")
    if signature and key:
        yield signed(archive, signature, key)
    with tempfile.TemporaryDirectory() as scratch:
        names = unpack(archive, Path(scratch))
        listed = json.loads((Path(scratch) / HASHES).read_text())
    free = set(names) - set(listed) - {HASHES}
    if more := free - ADDED:
        raise ValueError(f"{archive} holds {', '.join(sorted(more))}, which nobody packed")
    yield f"{archive}: {len(listed)} files have the hashes that {HASHES} lists; it has none itself"
    if free:
        yield (
            f"{', '.join(sorted(free))} have none, as an older `rampart archive` packed them:"
            " build the archive anew"
        )
    if signature is None:
        yield f"no signature was checked: compare {sha256(archive)} with what its maker says"


def signed(archive: Path, signature: Path, key: Path) -> str:
    """A line, if `signature` is that of the holder of `key` (PEM) for this very file."""
    try:
        from model_signing import verifying
    except ImportError as error:
        raise RuntimeError("signatures need `pip install model-signing pyopenssl`") from error
    try:
        config = verifying.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_verifier(public_key=key).verify(archive, signature)
    except Exception as error:  # of cryptography, of JSON, its own: they have no common type
        raise ValueError(
            f"{signature.name} is not the signature of {archive.name} by {key.name}: do not load it"
        ) from error
    return f"{archive}: signed by the holder of {key.name}"
