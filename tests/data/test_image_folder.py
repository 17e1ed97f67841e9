"""A folder of somebody's photographs: what is taken, what is left out, and that the user hears of it."""

import pytest
from PIL import Image, features

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.sources import open_source


def save(file, shade=0, format=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, format)


def source(folder, **options):
    return open_source(TrainConfig(train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), **options))


@pytest.mark.parametrize("name", ["photos [2024]", "what?", "a*b", "{x}"])
def test_a_path_is_no_pattern(tmp_path, name):
    save(tmp_path / name / "a.png")
    assert len(source(tmp_path / name)) == 1


def test_what_pillow_reads_is_taken_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "photos"
    for i, kind in enumerate(["png", "JPG", "webp", "tiff", "bmp"]):
        save(folder / f"{i}.{kind}")
    if features.check("avif"):
        save(folder / "5.avif")
    save(folder / "IMG_0001", format="PNG")  # without an extension
    (folder / "notes.txt").write_text("words")
    (folder / "movie.heic").write_bytes(b"no picture that Pillow knows")
    (folder / ".hidden.png").write_bytes(b"")
    found = source(folder)
    assert len(found) == 6 + features.check("avif")
    (note,) = found.notes
    assert note.startswith("Ignored: 2 files that are not images (")
    assert ".txt" in note
    assert ".heic" in note
    images = load_images(TrainConfig(train_data_dir=str(folder), resolution=8, cache_dir=str(tmp_path / "c")), found)
    assert len(images) == len(found)


def test_a_folder_with_splits_stands_for_its_training_set(tmp_path):
    for split in ("train", "test"):
        for i in range(3):
            save(tmp_path / "data" / split / f"{i}.png")
    found = source(tmp_path / "data")
    assert len(found) == 3
    assert "Only" in found.notes[0]
    save(tmp_path / "other" / "train" / "a.png")  # a class called train
    save(tmp_path / "other" / "tram" / "b.png")
    assert len(source(tmp_path / "other")) == 2


def test_a_metadata_file_leaves_no_image_out_in_silence(tmp_path):
    folder = tmp_path / "data"
    for i in range(5):
        save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,kind\n0.png,cat\n1.png,dog\n2.png,cat\n")
    assert len(source(folder)) == 5
    found = source(folder, label_column="kind")
    assert len(found) == 3
    assert found.label_names == ["cat", "dog"]
    assert "2 images that" in found.notes[0]


def test_classes_are_the_names_of_the_folders(tmp_path):
    for kind in ("cat", "dog"):
        save(tmp_path / "data" / kind / "a.png")
        save(tmp_path / "data" / kind / "b.png")
    found = source(tmp_path / "data", label_column="label")
    assert (found.label_names, found.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1])


def write_captions(folder):
    for i in range(4):
        save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(4)))


def test_captions_are_no_classes(tmp_path):
    write_captions(tmp_path / "data")
    with pytest.raises(ValueError, match="`label_column` is 'text', but each of the 4 images has a label of its own"):
        source(tmp_path / "data", label_column="text")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda d: None, {"train_data_dir": "data"}, "no images can be read from .*: the folder has no files"),
        (lambda d: (d / "a.txt").write_text(""), {"train_data_dir": "data"}, r"1 file of another kind \(.txt\)"),
        (lambda d: (d / "l").symlink_to("."), {"train_data_dir": "data"}, r"no files. Not followed: 1 link.*data.l$"),
        (lambda d: None, {"dataset_name": "data/*.parquet"}, "no file matches it in"),
        (lambda d: (d / "p.zip").write_bytes(b"PK"), {"dataset_name": "data/p.zip"}, "archive: unpack it, and pass"),
    ],
)  # fmt: skip
def test_what_was_found_and_what_to_type(tmp_path, monkeypatch, make, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        open_source(TrainConfig(**options))


def test_a_table_of_bytes_says_which_column_to_name(tmp_path):
    import pandas as pd

    save(tmp_path / "a.png")
    pd.DataFrame({"picture": [(tmp_path / "a.png").read_bytes()], "id": [1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"the columns are picture \(binary\), id \(int64\): pass --image_column"):
        open_source(TrainConfig(dataset_name=str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "c")))
    options = {"image_column": "picture", "cache_dir": str(tmp_path / "c")}
    assert len(open_source(TrainConfig(dataset_name=str(tmp_path / "t.parquet"), **options))) == 1
