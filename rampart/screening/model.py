"""What a run is given as its model, as an archive."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rampart.export.archive import archive
from rampart.hardening.model.folder import form


@contextlib.contextmanager
def packed(model: Path) -> Iterator[Path]:
    """The archive that a path is, or one made of a model folder, as `rampart archive` makes it."""
    if not model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="rampart-") as scratch:
        file = Path(scratch) / f"{model.resolve().name}.mar"
        variant, precision = form(model, None, None)
        archive(model, file, variant=variant, precision=precision)
        yield file
