"""A tiny real pipeline (untrained weights, real calibration) that the whole suite shares."""

import os
from pathlib import Path

import pytest
import torch
from blobs import Learned, blobs, learn_blobs

from export.archive import archive
from export.to_onnx import to_onnx
from handlers.verdict import Calibration
from hardening import calibrate
from hardening import pipeline as pipelines
from hardening.data import Images, split
from hardening.detectors import FULL
from hardening.models import Classifier, ClassifierConfig
from hardening.pipeline import DefendedClassifier
from hardening.purifier import Purifier, PurifierConfig


@pytest.fixture(scope="session")
def tiny_images() -> Images:
    return blobs(600)


@pytest.fixture(scope="session")
def learned() -> Learned:
    return learn_blobs()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_images: Images) -> Path:
    """A model folder as model_store holds them: weights, both calibrations, a card."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model_store") / "tiny"
    classifier = Classifier(ClassifierConfig("resnet10", 10, width=0.125))
    purifier = Purifier(PurifierConfig(width=8, depth=1))
    torch.nn.init.normal_(purifier.residual[-2].weight, std=0.05)
    full = DefendedClassifier(classifier, purifier, FULL).eval().requires_grad_(False)
    full.detectors.feature_distance.fit(classifier, split(tiny_images, "validation"))
    pipelines.save(folder / "weights.safetensors", full, tiny_images.classes)
    for variant in ("full", "lean"):
        pipeline, _ = pipelines.load(folder / "weights.safetensors", variant)
        calibrate.write(folder, calibrate.calibrate(pipeline, tiny_images, variant), "blobs")
    (folder / "card.json").write_text('{"model": "tiny", "metrics": []}')
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> DefendedClassifier:
    return pipelines.load(tiny_folder / "weights.safetensors", "full")[0]


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: DefendedClassifier) -> Path:
    """The graph of the full variant, alone in its folder, since an export takes seconds."""
    return to_onnx(tiny_pipeline, tmp_path_factory.mktemp("graph") / "graph.onnx")


@pytest.fixture(scope="session")
def tiny_calibration(tiny_folder: Path) -> Calibration:
    """That of the full variant."""
    return calibrate.load_variant(tiny_folder, "full")


@pytest.fixture(scope="session")
def tiny_archive(tiny_folder: Path) -> Path:
    """tiny.mar, variant full: 32x32, ten classes."""
    out = tiny_folder.parent / "tiny.mar"
    archive(tiny_folder, out)
    return out


@pytest.fixture(scope="session")
def rampart_data() -> Path:
    """The folder of CIFAR-10 files that RAMPART_DATA names."""
    if "RAMPART_DATA" not in os.environ:
        pytest.skip("RAMPART_DATA is unset: it names the folder of the CIFAR-10 files")
    return Path(os.environ["RAMPART_DATA"])
