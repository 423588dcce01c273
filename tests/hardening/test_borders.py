"""Which room may import which: dependencies point one way, so a room can be read by itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A room, and the rooms of hardening that it may know.
ROOMS = {
    "model": {"model"},
    "attack": {"model", "attack"},
    "train": {"model", "attack", "train"},
    "judge": {"model", "attack", "judge"},
    "objects": {"model", "attack", "train", "judge", "objects"},
    "report": {"model", "attack", "judge", "report"},
}


def imports(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, module) of every import below `folder`, those inside functions too."""
    for file in sorted(folder.rglob("*.py")):
        name = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} has a relative import"
                # A name may itself be a module.
                yield from ((name, f"{node.module}.{alias.name}") for alias in node.names)


def below(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_hardening_knows_only_those_before_it(room: str) -> None:
    allowed = [f"rampart.hardening.{name}" for name in ROOMS[room]]
    found = [
        (file, module)
        for file, module in imports(ROOT / "hardening" / room)
        if below(module, "rampart.hardening") and not below(module, *allowed)
    ]
    assert not found


def test_every_file_of_hardening_is_in_a_room() -> None:
    rooms = {path.name for path in (ROOT / "hardening").iterdir() if path.is_dir()}
    assert rooms - {"__pycache__"} == set(ROOMS)
    assert [path.name for path in (ROOT / "hardening").glob("*.py")] == ["__init__.py"]


def test_hardening_gets_engines_and_asks_neither_exports_nor_commands() -> None:
    packages = ("rampart.export", "rampart.cli", "rampart.launch", "rampart.model")
    found = [pair for pair in imports(ROOT / "hardening") if below(pair[1], *packages)]
    assert not found


def test_handlers_serve_without_torch_the_servers_types_or_the_other_rooms() -> None:
    packages = ("torch", "torchvision", "ts", "rampart.hardening", "rampart.export", "rampart.cli")
    found = [pair for pair in imports(ROOT / "handlers") if below(pair[1], *packages)]
    assert not found


def test_a_model_loads_without_what_trains_attacks_and_draws() -> None:
    code = "import sys, rampart.hardening.model.pipeline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "rampart.hardening.model.detectors" in modules
    rest = [f"rampart.hardening.{room}" for room in ROOMS if room != "model"]
    unwanted = (*rest, "sklearn", "matplotlib", "jinja2", "pyautoattack")
    assert not [module for module in modules if below(module, *unwanted)]
