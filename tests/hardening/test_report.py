import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from full_disk import full

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.judge.metrics import Metric
from rampart.hardening.model.card import Subject
from rampart.hardening.report import card as report
from rampart.hardening.report import findings, frameworks


def test_a_row_carries_threat_count_and_interval() -> None:
    metric = Metric(Subject("pipeline", "full"), "pgd20", 0.5, 100, Threat("Linf", 8 / 255))
    row = report.row(metric, data="test", command="rampart evaluate")
    assert (row["norm"], row["eps"], row["n"]) == ("Linf", "8/255", 100)
    assert row["interval"][0] < 0.5 < row["interval"][1]


def test_a_clean_figure_names_no_threat() -> None:
    row = report.row(Metric(Subject("classifier"), "clean", 0.9, 10), data="", command="")
    assert "eps" not in row
    assert "norm" not in row


def test_new_figures_replace_the_same_ones_and_no_others() -> None:
    threats = (None, Threat("Linf", 8 / 255), Threat("L2", 0.5))
    old = [
        report.row(
            Metric(Subject("pipeline", "full"), "pgd20", 0.5, 10, t), data="d", command="old"
        )
        for t in threats
    ]
    new = [
        report.row(
            Metric(Subject("pipeline", "full"), "pgd20", 0.4, 10, threats[1]),
            data="d",
            command="new",
        )
    ]
    merged = report.merge(old, new)
    assert [(r.get("eps"), r["command"]) for r in merged] == [
        (None, "old"),
        ("0.5", "old"),
        ("8/255", "new"),
    ]


@pytest.mark.parametrize("name", ["forced_rejection", "accepted_and_wrong", "clean_rejection"])
def test_of_what_should_be_rare_the_larger_share_is_shown_however_weak_the_attack(
    name: str,
) -> None:
    def measured(value: float, attack: str) -> dict[str, Any]:
        metric = Metric(Subject("pipeline", "lean"), name, value, 100, Threat(), attack)
        return report.row(metric, data="d", command="c")

    rows = [measured(0.3, "20 steps"), measured(0.6, "100 steps"), measured(0.4, "50 steps")]
    card = {"threat_model": "Linf 8/255", "metrics": rows, "promise": {}}
    assert [figure.value for figure in findings.of_card(card)[1]] == [0.6]
    assert "60.0%" in frameworks.said(name)(card)
    if name == "clean_rejection":  # a column of the documents' tables
        assert "60.0%" in report.markdown(card)


def checked(data: str, n: int, *, passed: bool, subject: str = "classifier") -> dict[str, Any]:
    """A self-check as a card has it, of so many images of `data`."""
    row = {"name": "black_box", "subject": subject, "passed": passed, "seen": ""}
    return row | {"data": f"{n} of {data}", "n": n}


def test_a_self_check_that_failed_goes_by_the_same_one_on_as_many_images_alone() -> None:
    failed = checked("a", 100, passed=False)
    others = [
        checked("a", 99, passed=True),
        checked("b", 200, passed=True),
        checked("a", 200, passed=True, subject="lean"),
    ]
    assert report.merge_checks([failed], others) == [failed, *others[1:]]
    for n in (100, 200):
        again = checked("a", n, passed=True)
        assert report.merge_checks([failed, others[1]], [again]) == [others[1], again]


def test_a_self_check_that_fails_on_fewer_images_replaces_one_that_passed() -> None:
    passed, failed = checked("a", 100, passed=True), checked("a", 10, passed=False)
    assert report.merge_checks([passed], [failed]) == [failed]


def test_self_checks_of_earlier_cards_which_name_no_images_go_by_any_repetition() -> None:
    earlier = [{"name": "black_box", "subject": s, "passed": False} for s in ("classifier", "lean")]
    new = checked("a", 10, passed=True)
    assert report.merge_checks(earlier, [new]) == [earlier[1], new]


