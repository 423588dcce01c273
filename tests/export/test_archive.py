import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rampart.export.archive import archive
from rampart.hardening.model.files import CAPTION, SAMPLES
from rampart.launch.sample import ANY, Sample, samples_of


def test_the_archive_holds_what_serving_needs_and_nothing_else(tiny_archive: Path) -> None:
    with zipfile.ZipFile(tiny_archive) as mar:
        names = {name for name in mar.namelist() if not name.endswith("/")}
    assert names == {
        "MAR-INF/MANIFEST.json",
        "calibration.json",
        "card.json",
        "defended.py",
        "graph.onnx",
        "rampart/__init__.py",
        "rampart/handlers/__init__.py",
        "rampart/handlers/budget.py",
        "rampart/handlers/containers.py",
        "rampart/handlers/contents.py",
        "rampart/handlers/cores.py",
        "rampart/handlers/defended.py",
        "rampart/handlers/engine.py",
        "rampart/handlers/errors.py",
        "rampart/handlers/explanation.py",
        "rampart/handlers/hand_over.py",
        "rampart/handlers/image.py",
        "rampart/handlers/plan.py",
        "rampart/handlers/private_folder.py",
        "rampart/handlers/protocols/__init__.py",
        "rampart/handlers/protocols/choice.py",
        "rampart/handlers/protocols/content_encoding.py",
        "rampart/handlers/protocols/kserve_v1.py",
        "rampart/handlers/protocols/open_inference.py",
        "rampart/handlers/quarantine.py",
        "rampart/handlers/queries/__init__.py",
        "rampart/handlers/queries/lookup.py",
        "rampart/handlers/queries/stores.py",
        "rampart/handlers/queries/watch.py",
        "rampart/handlers/scenes.py",
        "rampart/handlers/service.py",
        "rampart/handlers/settings.py",
        "rampart/handlers/summary.py",
        "rampart/handlers/tasks.py",
        "rampart/handlers/telemetry.py",
        "rampart/handlers/triton.py",
        "rampart/handlers/types.py",
        "rampart/handlers/verdict.py",
        "rampart/handlers/wire.py",
        "labels.json",
        "model-config.yaml",
        "sha256.json",
    }


def test_every_file_has_its_hash_beside_it(tiny_archive: Path) -> None:
    with zipfile.ZipFile(tiny_archive) as mar:
        hashes = json.loads(mar.read("sha256.json"))
        assert set(hashes) == set(mar.namelist()) - {"sha256.json"}
        for name, digest in hashes.items():
            assert hashlib.sha256(mar.read(name)).hexdigest() == digest, name
        card = json.loads(mar.read("card.json"))
    assert card["sha256"]["graph.onnx"] == hashes["graph.onnx"]
    assert len(card["sha256"]["weights.safetensors"]) == 64
    assert card["variant"] == "full"


def test_policy_and_flow_are_in_the_model_yaml(tiny_shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "strict.mar"
    settings = {"batchSize": 4, "rampart": {"false_alarm_rate": 0.05, "on_detection": "reject"}}
    archive(tiny_shipped, out, variant="lean", settings=settings)
    with zipfile.ZipFile(out) as mar:
        config = yaml.safe_load(mar.read("model-config.yaml"))
        calibration = json.loads(mar.read("calibration.json"))
    assert config["batchSize"] == 4
    assert config["maxBatchDelay"] == 1
    assert config["rampart"] == {
        "false_alarm_rate": 0.05,
        "on_detection": "reject",
        "on_failure": "closed",
        "detail": "full",
    }
    assert calibration["detectors"] == ["confidence", "feature_distance", "residual"]


def test_sample_pictures_go_along_with_their_hashes_unless_they_are_left_out(
    tiny_shipped: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_shipped, tmp_path / "mine")
    for name in SAMPLES:
        shutil.copy(ANY.file, folder / name)
    described = PngInfo()
    described.add_text(CAPTION, "a sign\x1b[2J, attacked")
    Image.open(ANY.file).save(folder / SAMPLES[1], pnginfo=described)
    for name, sample in (("with.mar", True), ("without.mar", False)):
        archive(folder, tmp_path / name, sample=sample)
        with zipfile.ZipFile(tmp_path / name) as mar:
            hashes = json.loads(mar.read("sha256.json"))
            for picture in SAMPLES:
                assert (picture in mar.namelist()) == (picture in hashes) == sample
    unpacked = tmp_path / "unpacked"
    assert samples_of(tmp_path / "without.mar", unpacked) == [ANY]
    # What a caption would do to a terminal is left out.
    captions = ["", "a sign[2J, attacked", ""]
    assert samples_of(tmp_path / "with.mar", unpacked) == [
        Sample(unpacked / name, caption) for name, caption in zip(SAMPLES, captions, strict=True)
    ]
    assert all((unpacked / name).read_bytes() == (folder / name).read_bytes() for name in SAMPLES)


@pytest.mark.parametrize("content", [b"<html>", b"\x89PNG" + bytes(70_000)])
def test_what_is_no_small_picture_is_not_taken_for_a_sample(tmp_path: Path, content: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.mar", "w") as packed:
        packed.writestr("sample.png", content)
    assert samples_of(tmp_path / "a.mar", tmp_path / "unpacked") == [ANY]
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        ("a.zip", {}, r"end in \.mar"),
        ("a,b.mar", {}, "letters, digits"),
        ("my model.mar", {}, "letters, digits"),
        ("a.mar", {"false_alarm_rate": 1e-6}, "cannot support a false_alarm_rate"),
        ("a.mar", {"on_detection": "drop"}, "flag, reject or shadow"),
    ],
)
def test_what_the_server_would_refuse_is_refused_before_packing(
    tiny_folder: Path, tmp_path: Path, name: str, policy: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        archive(tiny_folder, tmp_path / name, settings={"rampart": policy})
    assert not list(tmp_path.iterdir())


def test_a_folder_without_weights_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rampart train"):
        archive(tmp_path / "nothing", tmp_path / "a.mar")


def test_a_folder_of_the_models_name_among_temporary_files_is_left_alone(
    tiny_shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch-model-archiver works in $TMPDIR/NAME, and empties it first."""
    mine = tmp_path / "temporary" / "a" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    monkeypatch.setenv("TMPDIR", str(mine.parent.parent))
    archive(tiny_shipped, tmp_path / "a.mar", variant="lean")
    assert mine.read_text() == "years of work"
