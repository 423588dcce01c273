"""The library as its user meets it: own images, own network, own weights."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from blobs import blobs
from command import run
from documents import block
from PIL import Image
from torch import Tensor, nn

import rampart as rp
from rampart.export.ways import WAYS
from rampart.handlers.engine import Engine
from rampart.handlers.errors import ImageError
from rampart.hardening.model import wrapping
from rampart.hardening.report import card as report


class Small(nn.Module):
    """A network of one's own, which normalizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x - 0.5).mean((2, 3)))


def images_at(folder: Path, count: int, *, size: int = 16, seed: int = 0) -> Path:
    """Blobs as an .npz file."""
    file = folder / f"images{seed}.npz"
    images = blobs(count, size=size, seed=seed)
    pixels, label = images.image.numpy(), images.label.numpy()
    np.savez(file, image=pixels, label=label, classes=images.classes)
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> rp.Model:
    """A model of untrained weights, in memory alone."""
    torch.manual_seed(0)
    images = blobs(400, size=16)
    net = rp.Classifier.wrap(Small(), head="fc", classes=images.classes, image_size=16)
    return rp.Model.calibrate(net, images)


@pytest.mark.training
def test_the_short_way_leads_from_a_module_to_an_archive(tmp_path: Path) -> None:
    source = rp.load_images(str(images_at(tmp_path, 4000)), size=16)
    train, held = source.hold_out()
    test = rp.load_images(images_at(tmp_path, 48, seed=1), size=16)
    net = rp.Classifier.wrap(Small(), head="fc", classes=train.classes, image_size=16)
    recipe = rp.Recipe(threat=rp.Threat("Linf", 4 / 255), epochs=4, lr=0.1)
    net = rp.train(net, train, held.validation, recipe, out=tmp_path / "run", device="cpu")
    model = rp.Model.calibrate(net, held)
    quick = rp.QUICK._replace(steps=2, targets=1, queries=5)
    assert model.threat == recipe.threat
    assert float(model.whole.detectors.get_buffer("consistency.radius")) == pytest.approx(2 / 255)
    figures = model.evaluate(test, quick, rate=0.05, cache=tmp_path / "found")
    assert "robust_with_rejection@5%" in figures.table()
    assert {row["eps"] for row in figures.rows if row["name"] == "robust"} == {"4/255"}
    policy = rp.Policy(false_alarm_rate=0.05, on_detection="reject")
    parity = model.archive(tmp_path / "mine.mar", policy=policy)
    assert "parity on" in str(parity)
    with ZipFile(tmp_path / "mine.mar") as packed:
        assert "on_detection: reject" in packed.read("model-config.yaml").decode()
        assert json.loads(packed.read("labels.json")) == list(train.classes)


@pytest.mark.slow
@pytest.mark.training
def test_the_first_page_and_the_tutorial_show_that_way_in_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = block("README.md", "rp.Classifier.wrap(my_module")
    assert text == block("docs/tutorials/own-network.md", "rp.Classifier.wrap(my_module")
    monkeypatch.chdir(tmp_path)
    images = blobs(1200, size=64)
    for number, (pixels, label) in enumerate(zip(images.image, images.label, strict=True)):
        home = tmp_path / "my_images" / images.classes[label]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(home / f"{number}.png")
    torch.manual_seed(0)
    names: dict[str, Any] = {"my_module": Small(), "test": blobs(20, size=64, seed=1)}
    exec(compile(text, "block", "exec"), names)
    assert names["model"].classes == tuple(sorted(images.classes))
    with ZipFile(tmp_path / "mine.mar") as packed:
        assert "on_detection: reject" in packed.read("model-config.yaml").decode()


def test_a_normalization_of_pixels_up_to_255_is_refused_with_the_right_one(tmp_path: Path) -> None:
    images = blobs(400, size=16)
    levels = {"mean": (127.5,), "std": (51.0,)}
    what = {"head": "fc", "classes": images.classes, "image_size": 16}
    net = rp.Classifier.wrap(Small(), **what, **levels)
    right = r"divided by 255, mean \(0\.5, 0\.5, 0\.5\) and std \(0\.2, 0\.2, 0\.2\)"
    with pytest.raises(ValueError, match=right):
        rp.train(net, images, images, out=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=right):
        rp.Model.calibrate(net, images)


