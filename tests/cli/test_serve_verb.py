"""Which server `rampart serve` starts, and what it says of an option that the other one has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from servers import Server, free_port

from rampart import cli
from rampart.cli import serve as verbs

CODE = "import sys; from rampart import cli; sys.argv = sys.argv[1].split(); sys.exit(cli.main())"


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The one line that a command which fails prints."""
    monkeypatch.setattr("sys.argv", ["rampart", "serve", *words])
    assert cli.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("rampart: ").removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--tokens t",
            "this would start torchserve, which has no --tokens: add --server http, or use"
            " TorchServe's tokens with --token-authorization",
        ),
        (
            "--delay 100",
            "this would start torchserve, which has no --delay: add --server http",
        ),
        (
            "--host 0.0.0.0 --token-authorization",
            "this would start http, which has no --token-authorization: add --server torchserve,"
            " or pass a token file with --tokens",
        ),
        (
            "--server http --token-minutes 60",
            "this would start http, which has no --token-minutes: add --server torchserve, or"
            " edit the --tokens file at any time",
        ),
        (
            "--archive a.mar --archive b.mar",
            "TorchServe takes one --archive: add --server http to serve several",
        ),
        ("--certificate c.pem", "--certificate and --certificate-key go together"),
    ],
)
def test_an_option_of_the_other_server_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    message: str,
) -> None:
    assert said(capsys, monkeypatch, *words.split()) == message


def test_every_option_of_one_server_is_an_option_and_says_so() -> None:
    options = {p.name: p for p in typer.main.get_command(cli.app).commands["serve"].params}
    for server, names in verbs.ONLY.items():
        assert all(options[name].help.startswith(f"{server}: ") for name in names)


def test_beyond_loopback_the_own_server_is_meant_and_wants_tokens(
    launch: Callable[..., Server], tiny_archive: Path
) -> None:
    words = f"rampart serve --archive {tiny_archive} --host 0.0.0.0 --port {free_port()}"
    server = launch(Path(words), code=CODE)
    assert server.finish() == 1
    assert "--tokens" in "".join(server.lines)


def test_serve_starts_the_server_that_is_named(
    launch: Callable[..., Server], tiny_archive: Path
) -> None:
    port = free_port()
    words = f"rampart serve --server http --archive {tiny_archive} --port {port}"
    server = launch(Path(words), code=CODE, port=port)
    assert "Rampart is ready" in server.read(), server.lines
    assert server.end() == 0


def test_a_folder_stands_for_its_archives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--archive", str(tmp_path), "--server", "http")
    assert said(capsys, monkeypatch, *words) == (
        f"{tmp_path} contains no archive: put a .mar there, or pass a .mar file"
    )
    for name in ("b.mar", "a.mar", "c.txt"):
        (tmp_path / name).touch()
    assert verbs._files([Path("x.mar"), tmp_path]) == [
        Path("x.mar"),
        tmp_path / "a.mar",
        tmp_path / "b.mar",
    ]
