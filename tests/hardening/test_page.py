"""The page of a real evaluation whose attacks are replaced by noise, which takes seconds."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rampart.hardening.attack import victims
from rampart.hardening.attack.ladder import QUICK
from rampart.hardening.attack.pgd import Threat, cross_entropy, pgd
from rampart.hardening.judge import evaluate
from rampart.hardening.judge.checks import Check
from rampart.hardening.judge.evaluate import Attempt, Evaluation, Rung
from rampart.hardening.judge.metrics import roc, tpr_at_fpr
from rampart.hardening.model import folder as folders
from rampart.hardening.model import pipeline
from rampart.hardening.model.calibrate import load_variant
from rampart.hardening.model.card import Figure, Subject
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float
from rampart.hardening.report import card as report
from rampart.hardening.report import elements, ladder, page, plots, rejection, summary
from rampart.hardening.report import images as sections
from rampart.hardening.report.findings import Findings

THREAT = Threat("Linf", 8 / 255)
FAILED = Check("more_steps", "classifier", False, "robust 1.0% after 5, 9.0% after 20 steps")
CHECKS = [Check("logits", "classifier", True, "outputs are not probabilities"), FAILED]


def one_step(ladder: list[Rung], images: Images, folder: Path) -> list[Attempt]:
    """As `evaluate.climb`, with one step on the label for every attack."""
    found = []
    for rung in ladder:
        look = rung.victim.label_look
        loss = cross_entropy(lambda x, look=look: look(x).logits, images.label)  # type: ignore[misc]
        x, eps = to_float(images.image), rung.threat.eps
        x = pgd(loss, x, rung.threat, steps=1, step_size=eps, start=torch.zeros_like(x))
        found.append(Attempt(rung, x))
    return found


@pytest.fixture(scope="module")
def seen(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, tiny_folder: Path
) -> Iterator[Evaluation]:
    images = tiny_images[torch.arange(12)]  # a copy, whose labels may be changed
    with torch.no_grad():  # an untrained network is right where it is said to be
        images.label[:8] = tiny_pipeline(images.image[:8]).logits.argmax(1)
    net = tiny_pipeline.classifier
    attacked = [victims.label_victim("classifier", net, "weights")]
    for variant in ("full", "lean"):
        defended, _ = pipeline.load(tiny_folder / "weights.safetensors", variant)
        calibration = load_variant(tiny_folder, variant)
        attacked.append(victims.pipeline_victim(defended, calibration, "weights", rate=0.1))
    attacked.append(victims.label_victim("undefended", lambda x: -net(x), "twin"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "climb", one_step)
        patch.setattr(evaluate, "self_checks", lambda *_: CHECKS)
        yield evaluate.evaluate(
            attacked, images, THREAT, QUICK, rate=0.1, folder=Path("unused"), only=[]
        )


def without(seen: Evaluation, victims: tuple[str, ...], rungs: tuple[str, ...] = ()) -> Evaluation:
    """As if `victims` and `rungs` had never been in the evaluation."""

    def stays(rung: Rung) -> bool:
        return rung.victim.name not in victims and rung.name not in rungs

    records = {
        name: r._replace(under=[pair for pair in r.under if stays(pair[0])])
        for name, r in seen.records.items()
        if name not in victims
    }
    metrics = [
        m
        for m in seen.metrics
        if m.subject.name not in victims and not any(rung in m.name for rung in rungs)
    ]
    return seen._replace(records=records, metrics=metrics)


def rows_of(seen: Evaluation) -> list[dict[str, Any]]:
    return [report.row(m, data="blobs", command="rampart evaluate tiny") for m in seen.metrics]


def share(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.1, value + 0.1]}


def setup(name: str, **more: Any) -> dict[str, Any]:
    figures = {"clean": share(0.75), "robust": share(0.45), "milliseconds": 1.25}
    return {"name": name, **figures, **more}


AT = [
    {"rate": rate, "clean_rejection": share(rate), "robust_with_rejection": share(0.5 + rate)}
    | {"gain": share(0.05 + rate), "gain_over_max_softmax": share(0.01 + rate)}
    for rate in (0.02, 0.05)
]
MEASURED = {
    "ablation": {
        "data": "8 validation images of blobs",
        "threat_model": "Linf 8/255",
        "attack": "PGD-20",
        "rows": [setup("classifier"), setup("lean", at=AT)],
        "default": {"variant": "lean", "why": "the model has no purifier"},
    },
    "test_ablation": {
        "data": "9 test images of blobs",
        "threat_model": "Linf 8/255",
        "attack": "PGD-20",
        "rows": [setup("classifier"), setup("lean", at=AT)],
    },
    "false_alarms": {
        "data": "calibration images of blobs",
        "rate": 0.01,
        "rows": [
            {"way": "JPEG", "variant": "lean", **share(0.2), "n": 40, "drift": 0.3}
            | {"too_many": True}
        ],
        "coverage": {
            "lean": [
                {"alpha": 0.05, "splits": 9, "flagged": 0.049, "middle_95%": [0.03, 0.06]}
                | {"theory": 0.0494, "theory_95%": [0.031, 0.067]}
            ]
        },
        "remedies": ["lean: JPEG flags 20.0%: calibrate anew"],
    },
    "outside": {
        "data": "8 of blobs",
        "attack": "joint APGD in L2",
        "rate": 0.01,
        "rows": [
            {"threat": "fog", "subject": "pipeline", "variant": "lean", "n": 8}
            | {"right": share(0.4), "right_or_rejected": share(0.5)}
        ],
        "scaling": {"pictures": 5, "pixels": [256, 32], "psnr": 9.7, "psnr_nearest": 27.5},
    },
    "redteam": [
        {"attack": "square", "fooled": share(0.25), "n": 8, "eps": "8/255", "queries": 2000}
        | {"data": "8 of blobs", "command": "rampart redteam http://host:8080/predictions/blobs"}
    ],
    "purifier": {
        "data": "8 of blobs",
        "n": 8,
        "threat_model": "Linf 8/255",
        "attack": "PGD-20",
        "rows": [
            {"subject": "classifier", "kind": "clean", "name": "clean", "n": 8, "gained": 1}
            | {"without": share(0.4), "with": share(0.5), "gain": share(0.1), "lost": 0}
            | {"beyond_chance": True}
        ],
        "advice": ["In front of the classifier, switch it on for clean <images>."],
        "command": "rampart uses",
    },
}


def write(folder: Path, seen: Evaluation, defended: DefendedClassifier, **changes: Any) -> str:
    rows = rows_of(seen)
    card = {"model": "tiny", "metrics": rows, "versions": {"torch": "2.12"}}
    card |= changes.pop("card", MEASURED)
    changes = {"pictures": None, "date": "2026-11-29"} | changes
    path = page.write(folder / "page.html", card, rows, seen, defended, **changes)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full_page(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return write(tmp_path_factory.mktemp("page"), seen, tiny_pipeline)


def cells(html: str) -> dict[str, list[list[str]]]:
    """The rows of every table by its caption."""
    found = re.findall(r"<caption[^>]*>(.*?)</caption>(.*?)</table>", html, flags=re.S)
    return {
        caption: [
            [unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(CELL, row, flags=re.S)]
            for row in re.findall("<tr>(.*?)</tr>", table, flags=re.S)
        ]
        for caption, table in found
    }


CELL = "<t[hd][^>]*>(.*?)</t[hd]>"


def headings(html: str) -> list[str]:
    return re.findall("<h2[^>]*>(.*?)</h2>", html)


def test_the_page_needs_nothing_but_itself(full_page: str) -> None:
    addresses = re.findall(r'(?:src|href)="([^"]*)"', full_page)
    assert len(addresses) > 15
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    for word in ("<script", "<link", "<iframe", "@import", "url(", "http-equiv"):
        assert word not in full_page
    assert len(full_page) < 2e6


def test_every_section_is_there_and_can_be_reached(full_page: str) -> None:
    names = headings(full_page)
    assert names == [
        "What the figures say",
        "Robust accuracy over eps",
        "Classes",
        "All forms side by side",
        "What each part adds",
        "What rejection adds on test images",
        "Rejection",
        "Detectors",
        "Suspicion",
        "Features",
        "False alarms",
        "Outside the threat model",
        "Black-box attacks on the running endpoint",
        "What the purifier is for",
        "Self-checks",
        "The ladder",
        "Threat model and recipe",
    ]
    ids = re.findall(r'id="([^"]*)"', full_page)
    assert len(set(ids)) == len(ids)
    named = re.findall(r'(?:href="#|aria-labelledby=")([^"]*)"', full_page)
    assert set(named) <= set(ids)


def test_every_figure_of_the_card_is_shown_as_the_card_has_it(
    seen: Evaluation, full_page: str
) -> None:
    tables = cells(full_page)
    for row in rows_of(seen):
        who = Subject.parse(row["subject"], row["variant"]).title
        table, name = tables[f"All figures of {who}"], elements.title(row["name"])
        (shown,) = (r for r in table if r[0] == name)
        number = float(re.match(r"[+-]?[\d.]+", shown[1])[0])  # type: ignore[index]
        unit = 1 if row["name"].startswith("auroc") else 100
        assert number == pytest.approx(unit * row["value"], abs=0.0501 * unit / 100)
        ends = [float(end.strip("%")) for end in shown[2].split(" to ")]
        expected = [unit * end for end in row["interval"]]
        assert ends == pytest.approx(expected, abs=0.0501 * unit / 100)
        assert shown[3] == (f"{row['norm']} {row['eps']}" if "eps" in row else "-")
        assert shown[4] == str(row["n"])
        assert row.get("attack", "") in shown[5]


def test_what_was_not_measured_is_left_out(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    names = headings(write(tmp_path, seen, tiny_pipeline, card={}))
    absent = {
        "What each part adds",
        "What rejection adds on test images",
        "False alarms",
        "Outside the threat model",
    }
    assert not absent & set(names)


def test_what_parts_add_and_false_alarms_are_shown_as_the_card_has_them(full_page: str) -> None:
    tables = cells(full_page)
    *_, lean = tables["What each part adds"]
    assert lean[:3] == ["lean", "75.0% (65.0% to 85.0%)", "45.0% (35.0% to 55.0%)"]
    assert lean[-3:] == ["55.0% (45.0% to 65.0%)", "+10.0 (+0.0 to +20.0)", "1.25"]
    assert "Served by default: lean (the model has no purifier)." in full_page
    assert tables["What rejection adds on test images"][-1][0] == "lean"
    *_, at_5 = tables["Over the rate of rejection"]
    assert at_5[:2] == ["lean", "5.0%"]
    assert at_5[-1] == "+6.0 (-4.0 to +16.0)"
    assert tables["False alarms"][1] == ["JPEG", "40", "20.0% (10.0% to 30.0%) too many", "0.300"]
    assert "lean: JPEG flags 20.0%: calibrate anew" in full_page
    fog = ["fog", "8", "40.0% (30.0% to 50.0%)", "50.0% (40.0% to 60.0%)"]
    assert tables["Outside the threat model"][1] == fog
    assert "until 9.7 dB PSNR are left" in full_page
    assert "4.90% flagged over 9 splits (3.00% to 6.00%); theory 4.94%" in full_page


def test_every_picture_has_words(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    html = write(tmp_path, seen, tiny_pipeline, pictures=page.gallery(seen, tiny_pipeline))
    images = re.findall("<img[^>]*>", html)
    assert len(images) == 17 + 4 * sections.SHOWN
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in images)


def test_a_failed_check_is_said_in_words_at_the_top_and_in_its_place(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, full_page: str, tmp_path: Path
) -> None:
    assert "A self-check FAILED" in full_page
    assert [row[0] for row in cells(full_page)["Self-checks"]] == ["result", "passed", "FAILED"]
    assert full_page.index(FAILED.seen) < full_page.index("What the figures say")
    passed = write(tmp_path, seen._replace(checks=CHECKS[:1]), tiny_pipeline)
    assert "FAILED" not in passed


def test_the_page_says_when_to_switch_the_purifier_on(full_page: str) -> None:
    head, row = cells(full_page)["What the purifier is for"]
    assert head[2] == "the classifier: right without" and row[0] == "clean"
    assert row[-1] == "+10.0 (+0.0 to +20.0) beyond chance"
    assert "switch it on for clean &lt;images&gt;." in full_page


def test_names_from_outside_are_text(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    hostile = "<script>alert(1)</script>$x_\"'&"
    images = seen.images
    named = Images(images.image, images.label, (hostile, *images.classes[1:]))
    html = write(
        tmp_path,
        seen._replace(images=named),
        tiny_pipeline,
        card={"model": hostile, "commands": [hostile], "training": {hostile: hostile}},
        pictures=page.Pictures(images.image[:1], images.image[:1], [hostile], hostile),
    )
    assert "<script" not in html
    assert "alert(1)" in unescape(html)


GONE = {
    "no twin": ((("undefended",), ("transfer",)), []),
    "no full variant": ((("pipeline full", "max_softmax full"), ()), ["Features", "Classes"]),
    "no max-softmax": ((("max_softmax full", "max_softmax lean"), ()), []),
    "no joint attack": (((), ("joint_apgd",)), ["Rejection"]),
    "no PGD-20": (((), ("pgd20",)), ["Detectors"]),
    "no pipeline": (
        (("pipeline full", "pipeline lean", "max_softmax full", "max_softmax lean"), ()),
        ["Robust accuracy over eps", "Rejection", "Detectors", "Suspicion", "Features", "Classes"],
    ),
    "no attack on this pipeline": (
        ((), ("joint_apgd", "pgd20")),
        ["Rejection", "Detectors", "Features"],
    ),
}


@pytest.mark.parametrize("what", GONE)
@pytest.mark.slow
def test_what_was_not_seen_is_left_out(
    what: str,
    seen: Evaluation,
    full_page: str,
    tiny_pipeline: DefendedClassifier,
    tmp_path: Path,
) -> None:
    (names, rungs), lost = GONE[what]
    html = write(tmp_path, without(seen, names, rungs), tiny_pipeline)
    assert headings(html) == [name for name in headings(full_page) if name not in lost]
    every = cells(html)
    (forms,) = [rows for rows in every.values() if rows[0][-1] == "images" and rows[0][0] == ""]
    for title in map(plots.title, names):
        assert f"All figures of {title}" not in every
        assert title not in [row[0] for row in forms]


def test_a_part_of_the_ladder_gives_no_verdict(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    clean = [m for m in seen.metrics if m.name in ("clean", "pgd20")]
    html = write(tmp_path, seen._replace(metrics=clean, checks=[]), tiny_pipeline)
    assert "there is no worst case and no verdict" in html
    assert "Self-checks" not in headings(html)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clean", "clean accuracy"),
        ("autoattack_short", "AutoAttack, short"),
        ("robust_with_rejection@1%", "worst case, right or rejected at 1%"),
        ("stratified@0.25eps", "worst case, rejections count beyond 0.25 eps"),
        ("tpr@5%fpr:pgd20", "TPR@5%FPR, PGD-20"),
        ("auroc:pgd20", "AUROC, PGD-20"),
        ("caught:joint_apgd", "wrong images caught, joint attack"),
    ],
)
def test_figures_have_names_for_people(name: str, words: str) -> None:
    assert elements.title(name) == words


def test_the_box_at_the_top_has_what_is_served_beside_the_control(
    seen: Evaluation, full_page: str
) -> None:
    top = unescape(full_page[: full_page.index("What the figures say")])
    found = re.findall(r"<span>([^<]*)</span><strong>([^<]*)</strong>", top)
    metrics = {(m.subject.name, m.name): m.value for m in seen.metrics}
    assert found == [
        ("served by default", "full"),
        ("right on clean images", f"{metrics['pipeline full', 'clean']:.1%}"),
        ("right under attack", f"{metrics['pipeline full', 'robust']:.1%}"),
        ("undefended twin under attack", f"{metrics['undefended', 'robust']:.1%}"),
        ("clean images rejected", f"{metrics['pipeline full', 'clean_rejection']:.1%}"),
        ("self-checks passed", "1 of 2"),
    ]
    assert "12 images (blobs), measured on 2026-11-29; threat model" in top
    for who in ("undefended twin", "classifier alone", "full", "lean"):
        assert re.search(rf'alt="Bar chart\.[^"]*\b{who}: clean \d', top)


def test_what_was_not_attacked_itself_is_told_by_the_figures_of_its_fp32_form(
    seen: Evaluation,
) -> None:
    served = Subject("pipeline", "lean", "int8")
    found = Findings.of(seen)
    who = summary.measured(found, served)
    assert who == "pipeline lean"
    rows = [Figure.of(row) for row in rows_of(seen)]
    first = next(summary.tiles(rows, found, served, who))
    assert first[1:3] == ("lean in int8", "figures of lean")


def words(html: str) -> str:
    """What people read of a page, without the commands that measured its figures."""
    shown = re.sub(r"<style>.*?</style>|<[^>]+>", "\n", html, flags=re.S)
    lines = [line for line in unescape(shown).splitlines() if not line.startswith("rampart ")]
    return "\n".join(lines).replace("TPR@", "")


def test_no_key_of_the_card_is_left_in_the_words(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    ablation = MEASURED["ablation"] | {"rows": [setup("classifier"), setup("+ bit_depth", at=AT)]}
    card = MEASURED | {"ablation": ablation, "calibration_images": 9}
    said = words(write(tmp_path, seen, tiny_pipeline, card=card))
    assert "+ bit depth" in said and "calibration images" in said
    assert "more steps find no fewer" in said
    for key in ("_", "@", ":int8", ":fp16", "pgd20"):
        assert key not in said


@pytest.fixture(scope="module")
def of_card(
    seen: Evaluation, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A model folder whose page was written from its card, and the figures in that."""
    folder = tmp_path_factory.mktemp("store") / "tiny"
    shutil.copytree(tiny_folder, folder)
    rows = rows_of(seen)
    later = {"name": "autoattack", "value": 0.01, "interval": [0.0, 0.2], "attack": "AutoAttack"}
    fewer = {"data": "fewer", "n": 4, "value": 0.123}
    clean = next(row for row in rows if row["name"] == "robust" and row["variant"] == "lean")
    card = {"model": "tiny", "threat_model": "Linf 8/255", **MEASURED}
    card |= {"metrics": [*rows, clean | later, clean | fewer]}
    card |= {"checks": [check._asdict() for check in CHECKS]}
    report.write_card(folder, card)
    lines = [{"time": f"2026-11-{day}T01:02:03+00:00", "data": "blobs"} for day in (28, 29)]
    log = "".join(json.dumps(line) + "\n" for line in [*lines, lines[0] | {"data": "fewer"}])
    (folder / "evaluations.jsonl").write_text(log)
    page.write_from_card(folder, Subject("pipeline", "lean"))
    return folder, rows