def test_a_weaker_attack_does_not_replace_a_stronger_one() -> None:
    strong, weak = (
        report.row(
            Metric(Subject("pipeline", "full"), "robust", v, 10, Threat(), a), data="d", command="c"
        )
        for v, a in ((0.3, "100 steps"), (0.4, "20 steps"))
    )
    assert report.merge([strong], [weak]) == [strong, weak]
    card = {"threat_model": "Linf 8/255", "metrics": [strong, weak]}
    assert "30.0%" in report.markdown(card)
    assert "40.0%" not in report.markdown(card)


def test_a_later_attack_that_leaves_fewer_counts_in_the_worst_case() -> None:
    figures = (("robust", 0.4), ("robust_with_rejection@1%", 0.5), ("autoattack", 0.3))
    rows = [
        report.row(
            Metric(Subject("pipeline", "full"), name, v, 10, Threat(), "A"), data="d", command="c"
        )
        for name, v in figures
    ]
    text = report.markdown({"threat_model": "Linf 8/255", "metrics": rows})
    cells = text.splitlines()[-1].split(" | ")
    assert [cell[:5] for cell in cells[1:]] == ["30.0%", "30.0%", "50.0%"]


def test_figures_at_another_rate_of_false_alarms_stand_beside_the_usual_ones() -> None:
    metric = Metric(Subject("pipeline", "full"), "clean_rejection", 0.01, 100)
    usual = report.row(metric, data="d", command="c")
    often = report.row(metric._replace(value=0.2), data="d", command="c", rate=0.2)
    bare, worst = (
        report.row(
            metric._replace(subject=Subject("pipeline"), name=name), data="d", command="c", rate=0.2
        )
        for name in ("pgd20", "robust")
    )
    assert report.merge([usual], [often]) == [usual, often]
    assert often["rate"] == worst["rate"] == 0.2
    assert "rate" not in usual and "rate" not in bare
    text = report.markdown({"threat_model": "Linf 8/255", "metrics": [usual, often]})
    assert "d (n = 100), Linf 8/255:" in text and "1.0%" in text and "20.0%" not in text


def test_what_int8_costs_is_of_the_same_validation_images_and_attacks(tmp_path: Path) -> None:
    def row(
        subject: str, value: float, n: int, attack: str = "a", *, name: str = "robust"
    ) -> dict[str, Any]:
        metric = Metric(Subject.parse(subject, "full"), name, value, n, Threat(), attack)
        return report.row(metric, data=f"{n} of validation split of d", command="c")

    apart = [row("pipeline", 0.5, 600), row("graph:int8", 0.2, 600, "another attack")]
    test = [row("pipeline", 0.5, 617), row("graph:int8", 0.2, 617)]
    test = [r | {"data": "official test images"} for r in test]
    threat = {"threat_model": "Linf 8/255"}
    report.write_card(tmp_path, threat | {"metrics": [*apart, *test]})
    assert report.robust_in_int8(tmp_path, "full") is None
    few = [row("pipeline", 0.5, 50), row("graph:int8", 0.1, 50)]
    report.write_card(tmp_path, threat | {"metrics": few})
    assert report.robust_in_int8(tmp_path, "full") is None
    other = [r | {"eps": "1/255"} for r in (row("pipeline", 0.9, 900), row("graph:int8", 0.9, 900))]
    many = [row("pipeline", 0.42, 200), row("graph:int8", 0.41, 200)]
    report.write_card(tmp_path, threat | {"metrics": [*apart, *test, *few, *other, *many]})
    assert report.robust_in_int8(tmp_path, "full") == 0.01
    rejecting = [
        row(subject, value, 200, name="robust_with_rejection@1%")
        for subject, value in (("pipeline", 0.5), ("graph:int8", 0.46))
    ]
    report.write_card(tmp_path, threat | {"metrics": [*many, *rejecting]})
    assert report.robust_in_int8(tmp_path, "full") == 0.04
    assert report.robust_in_int8(tmp_path, "lean") is None


