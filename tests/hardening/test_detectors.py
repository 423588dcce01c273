import pytest
import torch
from blobs import blobs

from rampart.hardening.model.classifier import Classifier, ClassifierConfig
from rampart.hardening.model.detectors import (
    FULL,
    RECTIFIED,
    Detectors,
    FeatureDistance,
    Views,
    median3x3,
    rms,
)
from rampart.hardening.model.images import Images


def views(**changes: torch.Tensor) -> Views:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (4, 3, 8, 8), generator=generator) / 255
    logits, trust = torch.randn(4, 10, generator=generator), torch.rand(4, generator=generator)
    features = torch.randn(4, 6, generator=generator)
    return Views(x, x, logits, logits, features, trust)._replace(**changes)


def scores(name: str, of: Views) -> torch.Tensor:
    return Detectors((name,), 10, 6)(of)[:, 0]


def test_the_median_of_minima_and_maxima_equals_that_of_a_sort() -> None:
    x = torch.rand(5, 3, 9, 7)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)
    assert torch.equal(median3x3(x), patches.median(-1).values)


def test_the_median_detector_sees_salt_and_pepper() -> None:
    flat = torch.full((1, 3, 8, 8), 0.5)
    salted = flat.clone()
    salted[..., 3, 4] = 1.0
    assert scores("median", views(x=salted)) > 100 * scores("median", views(x=flat))


def test_the_bit_depth_detector_is_silent_on_coarse_pixels() -> None:
    coarse = torch.randint(16, (4, 3, 8, 8)) / 15
    assert scores("bit_depth", views(x=coarse)).max() < 1e-5
    assert scores("bit_depth", views(x=coarse + 1 / 45)).min() > 0.02


def test_reconstruction_and_disagreement_are_zero_where_the_purifier_does_nothing() -> None:
    for name in ("reconstruction", "disagreement"):
        assert scores(name, views()).max() < 1e-5
    assert scores("reconstruction", views(purified=views().x + 0.1)).allclose(torch.tensor(0.1))


def test_disagreement_is_one_where_the_views_have_different_sure_labels() -> None:
    sure = 100 * torch.eye(10)[:4]
    other = 100 * torch.eye(10)[4:8]
    found = scores("disagreement", views(logits=sure, raw_logits=other))
    assert found.allclose(torch.ones(4))


@pytest.mark.parametrize("name", ["confidence", "energy"])
def test_an_unsure_answer_is_more_suspicious(name: str) -> None:
    sharp = views().logits * 10
    assert (scores(name, views(logits=sharp)) < scores(name, views())).all()


def test_feature_distance_is_the_mahalanobis_distance_to_the_nearest_mean() -> None:
    torch.manual_seed(0)
    images = blobs(60, size=16)
    classifier = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=16)).eval()
    distance = FeatureDistance(10, classifier.feature_size, shrinkage=0.5)
    distance.fit(classifier, images)
    with torch.no_grad():
        features = classifier.embed(images.image.permute(0, 3, 1, 2).float() / 255)
    means = torch.stack([features[images.label == k].mean(0) for k in range(10)])
    torch.testing.assert_close(distance.means, means)
    gap = (features[:, None] - means) @ distance.whiten  # (N, K, F)
    torch.testing.assert_close(
        distance.distances(features), gap.norm(dim=2).amin(1), rtol=1e-3, atol=1e-2
    )
    centred = (features - means[images.label]) @ distance.whiten
    # Whitened with the diagonal half kept: each direction has the order of unit variance.
    assert 0.2 < float(centred.square().mean()) < 2


class Mixed(torch.nn.Module):
    """Many large features (N, 1024) of few pixels."""

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(1)
        mix = torch.randn(pixels.shape[1], 1024, generator=torch.Generator().manual_seed(0))
        mix[:, ::2] = 0  # features that never fire
        return 100 * (pixels @ mix).relu()


def test_feature_distance_is_finite_with_more_features_than_images() -> None:
    distance = FeatureDistance(10, 1024)
    distance.fit(Mixed(), blobs(60, size=16))
    assert distance.whiten.isfinite().all()


def test_a_class_without_images_is_named() -> None:
    images = Images(
        torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.tensor([0, 1]), tuple("abc")
    )
    classifier = Classifier(ClassifierConfig("resnet10", 3, width=0.125, image_size=16)).eval()
    with pytest.raises(ValueError, match=r"lack the classes \['c'\]"):
        FeatureDistance(3, classifier.feature_size).fit(classifier, images)


def test_unknown_detectors_are_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"\['lid'\].*median"):
        Detectors(("lid",), 10, 6)


@pytest.mark.parametrize("name", [*FULL, RECTIFIED])
def test_every_detector_gives_an_attacker_its_true_gradient(name: str) -> None:
    torch.manual_seed(0)
    tensors = {k: v for k, v in views()._asdict().items() if isinstance(v, torch.Tensor)}
    leaf = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    base = Views(**leaf)._replace(
        purified=leaf["x"] * 0.9 + 0.02, logits=leaf["logits"] + 0.1 * leaf["features"][:, :1]
    )
    scores(name, base).sum().backward()
    gradients = [t.grad for t in leaf.values() if t.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert all(torch.isfinite(g).all() for g in gradients)


def test_rms_is_differentiable_at_zero() -> None:
    zero = torch.zeros(1, 3, 4, 4, requires_grad=True)
    rms(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()