def test_a_page_from_the_card_says_what_that_of_the_evaluation_says(
    of_card: tuple[Path, list[dict[str, Any]]], full_page: str
) -> None:
    folder, rows = of_card
    html = (folder / "report.html").read_text()
    lost = {"Classes", "Rejection", "Detectors", "Suspicion", "Features"}
    assert headings(html) == [name for name in headings(full_page) if name not in lost]
    mine, theirs = cells(html), cells(full_page)
    for row in rows:
        caption = f"All figures of {Subject.parse(row['subject'], row['variant']).title}"
        if row["variant"] != "lean":  # it has a later figure
            assert mine[caption] == theirs[caption]
    assert "pictures and curves that need the attacked images are left out" in html


def test_a_later_attack_lowers_the_worst_case_of_a_page_from_the_card(
    of_card: tuple[Path, list[dict[str, Any]]],
) -> None:
    top = unescape((of_card[0] / "report.html").read_text().partition("What the figures say")[0])
    found = dict(re.findall(r"<span>([^<]*)</span><strong>([^<]*)</strong>", top))
    assert found["right under attack"] == "1.0%"
    assert ", measured on 2026-11-29; threat model" in top
    assert found["self-checks passed"] == "1 of 2"
    assert "12.3%" not in top  # of fewer images


