"""Playgrounds of tiny models, each with an undefended twin beside it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Pipe, chromium
from playing import Playground, playing


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipe]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as one:
        yield one


@pytest.fixture(scope="session")
def twinned(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of the tiny model beside that of a network without a defence."""
    import torch

    from rampart.hardening.model import pipeline as pipelines
    from rampart.hardening.model.classifier import Classifier, ClassifierConfig
    from rampart.hardening.train import cifar10

    store = tmp_path_factory.mktemp("store")
    folder = Path(shutil.copytree(tiny_folder, store / "tiny"))
    torch.manual_seed(1)
    net = Classifier(ClassifierConfig("resnet10", 10, width=0.125)).eval()
    bare = pipelines.DefendedClassifier(net, None, ("confidence",))
    pipelines.save(store / "tiny-undefended" / "weights.safetensors", bare, cifar10.CLASSES)
    return folder


@pytest.fixture(scope="session")
def playground(twinned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """One for all tests that leave it at work."""
    log = tmp_path_factory.mktemp("playground") / "log"
    with playing(twinned, log=log) as one:
        yield one
        assert one.end() == 0
    assert log.read_text() == ""


@pytest.fixture(scope="session")
def twinned_scenes(tmp_path_factory: pytest.TempPathFactory, scene_folder: Path) -> Path:
    """The folder of an object detector with a sample and the variant guarded, and beside it itself
    as its twin.
    """
    import numpy as np
    from drawn import boxed, objects, picture

    from rampart.scenes import SceneModel, drawn, write_sample

    store = tmp_path_factory.mktemp("scenes")
    folder = Path(shutil.copytree(scene_folder, store / "drawn"))
    shutil.copytree(scene_folder, store / "drawn-undefended")
    model = SceneModel.load(folder)
    model.rank("guarded", drawn(boxed(80, seed=1).image, model.classes))
    draws = np.random.default_rng(5)
    write_sample(picture(draws, 96, 80, objects(draws, 80, 3)), folder / "sample.png")
    return folder


@pytest.fixture(scope="session")
def scene_playground(
    twinned_scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Playground]:
    """One for all tests that leave it at work."""
    log = tmp_path_factory.mktemp("playground") / "log"
    with playing(twinned_scenes, log=log, name="drawn") as one:
        yield one
        assert one.end() == 0
    assert log.read_text() == ""
