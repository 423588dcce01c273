import pytest
import torch
from blobs import blobs

from rampart.hardening.model.pixels import to_float
from rampart.hardening.model.project import decoded, project
from rampart.hardening.model.purifier import Purifier, PurifierConfig


@pytest.fixture
def generator() -> Purifier:
    torch.manual_seed(0)
    made = Purifier(PurifierConfig(width=8, depth=1)).requires_grad_(False)
    torch.nn.init.normal_(made.residual[-2].weight, std=0.05)
    return made


def test_an_image_that_the_generator_can_make_is_found_again(generator: Purifier) -> None:
    made = decoded(generator, torch.rand(2, 3, 8, 8, generator=torch.manual_seed(1)))
    again = project(generator, made, steps=300, smoothness=0)
    before = (decoded(generator, torch.nn.functional.avg_pool2d(made, 2)) - made).abs().mean()
    assert (again - made).abs().mean() < 0.2 * before


def test_fine_noise_finds_no_place_in_the_latent(generator: Purifier) -> None:
    x = to_float(blobs(4, size=16).image)
    noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.manual_seed(2))).clamp(0, 1)
    assert (project(generator, noisy) - x).square().mean() < 0.5 * (noisy - x).square().mean()


def test_what_is_hidden_is_filled_in_from_around_it(generator: Purifier) -> None:
    x = to_float(blobs(1, size=16).image)
    stuck = x.clone()
    stuck[..., 4:10, 4:10] = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    visible = torch.ones(16, 16)
    visible[4:10, 4:10] = 0
    hole = (..., slice(4, 10), slice(4, 10))
    filled = project(generator, stuck, visible=visible)
    assert (filled - x)[hole].abs().mean() < 0.4 * (stuck - x)[hole].abs().mean()
    other = stuck.clone()
    other[hole] = 0.3  # what is hidden plays no part
    torch.testing.assert_close(project(generator, other, visible=visible), filled)


def test_nothing_to_look_at_is_refused(generator: Purifier) -> None:
    with pytest.raises(ValueError, match="the whole picture is hidden"):
        project(generator, torch.rand(1, 3, 8, 8), visible=torch.zeros(8, 8))