def test_what_a_red_team_achieved_is_a_section_of_its_own(
    of_card: tuple[Path, list[dict[str, Any]]],
) -> None:
    html = (of_card[0] / "report.html").read_text()
    _, found = cells(html)["Black-box attacks on the running endpoint"]
    (row,) = report.read_card(of_card[0])["redteam"]
    assert (found[0], found[2]) == (row["data"], row["command"])
    assert found[1].startswith("square: 25.0% (")
    assert found[1].endswith("fooled, n = 8, Linf 8/255, up to 2,000 queries an image")
    assert html.count("fooled") == 1  # and not as a line of the card


def test_a_card_without_figures_makes_no_page(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="evaluate --into-card"):
        page.write_from_card(tiny_folder, Subject("pipeline", "lean"))
    assert not (tiny_folder / "report.html").exists()


SHIPPED = sorted((Path(__file__).parents[2] / "model_store").glob("*/report.html"))


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: file.parent.name)
def test_a_shipped_page_says_what_its_card_says(shipped: Path, tmp_path: Path) -> None:
    home = tmp_path / shipped.parent.name
    names = ("card.json", "evaluations.jsonl")
    home.mkdir()
    for name in names:
        shutil.copy(shipped.with_name(name), home)
    served = Subject("pipeline", *folders.form(shipped.parent, None, None))
    written = page.write_from_card(home, served).read_text()
    assert words(shipped.read_text()) == words(written)
    said = words(written.partition("<summary>Card</summary>")[0])
    for key in ("_", "@", ":int8", ":fp16", "pgd20"):
        assert key not in said


