"""A plan is refused unless its record vouches for it; a real one runs where TensorRT does."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rampart.handlers.contents import PLAN, load_engine
from rampart.handlers.engine import Engine, EngineError
from rampart.handlers.plan import check_record, record_file
from rampart.hardening.model.images import Images


@pytest.fixture
def packed(tmp_path: Path, unpacked: Path) -> Path:
    """An unpacked archive with something in the plan's place, and its record."""
    for name in ("graph.onnx", "card.json"):
        shutil.copy(unpacked / name, tmp_path)
    (tmp_path / PLAN).write_bytes(b"a plan")
    digests = {
        "sha256": hashlib.sha256(b"a plan").hexdigest(),
        "graph_sha256": hashlib.sha256((tmp_path / "graph.onnx").read_bytes()).hexdigest(),
    }
    record = digests | {"tensorrt": "10.16.0", "parity": "parity on 96 images"}
    record_file(tmp_path / PLAN).write_text(json.dumps(record))
    return tmp_path


def test_a_record_of_these_very_files_is_accepted(packed: Path) -> None:
    assert check_record(packed / PLAN, packed / "graph.onnx")["tensorrt"] == "10.16.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, r"graph\.plan is not the file"),
        ({"graph_sha256": "0" * 64}, r"graph\.onnx is not the file"),
        ({"parity": ""}, "records no parity run"),
    ],
)
def test_a_plan_that_nothing_vouches_for_is_refused(
    packed: Path, change: dict[str, str], message: str
) -> None:
    file = record_file(packed / PLAN)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(EngineError, match=message):
        load_engine(packed, "plan", 1, 0)
    file.unlink()
    with pytest.raises(EngineError, match=r"no readable graph\.plan\.json: build it with"):
        load_engine(packed, "plan", 1, 0)


def test_a_missing_plan_names_the_command_that_packs_one(unpacked: Path) -> None:
    with pytest.raises(EngineError, match=r"no graph\.plan: `rampart archive --plan`"):
        load_engine(unpacked, "plan", 1, 0)


def test_auto_falls_back_to_the_graph_and_says_so(
    packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = record_file(packed / PLAN)
    file.write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert load_engine(packed, "auto", 1, 0).device in ("cpu", "cuda")
    assert "Running the graph and not its plan: graph.plan is not the file" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "plan"])
def test_an_int8_archive_is_for_the_cpu_that_it_was_measured_on(packed: Path, device: str) -> None:
    (packed / "card.json").write_text('{"precision": "int8"}')
    with pytest.raises(EngineError, match=f"int8 archive is for CPUs, not {device}: .* fp32"):
        load_engine(packed, device, 1, 0)
    assert load_engine(packed, "auto", 1, 0).device == "cpu"


def test_an_fp16_archive_is_not_for_the_provider_that_would_halve_its_scores(packed: Path) -> None:
    (packed / "card.json").write_text('{"precision": "fp16"}')
    with pytest.raises(EngineError, match=r"compute its scores in fp16 too: .* --device cuda"):
        load_engine(packed, "tensorrt", 1, 0)
    assert load_engine(packed, "cpu", 1, 0).device == "cpu"


def test_a_real_plan_decides_as_the_graph_does(
    tiny_folder: Path, tiny_images: Images, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt", reason="needs TensorRT")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from rampart.export.archive import export_variant
    from rampart.export.to_tensorrt import to_tensorrt
    from rampart.handlers.plan import PlanEngine

    to_tensorrt(tiny_folder, tmp_path / PLAN, variant="full")
    export_variant(tiny_folder, "full", tmp_path / "graph.onnx")
    image = tiny_images.image[:70].numpy()  # more than the plan takes at once
    ours = PlanEngine(tmp_path / PLAN, tmp_path / "graph.onnx").run(image)
    theirs = Engine(tmp_path / "graph.onnx").run(image)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(ours.logits.argmax(1), theirs.logits.argmax(1))
