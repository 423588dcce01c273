"""The notebooks run as they stand, and leave what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rampart.samples import SIGNS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


def run(name: str) -> dict[str, Any]:
    """What a notebook's names hold at its end; no server that it starts outlives it."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), scope)
    finally:
        if server := scope.get("server"):
            server.terminate()  # killed, it would leave its workers
            server.wait()
    return scope


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and no window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.training
def test_your_own_network_becomes_an_archive() -> None:
    run("own_model")
    assert Path("mine.mar").is_file()


@pytest.mark.training
@pytest.mark.slow
def test_the_first_attack_fools_the_twin_and_stays_in_its_bounds() -> None:
    scope = run("first_attack")
    assert scope["change"] == 4
    as_drawn, on_twin = (
        scope["verdicts"][title][0] for title in ("as drawn", "attack on the twin")
    )
    fooled = [one.label != other.label for one, other in zip(as_drawn, on_twin, strict=True)]
    assert any(fooled)
    with Image.open("first_attack.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.server
def test_an_archive_is_calibrated_served_asked_and_explained() -> None:
    scope = run("calibrate_and_serve")
    assert scope["result"].images == 25 * len(SIGNS) and scope["server"].returncode == 0
    assert scope["verdict"].label in scope["model"].classes
    assert scope["overlay"].size == (32, 32) and Path("why.png").is_file()


def test_each_notebook_is_without_output_run_here_named_in_the_documents_and_a_page() -> None:
    here = Path(__file__).read_text()
    documents = "".join(file.read_text() for file in (ROOT / "docs").rglob("*.md"))
    site = (ROOT / "mkdocs.yml").read_text()
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    assert len(notebooks) >= 3
    for notebook in notebooks:
        cells = json.loads(notebook.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        assert f'run("{notebook.stem}")' in here
        assert f"](../examples/{notebook.name})" in documents.replace("../../", "../")
        assert f": examples/{notebook.stem}.md\n" in site