def test_the_verdict_says_what_the_figures_do(seen: Evaluation, full_page: str) -> None:
    said = unescape(full_page)
    for m in seen.metrics:
        value = f"{m.value:.1%} ("
        if m.subject.kind == "pipeline" and m.name == "robust":
            start = f"{m.subject.title}: in the worst case over these attacks up to Linf 8/255,"
            assert f"{start} the label of {value}" in said
        if m.subject.kind == "pipeline" and m.name == "stratified@0.25eps":
            assert f"moved by up to eps/4 is an error, {value}" in said
        if m.subject.kind == "undefended" and m.name == "robust":
            assert f"the same attacks leave {value}" in said


def test_where_no_label_is_wrong_there_is_nothing_to_detect(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    every = np.ones(len(seen.images), bool)
    records = {
        name: r._replace(under=[(g, a._replace(right=every, fooled=~every)) for g, a in r.under])
        for name, r in seen.records.items()
    }
    html = write(tmp_path, seen._replace(records=records), tiny_pipeline)
    assert "Detectors" not in headings(html)
    assert "accepts 0.0% of the attacked ones" in html


def test_the_lean_variant_has_no_purified_images(
    seen: Evaluation, tiny_folder: Path, tmp_path: Path
) -> None:
    lean, _ = pipeline.load(tiny_folder / "weights.safetensors", "lean")
    html = write(tmp_path, seen, lean, pictures=page.gallery(seen, lean))
    assert "purified:" not in html
    assert "t-SNE of clean, attacked images" in html


def test_a_guarded_pipeline_shows_the_lead_of_labels_along_its_step(
    seen: Evaluation, tiny_folder: Path, full_page: str, tmp_path: Path
) -> None:
    guarded, _ = pipeline.load(tiny_folder / "weights.safetensors", "guarded")
    same = seen.records["pipeline lean"]  # the same labels, and attacks on these
    html = write(
        tmp_path, seen._replace(records=seen.records | {"pipeline guarded": same}), guarded
    )
    assert "A small step" in headings(html) and "A small step" not in headings(full_page)
    found = re.findall(r"(\w[\w -]*) (-?[\d.]+) before it, (-?[\d.]+) after it", html)
    assert {name for name, *_ in found} >= {"clean", "PGD-20", "joint attack"}
    for _, before, after in found:
        assert float(before) >= 0 and float(after) <= float(before)


def test_pixels_come_only_from_the_pictures_given(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, full_page: str, tmp_path: Path
) -> None:
    assert "image/png" not in full_page
    own = page.gallery(seen, tiny_pipeline)
    assert own is not None
    shown = write(tmp_path, seen, tiny_pipeline, pictures=own)
    assert shown.count("data:image/png") == 4 * sections.SHOWN
    evaluated = [plots.png(image.numpy()) for image in seen.images.image]
    assert sum(address in shown for address in evaluated) == sections.SHOWN
    cat = torch.full_like(own.clean[:1], 90)
    given = page.Pictures(cat, cat, ["cat"], "CC0")
    shipped = write(tmp_path, seen, tiny_pipeline, pictures=given)
    assert shipped.count("data:image/png") == 4
    assert not any(address in shipped for address in evaluated)
    assert "cat, clean: " in shipped


def test_attacked_pictures_lie_within_eps(
    seen: Evaluation, tiny_pipeline: DefendedClassifier
) -> None:
    shown = page.gallery(seen, tiny_pipeline)
    assert shown is not None
    change = (shown.attacked.int() - shown.clean.int()).abs()
    assert 0 < int(change.max()) <= 8


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([-0.01, 0.02], "adds nothing that 617 images can show: +0.5 points (-1.0 to +2.0)"),
        ([0.0, 0.0], "adds nothing that 617 images can show: +0.5 points (+0.0 to +0.0)"),
        ([0.001, 0.01], "is better: +0.5 points (+0.1 to +1.0)"),
        ([-0.02, -0.01], "is worse: +0.5 points (-2.0 to -1.0)"),
    ],
)
def test_a_gain_counts_only_if_its_interval_leaves_zero(interval: list[float], words: str) -> None:
    who, low, high = Subject("pipeline", "full"), *interval
    gain = Figure(who, "gain_over_classifier", 0.005, 617, (low, high), "d", "c")
    assert ladder.adds(gain) == words


