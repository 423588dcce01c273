"""A tiny real pipeline (untrained weights, real calibration) that the whole suite shares.

Its servers are in servers.py.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from features import pytest_addoption, pytest_configure, tell  # noqa: F401
from servers import encode, launch, pixels, redis, repack, server, unpacked, wait_gone  # noqa: F401

# Fixtures import what needs torch themselves: xdist's controller reads this file and runs no test.
if TYPE_CHECKING:
    from blobs import Learned

    from rampart.handlers.verdict import Calibration
    from rampart.hardening.model.images import Images
    from rampart.hardening.model.pipeline import DefendedClassifier
    from rampart.hardening.objects.detector import ObjectDetector
    from rampart.scenes import SceneModel

# Fixtures that start one, wherever they are used.
SERVERS = {"door", "launch", "redis", "server", "target"}
# Fixtures that train a network to attack.
TRAINED = {"learned", "learned_objects", "scene_folder"}
# Files in which most tests train, attack, export or run a whole command for seconds.
TRAINING = {
    "test_ablation.py",
    "test_alarms.py",
    "test_changes.py",
    "test_checks.py",
    "test_convergence.py",
    "test_distributed.py",
    "test_elastic.py",
    "test_evaluate.py",
    "test_extension.py",
    "test_gradients.py",
    "test_methods.py",
    "test_methods_bench.py",
    "test_models.py",
    "test_object_attack.py",
    "test_object_detectors.py",
    "test_object_purifier.py",
    "test_object_training.py",
    "test_onnx_study.py",
    "test_onnx_table.py",
    "test_outside.py",
    "test_page.py",
    "test_parity.py",
    "test_precision.py",
    "test_preflight.py",
    "test_purification.py",
    "test_purifier.py",
    "test_quantize.py",
    "test_redteam.py",
    "test_rungs.py",
    "test_scene_graphs.py",
    "test_stages.py",
    "test_strangers.py",
    "test_to_tensorrt.py",
    "test_to_triton.py",
    "test_train.py",
    "test_triton_server.py",
    "test_victims.py",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files that only train alone where nothing of them is to run: imports take seconds."""
    left_out = "not training" in config.getoption("markexpr")
    return True if left_out and collection_path.name in TRAINING else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out, and let files that have some of it go first.

    A long file that begins last leaves the other core idle.
    """
    if not items:
        return
    long = set()
    for item in items:
        tell(item)
        fixtures = set(getattr(item, "fixturenames", ()))
        if SERVERS & fixtures:
            item.add_marker("server")
        if item.path.name in TRAINING or TRAINED & fixtures:
            item.add_marker("training")
        if any(item.iter_markers("server")) or any(item.iter_markers("training")):
            long.add(item.path)
    items.sort(key=lambda item: item.path not in long)
    if "not training" in items[0].config.getoption("markexpr"):
        # One process exports the graph while others do what needs none, and not wait for it.
        graph = [i.path for i in items if "tiny_shipped" in getattr(i, "fixturenames", ())]
        items.sort(key=lambda item: item.path in graph and item.path != graph[0])
        items.sort(key=lambda item: item.path not in graph[:1])


@pytest.fixture(scope="session")
def tiny_images() -> "Images":
    from blobs import blobs

    return blobs(600)


@pytest.fixture(scope="session")
def learned() -> "Learned":
    from blobs import learn_blobs

    return learn_blobs()


@pytest.fixture(scope="session")
def learned_objects() -> "ObjectDetector":
    from found import learn_objects

    return learn_objects()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_images: "Images") -> Path:
    """A model folder as model_store holds them: weights, both calibrations, a card."""
    import torch

    from rampart.hardening.model import calibrate
    from rampart.hardening.model import pipeline as pipelines
    from rampart.hardening.model.classifier import Classifier, ClassifierConfig
    from rampart.hardening.model.detectors import FULL
    from rampart.hardening.model.images import split
    from rampart.hardening.model.purifier import BlockPurifier, BlockPurifierConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model_store") / "tiny"
    classifier = Classifier(ClassifierConfig("resnet10", 10, width=0.125))
    purifier = BlockPurifier(BlockPurifierConfig(width=8, blocks=1))
    torch.nn.init.normal_(purifier.residual[-2].weight, std=0.05)
    full = pipelines.DefendedClassifier(classifier, purifier, FULL).eval().requires_grad_(False)
    full.detectors.fit(classifier, split(tiny_images, "validation"))
    pipelines.save(folder / "weights.safetensors", full, tiny_images.classes)
    for variant in ("full", "lean"):
        pipeline, _ = pipelines.load(folder / "weights.safetensors", variant)
        calibrate.write(folder, calibrate.calibrate(pipeline, tiny_images, variant), "blobs")
    (folder / "card.json").write_text('{"model": "tiny", "metrics": []}')
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> "DefendedClassifier":
    from rampart.hardening.model import pipeline as pipelines

    return pipelines.load(tiny_folder / "weights.safetensors", "full")[0]


@pytest.fixture(scope="session")
def tiny_shipped(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, worker_id: str
) -> Path:
    """The same model folder with the graphs of both variants: packing it exports nothing."""
    from filelock import FileLock

    from rampart.export.build import ship

    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent  # of all workers: one exports
    folder = shared / "shipped" / "tiny"
    with FileLock(shared / "shipped.lock"):
        if not folder.is_dir():
            part = Path(shutil.copytree(tiny_folder, folder.with_name("part")))
            for variant in ("full", "lean"):
                ship(part, variant)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory, tiny_shipped: Path) -> Path:
    """The graph of the full variant, alone in its folder."""
    folder = tmp_path_factory.mktemp("graph")
    return Path(shutil.copy(tiny_shipped / "graph-full.onnx", folder / "graph.onnx"))


@pytest.fixture(scope="session")
def tiny_calibration(tiny_folder: Path) -> "Calibration":
    """That of the full variant."""
    from rampart.hardening.model import calibrate

    return calibrate.load_variant(tiny_folder, "full")


@pytest.fixture(scope="session")
def tiny_archive(tiny_folder: Path, tiny_shipped: Path) -> Path:
    """tiny.mar, variant full: 32x32, ten classes. Beside it is the folder without graphs."""
    from rampart.export.archive import archive

    out = tiny_folder.parent / "tiny.mar"
    archive(tiny_shipped, out)
    return out


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A model folder of an object detector that learned discs and squares for seconds, with the
    graph of its lean variant.
    """
    from drawn import boxed
    from filelock import FileLock
    from found import learn_objects

    from rampart.export.build import ship
    from rampart.scenes import SceneModel

    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent  # of all workers: one trains
    folder = shared / "scenes" / "drawn"
    with FileLock(shared / "scenes.lock"):
        if not folder.is_dir():
            others = boxed(200, seed=1).image
            model = SceneModel.calibrate(learn_objects(), others, name="drawn", data="drawn")
            part = model.save(folder.with_name("part") / "drawn")
            ship(part, "lean")
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def scenes(scene_folder: Path) -> "SceneModel":
    from rampart.scenes import SceneModel

    return SceneModel.load(scene_folder)


