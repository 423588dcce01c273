"""Classifiers as ONNX files that others made: attacked by gradients, as black boxes, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from blobs import Learned, blobs
from command import run
from onnx_files import Signed, by_scikit_learn, by_timm, export, quantized, saved

from rampart.hardening.attack.pgd import Threat
from rampart.hardening.model import onnx_file
from rampart.hardening.model.images import Images
from rampart.hardening.model.onnx_file import OnnxFile, Unconvertible
from rampart.hardening.model.scaling import SCALINGS
from rampart.onnx_study import Described, evaluate
from rampart.studies import Study

SIGNED = Described(range="signed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, learned: Learned) -> Path:
    """signed.onnx and fixed.onnx, of probabilities, and images.npz."""
    folder = tmp_path_factory.mktemp("onnx")
    export(Signed(learned.model), folder / "signed.onnx")
    export(Signed(learned.model), folder / "fixed.onnx", dynamic_shapes=None)
    saved(folder / "images.npz", blobs(200, size=16, seed=3))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(Threat("Linf", 12 / 255), quick=True, cache=tmp_path / "found", command="it")


def values(content: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in content["metrics"]}


def test_a_file_is_attacked_by_gradients_and_judged_by_its_own_answers(
    home: Path, study: Study
) -> None:
    images = home / "images.npz"
    found = evaluate(
        home / "signed.onnx", images, study, described=SIGNED, limit=40, rungs=["pgd20"]
    )
    some = blobs(200, size=16, seed=3)
    rows = np.arange(40) * 200 // 40
    x = some.image[rows].numpy().astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    session = onnxruntime.InferenceSession(home / "signed.onnx")
    (shares,) = session.run(None, {"pixels": x})
    clean = float((shares.argmax(1) == some.label[rows].numpy()).mean())
    assert values(found.card)["clean"] == pytest.approx(clean, abs=1e-6)
    assert values(found.card)["pgd20"] < clean - 0.3
    assert json.loads((home / "signed-measured.json").read_text()) == found.card
    text = "\n".join(found.lines)
    assert "takes nchw, 16 pixels a side, any batch; range signed, as said" in text
    assert "10 classes, its softmax cut off" in text and "passed the parity gate" in text
    assert found.card["metrics"][0]["n"] == 40 and found.card["metrics"][0]["command"] == "it"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timms_own_export_has_gradients_and_its_quantized_form_is_a_black_box(
    tmp_path: Path, study: Study
) -> None:
    images = saved(tmp_path / "images.npz", blobs(100, seed=3))
    file = by_timm(tmp_path / "timm.onnx", blobs(400))
    white = evaluate(file, images, study, limit=20, rungs=["pgd20"])
    assert "by gradients" in white.card["attacked"]
    assert white.card["input"]["range"].startswith("unit, found by accuracy on 100 images")
    small = quantized(file, tmp_path / "int8.onnx")
    black = evaluate(small, images, study, limit=6)
    assert "black box, since onnx2torch does not convert it" in black.card["attacked"]
    assert black.card["metrics"][1]["attack"] == "Square, 200 queries, on 8-bit images"
    assert values(black.card)["square"] <= values(black.card)["clean"]
    with pytest.raises(ValueError, match=r"black box, since .*: leave out --rung"):
        evaluate(small, images, study, rungs=["pgd20"])


def test_a_fixed_batch_is_filled_up(home: Path) -> None:
    pixels = blobs(5, size=16).image.numpy()
    free, fixed = (OnnxFile(home / f"{name}.onnx") for name in ("signed", "fixed"))
    assert (free.entry.batch, fixed.entry.batch) == (None, 2)
    scaling = SCALINGS["signed"]
    expected = free.logits(pixels, scaling)
    np.testing.assert_allclose(fixed.logits(pixels, scaling), expected, atol=1e-4)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_allclose(fixed.twin(pixels, scaling)(x).numpy(), expected, atol=1e-3)


def test_a_twin_that_says_something_else_is_not_believed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = onnx_file.converted

    def other(model: Any) -> torch.nn.Module:
        net = own(model)
        with torch.no_grad():
            next(net.parameters()).mul_(1.1)
        return net

    monkeypatch.setattr(onnx_file, "converted", other)
    file, pixels = OnnxFile(home / "signed.onnx"), blobs(8, size=16).image.numpy()
    with pytest.raises(Unconvertible, match="differs from it, by"):
        file.twin(pixels, SCALINGS["signed"])


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 3, 8, 3), {}, "pass --layout nchw"),
        ((1, 1, 8, 8), {}, "gray pictures"),
        ((1, 3, 8, 9), {}, "it must be square"),
        ((1, 3, 8, 8), {"size": 16}, "--image-size its own size"),
        ((1, 3, None, None), {}, "name one with --image-size"),
        ((1, 12), {}, "an image classifier takes .N, 3, H, W."),
    ],
)
def test_an_input_that_is_no_rgb_picture_or_not_told_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph([helper.make_node("Flatten", ["x"], ["y"])], "g", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=says):
        OnnxFile(tmp_path / "a.onnx", **options)


def test_what_is_no_classifier_of_these_images_is_refused_in_a_sentence(
    home: Path, tmp_path: Path, study: Study
) -> None:
    images = home / "images.npz"
    few = blobs(40, size=16)
    two = saved(tmp_path / "two.npz", Images(few.image, few.label % 2, few.classes[:2]))
    with pytest.raises(ValueError, match=r"has 10 classes, but .*two\.npz has 2"):
        evaluate(home / "signed.onnx", two, study)
    with pytest.raises(ValueError, match="pass --range, and check"):
        evaluate(home / "signed.onnx", images, study)  # which is nearly as right on others
    (tmp_path / "a.onnx").write_bytes(b"no file of ONNX")
    with pytest.raises(ValueError, match=r"a\.onnx is no ONNX file"):
        evaluate(tmp_path / "a.onnx", images, study)


def test_scikit_learns_rows_are_refused(home: Path, tmp_path: Path, study: Study) -> None:
    pytest.importorskip("skl2onnx", reason="`pip install skl2onnx` brings what exports it")
    file = by_scikit_learn(tmp_path / "rows.onnx", blobs(100, size=16))
    with pytest.raises(ValueError, match=r"takes X tensor\(float\) \[None, 768\]"):
        evaluate(file, home / "images.npz", study)


def test_the_command_evaluates_a_file(home: Path, tmp_path: Path) -> None:
    said = run(
        "evaluate", home / "signed.onnx", "--images", home / "images.npz", "--quick", "--limit", 10,
        "--rung", "pgd20", "--range", "signed", "--cache", tmp_path, "--eps", 12,
    )  # fmt: skip
    assert "passed the parity gate" in said and "pgd20" in said and "Linf 12/255" in said
