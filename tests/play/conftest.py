"""A playground of the tiny model, with an undefended twin beside it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playing import Playground, playing


@pytest.fixture(scope="session")
def twinned(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of the tiny model beside that of a network without a defence."""
    import torch

    from rampart.hardening.model import pipeline as pipelines
    from rampart.hardening.model.classifier import Classifier, ClassifierConfig
    from rampart.hardening.train.data import CIFAR10_CLASSES

    store = tmp_path_factory.mktemp("store")
    folder = Path(shutil.copytree(tiny_folder, store / "tiny"))
    torch.manual_seed(1)
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125)).eval()
    bare = pipelines.DefendedClassifier(net, None, ("confidence",))
    pipelines.save(store / "tiny-undefended" / "weights.safetensors", bare, CIFAR10_CLASSES)
    return folder


@pytest.fixture(scope="session")
def playground(twinned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """One for all tests that leave it at work."""
    log = tmp_path_factory.mktemp("playground") / "log"
    with playing(twinned, log=log) as one:
        yield one
        assert one.end() == 0
    assert log.read_text() == ""
