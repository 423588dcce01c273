from pathlib import Path

import numpy as np
import pytest
import torch

from rampart.hardening.attack import victims
from rampart.hardening.attack.ladder import Budget
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim
from rampart.hardening.judge import evaluate as evaluation
from rampart.hardening.judge.evaluate import Evaluation
from rampart.hardening.model import calibrate, checkpoint
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.card import Subject
from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.images import Images

THREAT = Threat("Linf", 4 / 255)
BUDGET = Budget(steps=4, targets=1, queries=20, standard=False)
RATE = 0.1


@pytest.fixture(scope="module")
def few(tiny_folder: Path, tiny_images: Images) -> Images:
    """Images under the labels that the pipeline gives them, so that there is something to lose."""
    images = tiny_images[slice(10)]
    pipeline, _ = pipelines.load(tiny_folder / "weights.safetensors")
    with torch.no_grad():
        return Images(images.image, pipeline(images.image).logits.argmax(1), images.classes)


@pytest.fixture(scope="module")
def attacked(tiny_folder: Path) -> list[Victim]:
    """Classifier, both variants and an undefended twin."""
    weights = tiny_folder / "weights.safetensors"
    net = pipelines.load_classifier(weights)
    out = [victims.label_victim("classifier", net, checkpoint.digest(net))]
    for variant in ("full", "lean"):
        pipeline, _ = pipelines.load(weights, variant)
        calibration = calibrate.load_variant(tiny_folder, variant)
        digest = checkpoint.digest(pipeline)
        out.append(victims.pipeline_victim(pipeline, calibration, digest, rate=RATE))
    torch.manual_seed(1)
    twin = Classifier(ClassifierConfig("resnet10", 10, width=0.125)).eval().requires_grad_(False)
    return [*out, victims.label_victim("undefended", twin, checkpoint.digest(twin))]


def run(attacked: list[Victim], few: Images, folder: Path, *only: str) -> Evaluation:
    return evaluation.evaluate(
        attacked, few, THREAT, BUDGET, rate=RATE, folder=folder, only=list(only)
    )


@pytest.fixture(scope="module")
def whole(
    attacked: list[Victim], few: Images, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    return run(attacked, few, tmp_path_factory.mktemp("found"))


def figures(done: Evaluation, subject: str, variant: str) -> dict[str, float]:
    return {m.name: m.value for m in done.metrics if m.subject == Subject.parse(subject, variant)}


def test_the_worst_case_is_no_better_than_any_rung(whole: Evaluation) -> None:
    for subject, variant in (("classifier", "-"), ("pipeline", "full"), ("pipeline", "lean")):
        value = figures(whole, subject, variant)
        rungs = [value[name] for name in ("clean", "pgd20", "autoattack_short", "transfer")]
        assert value["robust"] <= min(rungs) <= value["clean"]
    for variant in ("full", "lean"):
        value = figures(whole, "pipeline", variant)
        assert value["robust_with_rejection@10%"] <= value["joint_apgd"]
        assert value["accepted_and_wrong"] == pytest.approx(1 - value["robust_with_rejection@10%"])
        # Rejecting can only help an image that is counted wrong otherwise.
        assert value["robust"] <= value["robust_with_rejection@10%"]


def test_rejecting_small_perturbations_costs_ever_more(whole: Evaluation) -> None:
    value = figures(whole, "pipeline", "full")
    curve = [value[f"stratified@{share}eps"] for share in ("0", "0.25", "0.5", "1")]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] <= value["robust_with_rejection@10%"]
    assert curve[-1] <= value["robust"]


def test_max_softmax_rejects_as_many_clean_images(whole: Evaluation) -> None:
    for variant in ("full", "lean"):
        mine = whole.records[f"pipeline {variant}"].clean.deployed.accepted
        plain = whole.records[f"max_softmax {variant}"].clean.deployed.accepted
        assert plain.sum() == mine.sum()


def test_lean_shares_the_label_and_so_the_figures_of_the_classifier(whole: Evaluation) -> None:
    alone, lean = figures(whole, "classifier", "-"), figures(whole, "pipeline", "lean")
    for name in ("clean", "pgd20", "autoattack_short", "transfer"):
        assert lean[name] == alone[name]
    crafted = {(found.rung.victim.name, found.rung.name) for found in whole.attempts}
    assert ("pipeline lean", "autoattack_short") not in crafted


def test_every_figure_under_attack_names_threat_and_attack(whole: Evaluation) -> None:
    for metric in whole.metrics:
        clean = metric.name in ("clean", "clean_rejection")
        assert (metric.threat is None) == clean
        assert bool(metric.attack) == (not clean)
        assert 0 < metric.n <= 10
    assert {m.threat for m in whole.metrics if m.name == "robust"} == {THREAT}