def test_own_weights_are_calibrated_as_they_are(small: rp.Model) -> None:
    assert small.variants == ["lean"] and small.purifier is None
    assert small.card["classifier"]["arch"].endswith(":Small")
    assert small.threat == rp.Threat("Linf", 8 / 255)  # nobody has said another


def test_what_your_own_network_does_belongs_to_every_attack_on_it(small: rp.Model) -> None:
    code = wrapping.behaviour(small.classifier, small.image_size)
    for victim in small.victims(rate=0.05):
        assert code in victim.fingerprint and code in victim.label_fingerprint


class Leaky(Small):
    """The same weights, and other code."""

    def forward(self, x: Tensor) -> Tensor:
        slopes = nn.functional.leaky_relu(self.body[0](x - 0.5), -3.0)
        return self.fc(slopes.mean((2, 3)))


def test_no_export_takes_the_code_of_another_network_that_was_wrapped_by_the_same_name(
    tmp_path: Path,
) -> None:
    images = blobs(400, size=16)
    take = {"head": "fc", "classes": images.classes, "image_size": 16, "name": "one"}
    model = rp.Model.calibrate(rp.Classifier.wrap(Small(), **take), images)
    rp.Classifier.wrap(Leaky(), **take)
    with pytest.raises(ValueError, match="the network registered as one answers otherwise"):
        model.export(tmp_path / "a.onnx")
    rp.Classifier.wrap(Small(), **take)
    model.export(tmp_path / "a.onnx")


