"""Processes that decode the pictures of a large folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from PIL import Image

from rampart.hardening.train import data, decoding
from rampart.hardening.train.data import Folder, find_pictures


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """24 pictures that processes decode; the name of one is no ASCII."""
    monkeypatch.setattr(data, "ENOUGH", 0)
    monkeypatch.setattr(data, "threads", lambda: 2)
    for index, image in enumerate(blobs(24).image.numpy()):
        home = tmp_path / "pictures" / f"{index % 2}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(home / ("ä b.png" if index == 3 else f"{index}.png"))
    return find_pictures(tmp_path / "pictures", size=32).stored(tmp_path / "run")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[str]"]:
    """The processes that decode."""
    every: list[subprocess.Popen[str]] = []
    start = decoding.Decoders.started

    def kept(decoders: decoding.Decoders) -> "subprocess.Popen[str]":
        every.append(start(decoders))
        return every[-1]

    monkeypatch.setattr(decoding.Decoders, "started", kept)
    return every


def pixels(folder: Folder) -> torch.Tensor:
    rows = torch.arange(len(folder)).split(5)
    return torch.cat([image for image, _ in folder.read(rows)])


def test_processes_give_the_pixels_that_this_one_gives_and_decode_once(
    folder: Folder, started: list["subprocess.Popen[str]"]
) -> None:
    expected = [decoding.read_picture(file, 32) for file in folder.files]
    for _ in range(2):
        assert np.array_equal(pixels(folder), np.stack(expected))
    assert len(started) == 2  # one a thread, in the first pass alone
    assert all(process.poll() == 0 for process in started)


def test_a_picture_that_cannot_be_read_is_named_as_ever(
    folder: Folder, started: list["subprocess.Popen[str]"]
) -> None:
    bad = folder.files[20]
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError) as own:
        decoding.read_picture(bad, 32)
    with pytest.raises(ValueError) as theirs:
        pixels(folder)
    assert str(theirs.value) == str(own.value) and bad.name in str(own.value)
    assert all(process.poll() is not None for process in started)


def test_a_killed_process_is_told_with_the_picture(
    folder: Folder, started: list["subprocess.Popen[str]"]
) -> None:
    assert folder.store
    decoders = decoding.Decoders(folder.store, 32)
    decoders.decode(0, folder.files[0])
    started[0].kill()
    started[0].wait()
    with pytest.raises(ValueError, match=r"1\.png: the process that decodes pictures has ended"):
        decoders.decode(12, folder.files[12])
    decoders.close()


def test_a_process_that_decodes_needs_no_torch() -> None:
    code = f"import sys, {decoding.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
