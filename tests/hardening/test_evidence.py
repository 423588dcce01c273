import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rampart.hardening.model.card import Figure
from rampart.hardening.report.elements import in_words
from rampart.hardening.report.evidence import evidence, write
from rampart.hardening.report.frameworks import FRAMEWORKS

SHIPPED = Path("model_store/traffic-signs")
Change = Callable[[dict[str, object]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped model, to change."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "signs"))


def cells(page: str) -> list[list[str]]:
    """The rows of all tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    found = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows)
    return [[html.unescape(cell) for cell in row] for row in found]


def change(folder: Path, edit: Change) -> None:
    card = json.loads((folder / "card.json").read_text())
    edit(card)
    (folder / "card.json").write_text(json.dumps(card))


def entry(page: str, framework: str, number: str, name: str = "") -> str:
    """What the report has for an entry of a framework."""
    (part,) = re.findall(rf"{re.escape(framework)}.*?</table>", page, re.DOTALL)
    (found,) = (row[2] for row in cells(part) if row[0] == number and name in row[1])
    return found


def test_every_figure_of_the_card_is_in_it_with_interval_and_count() -> None:
    rows = cells(evidence(SHIPPED))
    for figure in map(Figure.of, json.loads((SHIPPED / "card.json").read_text())["metrics"]):
        assert any(row[-3:] == [*in_words(figure), str(figure.n)] for row in rows), figure


def test_hashes_are_those_of_the_files_as_they_are_now(folder: Path) -> None:
    before = dict(row for row in cells(evidence(folder)) if len(row) == 2)
    (folder / "graph-lean-int8.onnx").write_bytes(b"another")
    after = dict(row for row in cells(evidence(folder)) if len(row) == 2)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"graph-lean-int8.onnx"}
    assert "weights.safetensors" in before


def test_a_command_has_its_date_and_the_weights_that_it_ran_on(folder: Path) -> None:
    log = (folder / "evaluations.jsonl").read_text().splitlines()
    runs = {run["command"]: run for run in map(json.loads, log)}
    dated = [row for row in cells(evidence(folder)) if row[-1] in runs]
    assert dated
    for date, command in dated:
        assert date == f"{runs[command]['time'][:10]}, {runs[command]['weights'][:12]}"
    (folder / "evaluations.jsonl").unlink()
    assert all(row[0] == "not in the log" for row in cells(evidence(folder)) if row[-1] in runs)


def test_what_no_command_measured_says_so_and_what_one_did_has_its_figure(folder: Path) -> None:
    article = "2024/1689, Article 15"
    page = evidence(folder)
    assert entry(page, article, "15(5)", "data poisoning") == "not measured"
    assert "clean accuracy 96.1%" in entry(page, article, "15(3)")
    assert "worst case, label right 75.0%" in entry(page, article, "15(5)", "adversarial")
    change(folder, lambda card: card.update(metrics=card["metrics"][:1]))
    assert entry(evidence(folder), article, "15(5)", "adversarial") == "not measured"


def test_figures_of_another_eps_do_not_answer_for_the_threat_model(folder: Path) -> None:
    change(folder, lambda card: card.update(threat_model="Linf 8/255"))
    assert entry(evidence(folder), "Top Ten, 2023", "ML01") == "not measured"


def test_no_entry_of_a_framework_is_there_twice() -> None:
    for framework in FRAMEWORKS:
        pairs = [(item.number, item.name) for item in framework.items]
        assert len(set(pairs)) == len(pairs)


def test_a_failed_self_check_stands_at_the_top(folder: Path) -> None:
    assert "do not trust" not in evidence(folder)
    change(folder, lambda card: card["checks"][0].update(passed=False))
    page = evidence(folder)
    assert page.index("do not trust these figures") < page.index("1. What was tested")


def test_it_states_no_conformity() -> None:
    assert "states no conformity with any law" in evidence(SHIPPED)


def test_a_card_without_figures_is_refused_with_what_makes_some(folder: Path) -> None:
    change(folder, lambda card: card.pop("metrics"))
    with pytest.raises(ValueError, match="holds no figures: run rampart evaluate --into-card"):
        evidence(folder)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end with \.html or \.pdf"):
        write(SHIPPED, tmp_path / "evidence.docx")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_prints_it_on_numbered_pages(tmp_path: Path) -> None:
    out = write(SHIPPED, tmp_path / "evidence.pdf")
    content = out.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 3


def test_without_a_browser_it_says_how_to_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a browser .* write .*evidence\.html"):
        write(SHIPPED, tmp_path / "evidence.pdf")
