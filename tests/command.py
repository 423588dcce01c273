"""The command line, as a test types it."""

from typer.testing import CliRunner

from rampart import cli


def run(*arguments: object) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