def test_every_defended_victim_is_checked(whole: Evaluation) -> None:
    names = {(check.subject, check.name) for check in whole.checks}
    for subject in ("classifier", "pipeline full"):
        assert {(subject, "zero_gradients"), (subject, "black_box")} <= names
    for variant in ("full", "lean"):
        assert {(f"pipeline {variant}", "adaptive"), (f"pipeline {variant}", "weak_joint")} <= names
        subject = f"pipeline {variant}, detectors"
        assert {(subject, "zero_detector_gradients"), (subject, "black_box")} <= names


def test_a_second_run_crafts_nothing_anew(
    attacked: list[Victim], few: Images, tmp_path: Path
) -> None:
    first = run(attacked, few, tmp_path, "pgd20")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    again = run(attacked, few, tmp_path, "pgd20")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")} == files
    assert again.metrics == first.metrics
    assert not first.checks
    assert not [m for m in first.metrics if m.name == "robust"]


def test_one_attack_alone_is_reported_at_full_eps(
    attacked: list[Victim], few: Images, tmp_path: Path
) -> None:
    done = run(attacked[2:3], few, tmp_path, "joint_apgd")
    assert [m.name for m in done.metrics] == ["clean", "clean_rejection", "joint_apgd"]
    assert {(f.rung.victim.subject.kind, f.rung.threat) for f in done.attempts} == {
        ("pipeline", THREAT)
    }


def test_a_rate_that_the_calibration_cannot_back_is_refused_at_once(tiny_folder: Path) -> None:
    pipeline, _ = pipelines.load(tiny_folder / "weights.safetensors", "lean")
    calibration = calibrate.load_variant(tiny_folder, "lean")
    with pytest.raises(ValueError, match="calibration images cannot support"):
        victims.pipeline_victim(pipeline, calibration, "", rate=1e-6)


def test_a_label_attack_does_not_depend_on_the_calibration(attacked: list[Victim]) -> None:
    full = attacked[1]
    other = full._replace(fingerprint="another rate")
    for one, two in zip(
        *(evaluation.ladder([v], THREAT, BUDGET, 4) for v in (full, other)), strict=True
    ):
        assert (one.fingerprint == two.fingerprint) == (one.aim == "label")


def test_an_unknown_attack_is_named_with_the_known_ones(
    attacked: list[Victim], few: Images, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no attack pdg: .*pgd20"):
        run(attacked, few, tmp_path, "pdg")


def test_lean_alone_has_no_label_to_attack_and_its_int8_form_has_one(
    attacked: list[Victim], few: Images, tmp_path: Path
) -> None:
    lean = attacked[2]
    with pytest.raises(ValueError, match="pgd20 is made on the classifier: leave out --variant"):
        run([lean], few, tmp_path, "pgd20")
    lower = lean._replace(subject=Subject.parse("graph:int8", "lean"))
    done = run([lean, lower], few, tmp_path, "pgd20")
    assert figures(done, "graph:int8", "lean").keys() == {"clean", "clean_rejection", "pgd20"}
    assert figures(done, "pipeline", "lean").keys() == {"clean", "clean_rejection"}


def test_what_a_purifier_answers_depends_on_its_code(
    attacked: list[Victim], few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = attacked[0]
    purified = bare._replace(subject=Subject("+ purifier"))
    assert not purified.rejects

    def made(victim: Victim) -> set[Path]:
        before = set(tmp_path.rglob("*.npy"))
        run([victim], few, tmp_path, "pgd20")
        return set(tmp_path.rglob("*.npy")) - before

    assert made(bare) and made(purified) and not made(bare) and not made(purified)
    monkeypatch.setattr(evaluation, "PIPELINE_CODE", evaluation.LABEL_CODE[:1])
    assert not made(bare) and made(purified)


def test_an_image_must_survive_in_float_and_through_the_8_bit_entry(
    attacked: list[Victim], few: Images
) -> None:
    honest = attacked[0]
    wrong = honest.answer(few.image.permute(0, 3, 1, 2) / 255).guess + 1
    liar = honest._replace(deployed=lambda image: honest.deployed(image)._replace(guess=wrong))
    x = few.image.permute(0, 3, 1, 2) / 255
    zero = Threat(eps=0.0)
    fine = evaluation.replay(honest, x, few, zero)
    assert np.array_equal(fine.right, honest.answer(x).guess == few.label.numpy())
    assert not evaluation.replay(liar, x, few, zero).right[fine.right].any()


def test_the_estimate_grows_with_images_and_falls_with_fewer_attacks(
    attacked: list[Victim], few: Images
) -> None:
    everything = evaluation.estimate(attacked, few, THREAT, BUDGET, only=[])
    one = evaluation.estimate(attacked, few, THREAT, BUDGET, only=["pgd20"])
    assert 0 < one < everything
