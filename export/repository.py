"""Versions of a model in a repository of Triton, which a server may be watching."""

import shutil
from pathlib import Path


def check_free(home: Path, version: int) -> None:
    """Raise ValueError where a model's folder has such a version."""
    if (home / str(version)).exists():
        raise ValueError(f"{home / str(version)} exists: name another --model-version")


def place(home: Path, version: int, texts: dict[str, str], content: Path) -> None:
    """Add the files of `content` as a version: first what it needs, then itself at once."""
    for name, text in texts.items():
        if (home / name).is_file() and (home / name).read_text() != text:
            raise ValueError(
                f"{home / name} belongs to a model with other inputs or outputs, and all versions"
                " share it: choose another repository"
            )
    home.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (home / name).write_text(text)
    partial = home / f"{version}.partial"  # no number, so Triton ignores it
    if partial.exists():  # of an export that was interrupted
        shutil.rmtree(partial)
    shutil.copytree(content, partial)
    partial.rename(home / str(version))
