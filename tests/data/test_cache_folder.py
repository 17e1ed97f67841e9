"""`ddpm-hf cache`: what is on the disk, and what may go."""

import os
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images

DAY = 86400


@pytest.fixture
def load(tmp_path):
    """Loads a folder of images, as a run does."""

    def load(name):
        config = TrainConfig(train_data_dir=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), resolution=8)
        return load_images(config, show_progress=False)

    return load


@pytest.fixture
def cached(load, tmp_path):
    """Makes a folder of images and their cache, which is returned."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(4):
            Image.new("L", (8, 8), i).save(folder / f"{i}.png")
        root = tmp_path / "cache" / "decoded_images"
        before = set(root.glob("*"))
        load(name)
        (made,) = set(root.glob("*")) - before
        return made

    return make


@pytest.fixture
def lines(tmp_path, capsys):
    """Runs the command; returns what it prints."""

    def run(*options):
        main(["cache", "--cache_dir", str(tmp_path / "cache"), *options])
        return capsys.readouterr().out.splitlines()

    return run


def unused_for(days, folder):
    for file in folder.iterdir():
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - days * DAY))


def make_partial(folder):
    """As a killed run leaves it."""
    (folder / "cache.json").rename(folder / "progress-1.json")


def test_caches_are_listed_with_what_they_are_of(cached, load, lines):
    assert lines()[0].startswith("0 caches")
    cats, dogs = cached("cats"), cached("dogs")
    make_partial(dogs)
    unused_for(400, cats)
    first, second, total = lines()
    assert " partial " in first
    assert "dogs: 4 images, 8×8 RGB" in first
    assert first.endswith(str(dogs))
    assert " complete " in second
    assert str(cats) in second
    assert total.startswith("2 caches of decoded images in ")
    load("cats")
    assert str(cats) in lines()[0]  # it was used now


def test_incomplete_caches_are_removed_and_others_stay(cached, lines):
    cats, dogs = cached("cats"), cached("dogs")
    make_partial(dogs)
    assert lines("--prune")[0].startswith("Removed: ")
    assert not dogs.exists()
    assert lines("--prune") == [f"0 bytes freed in {cats.parent}."]
    assert cats.exists()
    assert (Path(cats.parents[2]) / "dogs").is_dir()  # the images themselves


def test_caches_that_were_not_used_for_long_are_removed(cached, lines):
    cats, dogs = cached("cats"), cached("dogs")
    unused_for(31, cats)
    assert len(lines("--prune", "--older_than", "30")) == 2
    assert not cats.exists()
    assert dogs.exists()
    assert len(lines("--prune", "--older_than", "0")) == 2
    assert not dogs.exists()


def test_what_a_run_uses_stays(cached, load, lines):
    cats = cached("cats")
    images = load("cats")
    assert lines("--prune", "--older_than", "0")[0].startswith("In use, kept: ")
    assert images.pixels[:, 0, 0, 0].tolist() == list(range(4))
    del images
    make_partial(cats)
    with FileLock(cats / "lock"):  # a run that builds it
        assert lines("--prune")[0].startswith("In use, kept: ")
    assert lines("--prune")[0].startswith("Removed: ")
    assert not cats.exists()


def test_nothing_else_is_ever_removed(cached, lines, tmp_path):
    cats = cached("cats")
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "cache.json").write_text("{}")
    root = cats.parent
    (root / "0123456789abcdef01234567").symlink_to(outside, target_is_directory=True)
    (root / "notes").mkdir()
    (cats / "mine.txt").write_text("mine")
    (cats / "pixels-link.bin").symlink_to(outside / "cache.json")
    lines("--prune", "--older_than", "0")
    assert (outside / "cache.json").exists()
    assert (root / "notes").is_dir()
    assert [p.name for p in cats.iterdir()] == ["mine.txt"]


def test_days_without_prune_are_refused(lines):
    with pytest.raises(SystemExit, match="--prune"):
        lines("--older_than", "30")
