import pytest
import torch
from torchvision.models import get_model

from rampart.hardening.model.classifier import ARCHITECTURES, Classifier, ClassifierConfig

FAMILIES = ("resnet50", "vgg11_bn", "alexnet", "googlenet", "squeezenet1_1", "timm:resnet10t")


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


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_gives_features_and_logits_of_small_images(arch: str) -> None:
    net = Classifier(ClassifierConfig(arch, 7)).eval()
    x = torch.rand(2, 3, 32, 32)
    features = net.embed(x)
    assert features.shape == (2, net.feature_size)
    torch.testing.assert_close(net.head(features), net(x))
    assert net(x).shape == (2, 7)


@pytest.mark.parametrize("arch", ["vgg11", "alexnet", "googlenet", "squeezenet1_1"])
def test_large_images_go_through_torchvisions_own_network(arch: str) -> None:
    options = {"init_weights": True, "aux_logits": False} if arch == "googlenet" else {}
    with torch.device("meta"):
        ours = Classifier(ClassifierConfig(arch, 10, image_size=224))
        theirs = get_model(arch, num_classes=10, **options)
    shapes = sorted(tuple(p.shape) for p in ours.parameters())
    assert shapes == sorted(tuple(p.shape) for p in theirs.parameters())


@pytest.mark.parametrize(("arch", "size"), [("resnet50", 32), ("vgg11", 32), ("vgg11_bn", 96)])
def test_width_scales_every_layer_but_the_last(arch: str, size: int) -> None:
    with torch.device("meta"):
        full = Classifier(ClassifierConfig(arch, 10, 1.0, size))
    half = Classifier(ClassifierConfig(arch, 10, 0.5, size)).eval()
    assert half(torch.rand(1, 3, size, size)).shape == (1, 10)
    assert half.feature_size * 2 == full.feature_size
    ratio = sum(p.numel() for p in half.parameters()) / sum(p.numel() for p in full.parameters())
    assert 0.24 < ratio < 0.27


def test_a_network_that_has_no_width_says_so() -> None:
    with pytest.raises(ValueError, match=r"alexnet has no --width"):
        Classifier(ClassifierConfig("alexnet", 10, width=0.5))


def test_googlenets_auxiliary_heads_speak_in_training_and_are_gone_in_inference() -> None:
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig("googlenet", 10), auxiliary=True)
    for module in net.modules():  # dropout would tell two passes apart
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x = torch.rand(2, 3, 32, 32)
    main, second, first = net.backbone((x - net.mean) / net.std)
    for found, expected in zip(net.all_logits(x), (net.head(main), second, first), strict=True):
        torch.testing.assert_close(found, expected)
    assert len(net.eval().all_logits(x)) == 1
    assert net.eval()(x).shape == (2, 10)
    names = Classifier(ClassifierConfig("googlenet", 10)).state_dict()
    assert set(net.state_dict()) - set(names)
    assert not [name for name in names if "aux" in name]


def test_an_unknown_architecture_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"resnet19.*resnet10, resnet18"):
        Classifier(ClassifierConfig("resnet19", 10))
    with pytest.raises(ValueError, match=r"timm knows no 'resnt'"):
        Classifier(ClassifierConfig("timm:resnt", 10))


def test_the_architectures_are_torchvisions_names() -> None:
    with torch.device("meta"):
        for arch in set(ARCHITECTURES) - {"resnet10"}:
            assert get_model(
                arch,
                weights=None,
                num_classes=2,
                **{"init_weights": True} if arch == "googlenet" else {},
            )


@pytest.mark.parametrize("arch", ["resnet18", "vgg11_bn", "alexnet", "squeezenet1_1"])
def test_silu_takes_the_place_of_every_relu_and_no_weight_changes(arch: str) -> None:
    nets = []
    for activation in ("relu", "silu"):
        torch.manual_seed(0)
        nets.append(Classifier(ClassifierConfig(arch, 10, activation=activation)).eval())
    kinds = [[type(layer) for layer in net.modules()] for net in nets]
    assert kinds[1] == [torch.nn.SiLU if kind is torch.nn.ReLU else kind for kind in kinds[0]]
    assert kinds[0] != kinds[1]
    both = zip(nets[0].state_dict().items(), nets[1].state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in both)


@pytest.mark.parametrize(
    ("arch", "activation", "words"),
    [
        ("googlenet", "silu", "googlenet keeps its own activations"),
        ("timm:resnet10t", "silu", "timm:resnet10t keeps its own activations"),
        ("resnet18", "gelu", "--activation gelu: choose one of relu, silu"),
    ],
)
def test_an_activation_that_a_network_cannot_have_is_refused(
    arch: str, activation: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Classifier(ClassifierConfig(arch, 10, activation=activation))


def test_what_stands_for_weights_names_an_activation_other_than_relu() -> None:
    config = ClassifierConfig("resnet18", 10)
    assert "activation" not in repr(config)
    assert repr(config._replace(activation="silu")).endswith("rectified=False, activation='silu')")
