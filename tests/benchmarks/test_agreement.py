import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import agreement

from rampart.export.archive import archive
from rampart.hardening.model.images import Images


@pytest.mark.slow
@pytest.mark.server
def test_the_endpoint_answers_as_the_torch_pipeline_on_every_image(
    tmp_path: Path,
    tiny_archive: Path,
    tiny_images: Images,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = tiny_images[slice(-60, None)]
    np.savez(tmp_path / "test.npz", image=few.image.numpy(), label=few.label.numpy())
    command = ["agreement", "--data", tmp_path / "test.npz"]
    command += ["--model", tiny_archive.with_suffix("")]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    agreement.main()
    said = capsys.readouterr().out
    assert "same label as the torch pipeline: 60 of 60" in said
    assert "clean images flagged: " in said


@pytest.mark.slow
def test_an_archive_says_of_every_image_what_an_older_one_said(
    tmp_path: Path,
    tiny_shipped: Path,
    tiny_archive: Path,
    tiny_images: Images,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = tiny_images[slice(-60, None)]
    np.savez(tmp_path / "test.npz", image=few.image.numpy(), label=few.label.numpy())
    archive(tiny_shipped, tmp_path / "lean.mar", variant="lean")
    for before, code in ((tiny_archive, 0), (tmp_path / "lean.mar", 1)):
        command = ["agreement", "--data", tmp_path / "test.npz"]
        command += ["--model", tiny_archive.with_suffix(""), "--before", before]
        monkeypatch.setattr("sys.argv", [str(word) for word in command])
        assert agreement.main() == code
        assert ("same p-value: 60 of 60" in capsys.readouterr().out) == (code == 0)