def test_the_table_shows_every_figure_with_its_interval() -> None:
    metric = Metric(Subject("pipeline", "full"), "pgd20", 0.4213, 617, Threat())
    text = report.table([report.row(metric, data="", command="")])
    assert "42.1%" in text
    assert "38.3% to 46.1%" in text
    assert "Linf 8/255" in text


def test_a_card_comes_back_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert report.read_card(tmp_path) == {}
    report.write_card(tmp_path, {"metrics": []})
    assert report.read_card(tmp_path) == {"metrics": []}


PLACE = """above
<!-- figures: made by `rampart table`, do not edit -->
old
<!-- end of figures -->
below"""


def card_of(*metrics: Metric) -> dict[str, Any]:
    rows = [report.row(m, data="test", command="rampart evaluate") for m in metrics]
    return {
        "model": "tiny",
        "data": "blobs",
        "training": {"classifier": "Recipe()"},
        "classifier": {"arch": "resnet10", "classes": 10, "width": 0.125, "image_size": 32},
        "calibration_images": 300,
        "commands": ["rampart calibrate"],
        "threat_model": "Linf 8/255",
        "metrics": rows,
    }


def test_a_card_that_breaks_its_schema_is_refused_with_the_place() -> None:
    card = card_of(Metric(Subject("pipeline", "full"), "pgd20", 0.5, 10, Threat(), "PGD"))
    report.check_card(card)
    card["metrics"][0]["value"] = 1.5
    with pytest.raises(ValueError, match=r"metrics\[0\]\.value: 1\.5"):
        report.check_card(card)


def test_entries_go_into_a_card_and_a_broken_one_leaves_it_as_it_was(tmp_path: Path) -> None:
    report.write_card(tmp_path, card_of() | {"threat_model": "Linf 8/255"})
    entry = {"data": "d", "attack": "a", "rate": 0.01, "rows": [], "scaling": {}, "command": "c"}
    assert report.add_to_card(tmp_path, {"outside": entry})["outside"] == entry
    assert report.read_card(tmp_path)["threat_model"] == "Linf 8/255"
    before = (tmp_path / "card.json").read_bytes()
    del entry["rate"]
    with pytest.raises(ValueError, match=r"\$\.outside: 'rate' is a required property"):
        report.add_to_card(tmp_path, {"outside": entry})
    assert (tmp_path / "card.json").read_bytes() == before


def test_figures_that_others_put_into_the_card_meanwhile_stay_in_it(tmp_path: Path) -> None:
    report.write_card(tmp_path, card_of() | {"threat_model": "Linf 8/255"})
    names = [f"pgd{steps}" for steps in range(40)]

    def add(name: str) -> None:
        metric = Metric(Subject("pipeline", "full"), name, 0.5, 10, Threat(), "PGD")
        report.add_to_card(tmp_path, {"metrics": card_of(metric)["metrics"]})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, names))
    rows = report.read_card(tmp_path)["metrics"]
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert [file.name for file in tmp_path.iterdir()] == ["card.json"]


def test_a_card_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    report.write_card(tmp_path, {"model": "mine"})
    with full(100), pytest.raises(OSError, match="File too large"):
        report.write_card(tmp_path, {"model": "mine" * 1000})
    assert report.read_card(tmp_path) == {"model": "mine"}
    assert [file.name for file in tmp_path.iterdir()] == ["card.json"]


def test_what_is_of_more_images_than_what_would_replace_it_is_named() -> None:
    many = Metric(Subject("pipeline", "full"), "pgd20", 0.4, 100, Threat(), "PGD")
    few, other = many._replace(n=10), many._replace(n=10, attack="PGD, longer")
    card = card_of(many) | {"ablation": {"n": 200}, "outside": {"rows": [{"n": 50}]}}
    assert report.outnumbered(card, card_of(few)) == "pgd20 of 100 images, and not 10"
    assert report.outnumbered(card, {"ablation": {"n": 20}}) == "ablation of 200 images, and not 20"
    assert report.outnumbered(card, {"outside": {"rows": [{"n": 5}]}}).startswith("outside of 50")
    assert report.outnumbered(card, card_of(other)) == ""
    assert report.outnumbered(card, card_of(many) | {"ablation": {"n": 200}}) == ""


