import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import blobs
from command import run
from PIL import Image

from rampart.hardening.model.images import Images
from rampart.hardening.train import changes
from rampart.hardening.train.data import find_pictures, load
from rampart.hardening.train.loop import Recipe, different
from rampart.hardening.train.stages import stages
from rampart.sources import Source


def pictures(folder: Path, count: int) -> Path:
    for number, image in enumerate(blobs(count, size=16).image.numpy()):
        file = folder / "ab"[number % 2] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


def test_pictures_that_are_new_missing_or_changed_are_named(tmp_path: Path) -> None:
    home = pictures(tmp_path / "data", 6)
    for read in (lambda: load(home, size=16), lambda: find_pictures(home, size=16)):
        changes.note(tmp_path / "run", [read()])
        assert changes.since(tmp_path / "run", [read()]) == ""
        assert changes.since(tmp_path / "none", [read()]) == ""
        (home / "a" / "000.png").rename(home / "a" / "999.png")
        Image.new("RGB", (90, 90)).save(home / "b" / "001.png")
        said = changes.since(tmp_path / "run", [read()])
        assert (
            said == "1 new (data/a/999.png), 1 missing (data/a/000.png), 1 changed (data/b/001.png)"
        )
        shutil.rmtree(home)
        pictures(home, 6)


def test_images_without_names_are_told_apart_by_their_pixels() -> None:
    more = blobs(9)
    five = more[slice(5)]
    old, new = (changes.listing([images]) for images in (five, more))
    assert changes.in_words(old, new).startswith("4 new (")
    assert changes.in_words(new, old).startswith("4 missing (")
    moved = Images(five.image, (five.label + 1) % 10, five.classes)
    assert changes.in_words(old, changes.listing([moved])).startswith("5 changed (")
    assert changes.in_words(old, changes.listing([five[torch.arange(4, -1, -1)]])) == ""


def test_settings_that_differ_are_named() -> None:
    old, new = (repr((Recipe(epochs=epochs), "abc")) for epochs in (3, 4))
    assert different(old, new) == "epochs 3, now 4"
    norm = repr((Recipe(threat=Recipe().threat._replace(norm="L2", eps=0.5)), "abc"))
    assert "norm 'Linf', now 'L2'" in different(old, norm)
    assert different(old, old) == "its weights or images are others"


def test_a_stage_that_is_begun_anew_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(**inputs: object) -> str:
        with stages(tmp_path, 1) as job:
            job.once("train", inputs, Path.is_dir)
        return capsys.readouterr().out

    few = blobs(6)
    assert "anew" not in once(images=few[slice(4)], held=few[slice(4, 5)], epochs=3)
    said = once(images=few[slice(4)], held=few[slice(4, 6)], epochs=3)
    assert "with other images: 1 new (" in said and "run the same command to resume it" in said
    # The same images, drawn otherwise: none is new or missing.
    said = once(images=few[slice(1, 5)], held=few[torch.tensor([0, 5])], epochs=4)
    assert "with other epochs, held, images;" in said


@pytest.mark.slow
@pytest.mark.training
def test_a_run_with_one_picture_more_says_which_and_goes_on_without_it(tmp_path: Path) -> None:
    home = pictures(tmp_path / "data", 90)
    net = ["--arch", "resnet10", "--width", 0.125, "--image-size", 16, "--device", "cpu"]
    command = ["train", "--data", home, "--out", tmp_path / "run", *net, "--epochs"]
    run(*command, 1)
    extra = home / "a" / "extra.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(extra)
    Source._read.cache_clear()  # as another process begins
    with pytest.raises(ValueError, match=r"began: 1 new \(data/a/extra\.png\)\. Restore"):
        run(*command, 1)
    extra.unlink()
    Source._read.cache_clear()
    assert "continuing" in run(*command, 1)
    with pytest.raises(ValueError, match=r"other settings or images \(epochs 1, now 2\)"):
        run(*command, 2)
