import pytest
import torch

from hardening.models import Classifier, ClassifierConfig


def test_the_half_width_resnet18_has_2_8_million_parameters() -> None:
    net = Classifier(ClassifierConfig("resnet18", 10, width=0.5))
    assert sum(p.numel() for p in net.parameters()) == 2_797_610


def test_the_full_resnet18_is_torchvisions_but_for_the_stem() -> None:
    net = Classifier(ClassifierConfig("resnet18", 1000))
    # 11,689,512 is torchvision's count; a 3x3 stem has 40 * 3 * 64 weights fewer than a 7x7 one.
    assert sum(p.numel() for p in net.parameters()) == 11_689_512 - 40 * 3 * 64


@pytest.mark.parametrize(("size", "cells"), [(32, 4), (64, 8), (128, 4), (224, 7)])
def test_small_images_keep_their_resolution_in_the_stem(size: int, cells: int) -> None:
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125, image_size=size))
    shapes = []
    net.backbone.layer4.register_forward_hook(lambda *a: shapes.append(a[2].shape[-1]))
    assert net(torch.rand(2, 3, size, size)).shape == (2, 10)
    assert shapes == [cells]


def test_normalization_is_inside() -> None:
    config = ClassifierConfig("resnet10", 10, width=0.125)
    torch.manual_seed(0)
    net = Classifier(config).eval()
    grey = torch.tensor(config.mean).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(net.embed(grey), net.backbone(torch.zeros(1, 3, 32, 32)))


def test_an_unknown_architecture_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"resnet19.*resnet10, resnet18"):
        Classifier(ClassifierConfig("resnet19", 10))
