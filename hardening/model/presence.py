"""Whether a file is there and has arrived, before anything reads it: the standard library alone."""

from pathlib import Path

POINTER = b"version https://git-lfs"
ZIP = b"PK"


def check_file(path: Path, what: str, remedy: str) -> bytes:
    """The first bytes of a file that holds `what`; `remedy` says how one comes by it.

    Raises FileNotFoundError or ValueError for none, a folder, an empty file and a Git LFS pointer.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a file is expected ({what}): {remedy}")
    if not path.exists():
        raise FileNotFoundError(f"there is no {what} at {path}: {remedy}")
    with path.open("rb") as file:
        head = file.read(len(POINTER))
    if not head:
        raise ValueError(f"{path} is empty: copy or download it again")
    if head == POINTER:
        raise ValueError(
            f"{path} is only a Git LFS pointer to the {what}: fetch the file with `git lfs pull`"
        )
    return head


def check_archive(path: Path) -> None:
    """Raise FileNotFoundError or ValueError where `path` is no zip file called NAME.mar."""
    model = f"model_store/{path.stem}"
    head = check_file(
        path,
        "archive",
        f"build it with `rampart archive {model} --out {path.with_suffix('.mar')}`, where {model}"
        f" is the model's folder, or with `make serve MODEL={path.stem}` in the Rampart checkout",
    )
    if path.suffix != ".mar":
        raise ValueError(f"{path} is not called NAME.mar: pass a file of `rampart archive`")
    if not head.startswith(ZIP):
        raise ValueError(f"{path} is not a TorchServe archive: rebuild it")
