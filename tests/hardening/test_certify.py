import math

import pytest
import torch
from blobs import Learned

from rampart.hardening.judge.certify import certify, in_words


class Half(torch.nn.Module):
    """Two classes divided by a plane at `distance` from the gray image."""

    def __init__(self, distance: float) -> None:
        super().__init__()
        normal = torch.ones(3 * 4 * 4) / math.sqrt(48)
        self.normal, self.distance = normal, distance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = (x - 0.5).flatten(1) @ self.normal + self.distance
        return torch.stack([side, -side], 1)


GRAY = torch.full((1, 3, 4, 4), 0.5)


@pytest.mark.parametrize("distance", [0.1, 0.25, 0.4])
def test_the_radius_is_just_below_the_distance_to_a_plane(distance: float) -> None:
    made = certify(Half(distance), GRAY, sigma=0.25, samples=20_000)
    # Smoothing a plane leaves it where it is, so the distance is the best that can be certified.
    assert made.label == 0
    assert 0.9 * distance < made.radius <= distance


def test_at_the_border_it_abstains() -> None:
    made = certify(Half(0.001), GRAY, sigma=0.25, samples=1000)
    assert made.label is None
    assert made.radius == 0
    assert in_words(made, ("a", "b")).startswith("abstains: ")


def test_no_attack_within_the_radius_changes_the_vote(learned: Learned) -> None:
    x = learned.x[:1]
    made = certify(learned.model, x, sigma=0.1, samples=2000)
    assert made.label is not None
    toward = torch.autograd.functional.jacobian(lambda x: learned.model(x)[0, made.label], x)
    moved = x - 0.95 * made.radius * toward / toward.norm()
    again = certify(learned.model, moved, sigma=0.1, samples=2000)
    assert again.label == made.label


def test_more_samples_certify_more_and_a_stricter_alpha_less() -> None:
    def radius(**options: float) -> float:
        return certify(Half(0.5), GRAY, sigma=0.25, **options).radius  # type: ignore[arg-type]

    assert radius(samples=200) < radius(samples=5000)
    assert radius(samples=1000, alpha=1e-6) < radius(samples=1000, alpha=0.01)


@pytest.mark.parametrize(
    "options", [{"sigma": 0}, {"sigma": 1, "alpha": 0.5}, {"sigma": 1, "samples": 0}]
)
def test_what_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0, and alpha"):
        certify(Half(0.1), GRAY, **options)  # type: ignore[arg-type]


def test_a_certificate_says_what_it_is_about() -> None:
    made = certify(Half(0.4), GRAY, sigma=0.25, samples=1000)
    words = in_words(made, ("cat", "dog"))
    assert words.startswith("cat: the smoothed label holds within an L2 radius of 0.3")
    assert "in at most 0.001 of" in words
    almost = made._replace(radius=0.39999)
    assert "radius of 0.399 " in in_words(almost, ("cat", "dog"))
    assert "for L2" in words
