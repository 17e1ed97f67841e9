"""Image files: names, modes and sizes come back; what the model can't hold is refused, naming the file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_hf.codec.pictures import (
    Picture,
    assemble,
    check_names,
    count_tiles,
    cut,
    describe_pictures,
    format_of,
    read_picture,
    read_pictures,
    to_image,
)

RNG = np.random.default_rng(0)


def save(folder, name, mode="L", size=(8, 6), **options):
    array = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(array).convert(mode)
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(
    ("name", "mode", "channels"),
    [
        ("a.png", "L", 1), ("a.png", "1", 1), ("a.png", "RGB", 3), ("a.png", "L", 3), ("a.png", "1", 3),
        ("a.bmp", "RGB", 3), ("a.tif", "L", 1), ("a.ppm", "RGB", 3), ("a.pgm", "L", 1), ("A.PNG", "RGB", 3),
    ],
)  # fmt: skip
def test_mode_and_pixels_and_format_come_back(tmp_path, name, mode, channels):
    file = save(tmp_path, name, mode)
    picture, pixels = read_picture(file, channels)
    assert pixels.shape == (channels, 6, 8)
    assert picture == Picture(name, mode, (8, 6))
    to_image(picture, pixels).save(tmp_path / f"again-{name}", format=format_of(file))
    with Image.open(file) as before, Image.open(tmp_path / f"again-{name}") as after:
        assert (before.mode, before.format) == (after.mode, after.format)
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_jpegs_become_pngs_of_their_pixels(tmp_path):
    picture, pixels = read_picture(save(tmp_path, "photo.jpg", "RGB"), 3)
    assert picture.name == "photo.png"
    with Image.open(tmp_path / "photo.jpg") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels.transpose(1, 2, 0))


def test_a_picture_is_upright(tmp_path):
    file = save(tmp_path, "photo.jpg", "RGB", exif=Image.Exif())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    with Image.open(file) as image:
        image.save(file, exif=exif)
    assert read_picture(file, 3)[0].size == (6, 8)


@pytest.mark.parametrize(
    ("mode", "channels", "says"),
    [
        ("RGB", 1, "mode 'RGB'.*convert it to gray"),
        ("RGBA", 3, "transparent pixels.*convert it to RGB"),
        ("I;16", 3, "mode 'I;16'.*8 bits"),
        ("P", 3, "mode 'P'.*convert it to RGB"),
        ("LA", 1, "transparent pixels"),
    ],
)
def test_other_modes_are_refused_with_the_remedy(tmp_path, mode, channels, says):
    file = tmp_path / "picture.png"
    (Image.new("I;16", (8, 6)) if mode == "I;16" else Image.new(mode, (8, 6))).save(file)
    with pytest.raises(ValueError, match=says) as error:
        read_picture(file, channels)
    assert "picture.png" in str(error.value)


def test_damaged_files_and_animations_are_named(tmp_path):
    whole = save(tmp_path, "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("half.png", "text.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            read_picture(tmp_path / name, 1)
    frames = [Image.new("L", (8, 6), shade) for shade in (0, 200)]
    frames[0].save(tmp_path / "moving.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="moving.tif' has 2 frames"):
        read_picture(tmp_path / "moving.tif", 1)


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    files = [save(tmp_path, "a.png"), save(tmp_path / "b", "A.jpg")]
    pictures = [read_picture(file, 1)[0] for file in files]
    with pytest.raises(ValueError, match="A.png.*rename one"):
        check_names(files, pictures)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 8), (17, 30), (3, 25)])
def test_tiles_are_put_together_again(size):
    pixels = RNG.integers(0, 256, (3, size[1], size[0]), np.uint8)
    tiles = cut(pixels, (8, 8))
    assert len(tiles) == count_tiles(size, (8, 8))
    assert {tile.shape for tile in tiles} == {(3, 8, 8)}
    np.testing.assert_array_equal(assemble(np.stack(tiles), size), pixels)


def test_edges_are_repeated():
    (tile,) = cut(np.array([[[1, 2]]], np.uint8), (2, 4))
    assert tile.tolist() == [[[1, 2, 2, 2], [1, 2, 2, 2]]]


NAMES = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(st.lists(NAMES, min_size=1, unique_by=str.casefold))
def test_any_names_come_back(names):
    pictures = [Picture(name, "L", (3, 4)) for name in names]
    assert read_pictures(describe_pictures(pictures), 1) == pictures


def test_names_that_count_take_no_room():
    names = [f"img_{i:05}.png" for i in range(1000)] + ["b9.png", "b10.png", "b11.png", "x", "07", "08"]
    pictures = [Picture(name, "L" if i % 300 else "1", (3, 4)) for i, name in enumerate(names)]
    described = describe_pictures(pictures)
    assert read_pictures(described, 1) == pictures
    assert len(str(described)) < 400


@pytest.mark.parametrize(
    "damage",
    [
        {"names": ["../a"]}, {"names": [".."]}, {"names": ["/etc/x"]}, {"names": ["a\\b"]}, {"names": ["a\0"]},
        {"names": [""]}, {"names": ["a", "b"]}, {"names": None}, {"names": [["a", 0, 10**9, "", 1]]}, {"names": [3]},
        {"names": [["a", 0, 3, "", 10**12]]}, {"names": [["../", 0, 3, "", 1]]}, {"modes": [[1, "RGB"]]},
        {"modes": [[1, 7]]}, {"sizes": [[1, [8]]]}, {"sizes": [[1, [0, 8]]]}, {"sizes": [[1, [10**9, 8]]]},
        {"sizes": [[1, "ab"]]}, {"sizes": 3}, {"names": []},
    ],
)  # fmt: skip
def test_a_hostile_list_of_images_is_refused(damage):
    sound = {"names": ["a"], "modes": [[1, "L"]], "sizes": [[1, [8, 8]]]}
    assert len(read_pictures(sound, 1)) == 1
    with pytest.raises(ValueError, match="damaged|no name of a file|image of|empty"):
        read_pictures(sound | damage, 1)