def test_the_curve_passes_through_the_figures_named_beside_it() -> None:
    generator = np.random.default_rng(0)
    # Rounded, so that there are ties.
    clean, wrong = generator.normal(0, 1, 400).round(1), generator.normal(1, 1, 77).round(1)
    rate, flagged = rejection.sweep(clean, wrong)
    for allowed in (0.01, 0.05, 0.5):
        at = int(np.flatnonzero(rate <= allowed + 1e-9)[-1])
        assert flagged[at] / 77 == pytest.approx(tpr_at_fpr(*roc(clean, wrong), allowed))
    assert (rate[0], rate[-1], flagged[-1]) == (0, 1, 77)
    assert (np.diff(flagged) >= 0).all()


def test_the_same_evaluation_makes_the_same_page(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, full_page: str, tmp_path: Path
) -> None:
    assert write(tmp_path, seen, tiny_pipeline) == full_page


CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--allow-file-access-from-files", "--hide-scrollbars", "--dump-dom"),
)
# Headless windows are at least 500 pixels wide, a frame is as wide as it is told to be.
FRAME = """<!DOCTYPE html><iframe id="f" src="page.html" style="width:390px;height:800px;border:0">
</iframe><script>addEventListener("load", () => {
  const page = document.getElementById("f").contentDocument;
  const broken = [...page.images].filter(image => !image.naturalWidth).length;
  document.title = `${page.documentElement.scrollWidth} wide, ${broken} broken`;
})</script>"""


def test_a_phone_shows_every_drawing_and_scrolls_in_one_direction_only(
    seen: Evaluation, tiny_pipeline: DefendedClassifier, tmp_path: Path
) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs Chromium: install the Debian package chromium")
    write(tmp_path, seen, tiny_pipeline, pictures=page.gallery(seen, tiny_pipeline))
    (tmp_path / "frame.html").write_text(FRAME)
    address = (tmp_path / "frame.html").as_uri()
    folder = f"--user-data-dir={tmp_path / 'browser'}"
    done = subprocess.run(
        [browser, *CHROMIUM, folder, address], capture_output=True, text=True, timeout=120
    )
    assert "<title>390 wide, 0 broken</title>" in done.stdout, done.stderr
