from pathlib import Path

import numpy as np
import pytest
import torch

from rampart.export.to_onnx import to_onnx
from rampart.handlers.engine import Engine
from rampart.hardening.model import pipeline as pipelines
from rampart.hardening.model.detectors import FULL, LEAN, median3x3
from rampart.hardening.model.images import Images
from rampart.hardening.model.pipeline import DefendedClassifier
from rampart.hardening.model.pixels import to_float, to_uint8


def test_full_answers_from_the_purified_view_and_keeps_the_raw_one(
    tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    x = to_float(tiny_images.image[:8])
    with torch.no_grad():
        out = tiny_pipeline.defend(x)
        torch.testing.assert_close(out.raw_logits, tiny_pipeline.classifier(x))
        assert tiny_pipeline.purifier is not None
        purified = tiny_pipeline.purifier(x)
        torch.testing.assert_close(out.logits, tiny_pipeline.classifier(purified))
    assert torch.equal(out.purified, purified)
    assert not torch.equal(purified, x)
    assert out.scores.shape == (8, len(FULL))


def test_lean_is_one_pass_without_a_purifier(tiny_folder: Path, tiny_images: Images) -> None:
    lean, classes = pipelines.load(tiny_folder / "weights.safetensors", "lean")
    image = tiny_images.image[:4]
    out = lean(image)
    assert lean.purifier is None
    assert torch.equal(out.purified, image)
    assert torch.equal(out.logits, out.raw_logits)
    torch.testing.assert_close(out.logits, lean.classifier(to_float(image)))
    assert out.scores.shape == (4, len(LEAN))
    assert classes == tiny_images.classes


@pytest.mark.training
@pytest.mark.parametrize("purified", [False, True])
def test_feature_squeezing_compares_the_image_with_squeezed_views_of_it(
    tiny_pipeline: DefendedClassifier, tiny_images: Images, tmp_path: Path, purified: bool
) -> None:
    purifier = tiny_pipeline.purifier if purified else None
    net = DefendedClassifier(tiny_pipeline.classifier, purifier, ("squeezing",)).eval()
    net.requires_grad_(False)
    x = to_float(tiny_images.image[:3])
    views = (x, (x * 31).round() / 31, median3x3(x))
    raw, *others = (net.classifier(view).softmax(1) for view in views)
    expected = torch.stack([(raw - other).abs().sum(1) for other in others]).amax(0)
    out = net.defend(x)
    torch.testing.assert_close(out.scores[:, 0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits, net.label_logits(x), rtol=1e-4, atol=1e-5)
    engine = Engine(to_onnx(net, tmp_path / "graph.onnx"), threads=1)
    for batch in (1, 3):
        served = engine.run(tiny_images.image[:batch].numpy())
        np.testing.assert_allclose(served.scores, out.scores[:batch], rtol=1e-3, atol=1e-4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net.defend(x).scores.sum(), x)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_the_uint8_entry_is_the_float_entry_on_pixels(
    tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    image = tiny_images.image[:4]
    with torch.no_grad():
        by_pixels, by_float = tiny_pipeline(image), tiny_pipeline.defend(to_float(image))
    assert torch.equal(by_pixels.logits, by_float.logits)
    assert torch.equal(by_pixels.scores, by_float.scores)
    assert torch.equal(by_pixels.purified, to_uint8(by_float.purified))


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(
    tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    image = tiny_images.image[:6]
    with torch.no_grad():
        together, alone = tiny_pipeline(image), tiny_pipeline(image[3:4])
    torch.testing.assert_close(together.logits[3:4], alone.logits)
    torch.testing.assert_close(together.scores[3:4], alone.scores, rtol=1e-4, atol=1e-5)


def test_an_attacker_gets_gradients_through_the_purifier(
    tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    x = to_float(tiny_images.image[:2]).requires_grad_()
    through = torch.autograd.grad(tiny_pipeline.defend(x).logits.sum(), x)[0]
    around = torch.autograd.grad(tiny_pipeline.defend(x).raw_logits.sum(), x)[0]
    assert float(through.abs().sum()) > 0
    assert not torch.allclose(through, around)


def test_a_saved_pipeline_comes_back_the_same(
    tmp_path: Path, tiny_pipeline: DefendedClassifier, tiny_images: Images
) -> None:
    file = tmp_path / "again.safetensors"
    pipelines.save(file, tiny_pipeline, tiny_images.classes)
    again, _ = pipelines.load(file)
    for first, second in zip(
        tiny_pipeline(tiny_images.image[:3]), again(tiny_images.image[:3]), strict=True
    ):
        assert torch.equal(first, second)
    assert not any(p.requires_grad for p in again.parameters())


def test_the_classifier_can_be_taken_out_of_a_pipeline_file(
    tiny_folder: Path, tiny_pipeline: DefendedClassifier
) -> None:
    alone = pipelines.load_classifier(tiny_folder / "weights.safetensors")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(alone(x), tiny_pipeline.classifier(x))


def test_a_file_without_a_purifier_says_what_to_pass(tmp_path: Path, tiny_folder: Path) -> None:
    alone = pipelines.load_classifier(tiny_folder / "weights.safetensors")
    file = tmp_path / "classifier.safetensors"
    pipelines.checkpoint.save(file, alone, {"classifier": alone.config._asdict()})
    with pytest.raises(ValueError, match="rampart purifier"):
        pipelines.load_purifier(file)


def test_a_model_without_a_purifier_is_lean_only(tmp_path: Path, tiny_folder: Path) -> None:
    alone = pipelines.load_classifier(tiny_folder / "weights.safetensors")
    file, x = tmp_path / "weights.safetensors", torch.rand(2, 3, 32, 32)
    pipelines.save(file, DefendedClassifier(alone, None, FULL), ("a", "b"))
    lean, classes = pipelines.load(file, "lean")
    assert torch.equal(lean.label_logits(x), alone(x))
    assert classes == ("a", "b")
    with pytest.raises(ValueError, match="only variant is lean"):
        pipelines.load(file, "full")


def test_the_label_alone_is_that_of_the_whole_pipeline(tiny_pipeline: DefendedClassifier) -> None:
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(tiny_pipeline.label_logits(x), tiny_pipeline.defend(x).logits)


def test_without_a_purifier_every_pixel_comes_back_as_it_was(tiny_folder: Path) -> None:
    lean, _ = pipelines.load(tiny_folder / "weights.safetensors", "lean")
    image = torch.arange(256).byte().repeat(12).reshape(1, 32, 32, 3)
    assert torch.equal(lean(image).purified, image)