class Sly(Small):
    """The exporter sees another network."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.flip(1) if torch.compiler.is_exporting() else logits


def test_a_graph_that_fails_its_gate_takes_no_place(tmp_path: Path) -> None:
    images, out = blobs(400, size=16), tmp_path / "a.onnx"
    net = rp.Classifier.wrap(Sly(), head="fc", classes=images.classes, image_size=16)
    model = rp.Model.calibrate(net, images)
    out.write_text("a good one")
    with pytest.raises(RuntimeError, match="the exported graph decides differently"):
        model.export(out)
    assert out.read_text() == "a good one" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("held", "rate"), [(400, 0.01), (120, 0.02)])
def test_an_export_compares_decisions_at_the_rate_that_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, rate: float
) -> None:
    images, rates, way = blobs(held, size=16), [], WAYS["classify"]
    images = replace(images, label=torch.arange(held) % 10)  # so few, and some of each class
    net = rp.Classifier.wrap(Small(), head="fc", classes=images.classes, image_size=16)
    model = rp.Model.calibrate(net, images)

    def compare(*parts: Any, rate: float) -> Any:
        rates.append(rate)
        return way.compare(*parts, rate=rate)

    monkeypatch.setitem(WAYS, "classify", way._replace(compare=compare))
    model.export(tmp_path / "new" / "a.onnx")
    assert rates == [rate] and (tmp_path / "new" / "a.onnx").is_file()


def test_the_threat_that_calibration_is_told_is_the_models_own(
    small: rp.Model, tmp_path: Path
) -> None:
    threat = rp.Threat("Linf", 2 / 255)
    model = rp.Model.calibrate(small.classifier, blobs(400, size=16), guarded=True, threat=threat)
    radius = model.whole.detectors.get_buffer("consistency.radius")
    assert float(radius) == pytest.approx(1 / 255)
    model.save(tmp_path / "told")
    assert rp.Model.load(tmp_path / "told").threat == threat


def test_a_guarded_variant_is_served_with_its_gradient_in_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = blobs(400, size=16)
    net = rp.Classifier.wrap(Small(), head="fc", classes=images.classes, image_size=16)
    trained = {"training": {"classifier": "Threat(norm='Linf', eps=0.0156862745)"}}
    model = rp.Model.calibrate(net, images, guarded=True, card=trained)
    assert model.variants == ["lean", "guarded"] and model.best_variant == "lean"
    radius = model.whole.detectors.get_buffer("consistency.radius")
    assert float(radius) == pytest.approx(2 / 255)
    assert model.card["promise"].keys() == {"lean, fp32", "guarded, fp32"}
    model.archive(tmp_path / "mine.mar", form=rp.Form("guarded"), anyway=True)
    with ZipFile(tmp_path / "mine.mar") as packed:
        packed.extract("graph.onnx", tmp_path)
        detectors = json.loads(packed.read("calibration.json"))["detectors"]
    assert detectors == ["feature_distance", "consistency"]
    found = Engine(tmp_path / "graph.onnx").run(images.image[:20].numpy())
    own = model.pipeline("guarded")(images.image[:20])
    assert np.allclose(found.scores, own.scores.detach(), atol=1e-4)


def test_a_saved_model_is_the_same_once_it_is_loaded(small: rp.Model, tmp_path: Path) -> None:
    model = rp.Model(small.whole, small.classes, small.calibrations, card=small.card)
    model.save(tmp_path / "store" / "mine")
    report.check_card(report.read_card(tmp_path / "store" / "mine"))
    again = rp.Model.load(tmp_path / "store" / "mine")
    images = blobs(20, size=16, seed=5)
    own, other = (m.predict(images.image) for m in (small, again))
    assert [v.to_dict() for v in own] == [v.to_dict() for v in other]
    again.save(tmp_path / "copy")
    files = [sorted(f.name for f in (tmp_path / d).iterdir()) for d in ("store/mine", "copy")]
    assert files[0] == files[1]


def test_a_folder_that_is_no_model_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        rp.Model.load(tmp_path)


def test_a_prediction_is_the_verdict_of_the_endpoint(small: rp.Model, tmp_path: Path) -> None:
    pixels = blobs(3, size=16, seed=6).image.numpy()
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    strict = rp.Policy(false_alarm_rate=0.5, on_detection="reject")
    verdicts = small.predict(files, policy=strict)
    assert [v.to_dict() for v in verdicts] == [
        v.to_dict() for v in small.predict(pixels, policy=strict)
    ]
    for verdict in verdicts:
        assert (verdict.label is None) == (verdict.p_value < 0.5)
        assert verdict.decision == ("reject" if verdict.p_value < 0.5 else "accept")
    with pytest.raises(ImageError):
        small.predict([b"no picture"])


def test_images_of_other_classes_are_refused(small: rp.Model) -> None:
    images = blobs(400, size=16)
    fewer = rp.Images(images.image, images.label % 2, images.classes[:2])
    with pytest.raises(ValueError, match=r"the images have the classes .*, the model"):
        small.evaluate(fewer, rp.QUICK)
    with pytest.raises(ValueError, match="have 2 classes, but the network has 10"):
        rp.Model.calibrate(small.classifier, fewer)


def test_too_few_images_do_not_calibrate(small: rp.Model) -> None:
    with pytest.raises(ValueError, match=r"hold out 40 or more \(200 or more for 1%\)"):
        rp.Model.calibrate(small.classifier, rp.Held(blobs(30, size=16), blobs(400, size=16)))


def test_a_small_set_makes_a_weaker_promise_that_its_archive_keeps_to(
    small: rp.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = rp.Model.calibrate(
        small.classifier, rp.Held(blobs(100, size=16, seed=3), blobs(99, size=16))
    )
    assert model.rate == 0.02 and small.rate == 0.01
    assert "promises at most 2.0%" in (said := capsys.readouterr().out)
    assert "for this one of 52 images up to 5.6% with 95% confidence" in said
    found = model.card["promise"]["lean, fp32"]
    assert (found["rate"], found["calibration_images"], found["n"]) == (0.02, 52, 29)
    assert f"{found['flagged']} of 29 validation images flagged" in said
    model.archive(tmp_path / "small.mar", anyway=True)
    with ZipFile(tmp_path / "small.mar") as packed:
        assert "false_alarm_rate: 0.02" in packed.read("model-config.yaml").decode()
    report.check_card(model.card)
    assert len(model.predict(blobs(2, size=16).image)) == 2
    with pytest.raises(ValueError, match=r"choose a rate above 0\.0189"):
        model.archive(tmp_path / "strict.mar", policy=rp.Policy(0.01), anyway=True)


def at_chance(model: rp.Model) -> rp.Model:
    """The same model with a card that says so."""
    accuracy = {"value": 0.1, "interval": [0.05, 0.2], "n": 99, "chance": 0.1}
    card = model.card | {"accuracy": accuracy}
    return rp.Model(model.whole, model.classes, model.calibrations, card=card)


def test_a_model_that_is_no_better_than_chance_or_fails_its_checks_is_not_packed(
    small: rp.Model, tmp_path: Path
) -> None:
    out = tmp_path / "mine.mar"
    with pytest.raises(ValueError, match=r"is not packed: it is right on 10\.0%.* anyway=True"):
        at_chance(small).archive(out)
    check = {"name": "more steps", "subject": "lean", "passed": False}
    bad = rp.Model(
        small.whole, small.classes, small.calibrations, card={"model": "a", "history": []}
    )
    bad.card["checks"] = [check]
    with pytest.raises(ValueError, match=r"self-checks failed: more steps \(lean\)\. --anyway"):
        bad.archive(out)
    assert not out.exists()


@pytest.mark.training
def test_training_that_ends_at_chance_is_refused_unless_it_is_wanted_anyway(
    tmp_path: Path,
) -> None:
    images = blobs(64, size=16)
    alike = rp.Images(images.image, images.label % 2, ("cat", "dog"))
    held = rp.Images(images.image, images.label * 0, ("cat", "dog"))  # chance is 100%
    net = rp.Classifier(rp.ClassifierConfig("resnet10", 2, width=0.125, image_size=16))
    train = partial(rp.train, net, alike, held, rp.Recipe(epochs=1, batch_size=32))
    train = partial(train, out=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"classifier\.safetensors is not taken: it is right on"):
        train()
    assert train(anyway=True).config.classes == 2


def test_a_promise_that_validation_images_break_is_told_with_its_numbers(
    small: rp.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    images = blobs(400, size=16, seed=4)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, images.image.shape))
    last = torch.arange(400)[:, None, None, None] >= 400 * 1500 // 5170  # all but validation
    mixed = torch.where(last, images.image // 8, noise.byte())
    unlike = rp.Images(mixed, images.label, images.classes)
    train = blobs(50, size=16)
    dark = rp.Images(train.image // 8, train.label, train.classes)
    model = rp.Model.calibrate(small.classifier, rp.Held(unlike, dark))
    found = model.card["promise"]["lean, fp32"]
    assert found["flagged"] > 50 and found["chance"] < 1e-4
    assert "Warning: if calibration and validation images were alike" in capsys.readouterr().out


def test_the_variant_that_the_ablation_chose_is_taken_where_there_is_one(
    tmp_path: Path, tiny_folder: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "tiny")
    assert rp.Model.load(model).best_variant == "full"
    report.write_card(model, {"ablation": {"default": {"variant": "lean"}}})
    assert rp.Model.load(model).best_variant == "lean"
    (model / "calibration-lean.json").unlink()
    assert rp.Model.load(model).best_variant == "full"


@pytest.mark.slow
@pytest.mark.training
def test_a_factory_on_the_command_line_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    body = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), *pool\n"
        "    return nn.Sequential(*body, nn.Linear(8, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    data = ["--data", images_at(tmp_path, 2000)]
    own = ["--arch", "their_nets:small"]
    size = ["--image-size", 16, "--head", 4]
    quick = ["--epochs", 1, "--validate-on", 8, "--device", "cpu"]
    run("train", *data, *own, *size, *quick, "--out", "runs/c")
    file = "runs/c/classifier.safetensors"
    run("calibrate", "store/mine", *data, *own, "--classifier", file)
    bare = [sys.executable, "-m", "rampart", "export", "store/mine", "--out", "mine.onnx"]
    done = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "--arch their_nets:small" in done.stderr
    done = subprocess.run([*bare, *own], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.onnx").is_file()


def test_the_package_is_imported_without_torch() -> None:
    code = "import rampart, sys; dir(rampart); print([m for m in sys.modules if m in ('torch', "
    code += "'numpy', 'typer', 'onnxruntime')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there() -> None:
    for name in rp.__all__:
        assert getattr(rp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rp.Nothing


@pytest.mark.parametrize(
    ("card", "threat"),
    [
        ({}, rp.Threat("Linf", 8 / 255)),
        ({"training": {"classifier": "not recorded"}}, rp.Threat("Linf", 8 / 255)),
        (
            {"training": {"classifier": repr(rp.Recipe(threat=rp.Threat("L2", 0.25)))}},
            rp.Threat("L2", 0.25),
        ),
        (
            {"training": {"classifier": repr(rp.Recipe(threat=rp.Threat(eps=4 / 255)))}},
            rp.Threat(eps=4 / 255),
        ),
        (
            {"threat_model": "Linf 2/255", "training": {"classifier": "L2 1"}},
            rp.Threat(eps=2 / 255),
        ),
        ({"threat_model": "L2 0.5"}, rp.Threat("L2", 0.5)),
    ],
)
def test_a_models_threat_is_what_it_was_evaluated_or_trained_against(
    tiny_folder: Path, card: dict[str, Any], threat: rp.Threat
) -> None:
    model = rp.Model.load(tiny_folder)
    model.card = card
    assert model.threat == threat