def test_the_readme_has_a_table_for_each_data_set_at_the_cards_eps() -> None:
    card = card_of(
        Metric(Subject("pipeline", "full"), "pgd20", 0.4, 10, Threat(), "PGD"),
        Metric(Subject("pipeline", "full"), "pgd20", 0.42, 100, Threat(), "PGD"),
        Metric(Subject("pipeline", "full"), "pgd20", 0.6, 1000, Threat(eps=2 / 255), "PGD"),
        Metric(Subject("pipeline", "full"), "clean", 0.7, 100),
    )
    text = report.fenced(PLACE, "figures", report.markdown(card))
    assert "test (n = 10), Linf 8/255:" in text
    assert "| `full` | 70.0% (60.4% to 78.1%) | 42.0% (" in text
    assert "60.0%" not in text
    assert "old" not in text
    assert text.startswith("above")
    assert text.endswith("below")
    assert report.fenced(text, "figures", report.markdown(card)) == text


def test_a_text_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="end of figures"):
        report.fenced("nothing", "figures", "new")


def test_models_stand_side_by_side_with_their_training_and_their_largest_evaluation(
    tmp_path: Path,
) -> None:
    runs = [[{"clean": 0.5, "pgd10": 0.3, "minutes": 30.0}] * 3, [{"minutes": 60.0}] * 2]
    standard = "AutoAttack, standard"
    figures = [
        Metric(Subject("classifier"), "clean", 0.9, 10),
        Metric(Subject("classifier"), "clean", 0.7, 100),
        Metric(Subject("classifier"), "autoattack", 0.4, 100, Threat(), standard),
        Metric(Subject("classifier"), "autoattack", 0.6, 100, Threat(eps=2 / 255), standard),
        # What it is where there are fewer than ten classes.
        Metric(
            Subject("classifier"), "autoattack", 0.5, 200, Threat(), "APGD-CE + Square, steps 100"
        ),
    ]
    for name, more in (("first", {"history": runs}), ("second", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"0" * 1_500_000)
        report.write_card(tmp_path / name, card_of(*figures) | more)
    shutil.copytree(tmp_path / "second", tmp_path / "third")
    weak = Metric(Subject("classifier"), "pgd20", 0.8, 100, Threat(), "PGD")
    report.write_card(tmp_path / "third", card_of(figures[1], weak))
    shutil.copytree(tmp_path / "second", tmp_path / "fourth")
    report.write_card(tmp_path / "fourth", card_of(figures[-1], weak))
    folders = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    lines = report.model_table(folders).splitlines()
    assert lines[2].startswith("| `first` | resnet10 x 0.125 | 1.5 MB | 5 epochs, 1.5 h | 70.0% (")
    assert lines[3].startswith("| `second` | resnet10 x 0.125 | 1.5 MB | - | 70.0% (")
    said = "n = 100 | 40.0% (30.9% to 49.8%), n = 100, standard AutoAttack, Linf 8/255 |"
    assert lines[2].endswith(said)
    assert "n = 100 | 80.0% (" in lines[4] and lines[4].endswith("n = 100, PGD-20, Linf 8/255 |")
    assert lines[5].endswith("| 50.0% (43.1% to 56.9%), n = 200, AutoAttack, Linf 8/255 |")


def test_the_log_keeps_every_evaluation_with_time_and_hash(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    for n in (1, 2):
        report.log_evaluation(tmp_path, {"n": n})
    first, second = (
        json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()
    )
    assert (first["n"], second["n"]) == (1, 2)
    assert first["weights"] == hashlib.sha256(b"weights").hexdigest()
    assert first["time"] <= second["time"]
    assert first["time"].endswith("+00:00")