@pytest.fixture(scope="session")
def scene_archive(scene_folder: Path) -> Path:
    """drawn.mar, variant lean: 128x128, discs and squares."""
    from rampart.export.archive import archive

    out = scene_folder.parent / "drawn.mar"
    if not out.is_file():
        archive(scene_folder, out, variant="lean", settings={"rampart": {"min_confidence": 0.1}})
    return out


@pytest.fixture(scope="session")
def rampart_data() -> Path:
    """The folder of CIFAR-10 files that RAMPART_DATA names."""
    if "RAMPART_DATA" not in os.environ:
        pytest.skip("RAMPART_DATA is unset: it names the folder of the CIFAR-10 files")
    return Path(os.environ["RAMPART_DATA"])


@pytest.fixture(scope="session")
def rampart_schemas() -> Path:
    """The folder of operators' definitions that RAMPART_SCHEMAS names, a YAML each."""
    if "RAMPART_SCHEMAS" not in os.environ:
        pytest.skip("RAMPART_SCHEMAS is unset: it names the folder of operators' definitions")
    return Path(os.environ["RAMPART_SCHEMAS"])


@pytest.fixture
def lean_only(tmp_path: Path, tiny_folder: Path) -> Path:
    """A model folder without the full variant, and beside it held.npz to measure it on."""
    from blobs import blobs

    from rampart.hardening.report import card as report

    model = tmp_path / "bare"
    shutil.copytree(tiny_folder, model, ignore=shutil.ignore_patterns("calibration-full.json"))
    card = {"model": "bare", "data": "blobs", "training": {}, "calibration_images": 100}
    net = {"arch": "resnet10", "classes": 10, "width": 0.125, "image_size": 32}
    report.write_card(model, card | {"classifier": net, "commands": []})
    images = blobs(600)
    np.savez(tmp_path / "held", image=images.image, label=images.label, classes=images.classes)
    return model
