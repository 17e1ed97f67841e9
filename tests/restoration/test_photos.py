"""Photographs: upright, with transparency and EXIF kept; and what can't be read says why."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.restoration.photos import Photo, gray_photo, read_kernel, read_mask, read_photo, read_record, save_photo

ORIENTATION, DESCRIPTION = 0x0112, 0x010E


def noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def turned(pixels, file, **options):
    """A camera that was held sideways: the file has the picture turned, and says so."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[DESCRIPTION] = 6, "a cat"
    Image.fromarray(np.rot90(pixels)).save(file, exif=exif, **options)


def test_a_photograph_of_a_turned_camera_is_upright_and_its_exif_says_so(tmp_path):
    pixels = noise(5, 9, 3)
    turned(pixels, tmp_path / "in.png")
    photo = read_photo(tmp_path / "in.png", 3)
    np.testing.assert_array_equal(photo.pixels.permute(1, 2, 0), pixels)
    save_photo(tmp_path / "out.png", photo.pixels, photo, {})
    with Image.open(tmp_path / "out.png") as saved:
        np.testing.assert_array_equal(saved, pixels)
        assert saved.getexif().get(DESCRIPTION) == "a cat"
        assert saved.getexif().get(ORIENTATION, 1) == 1
    turned(noise(5, 9) // 128 * 255, tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").shape == (5, 9)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_back(mode, tmp_path):
    image = Image.fromarray(noise(6, 7, 4), "RGBA")
    if mode == "P":
        image = image.convert("RGB").quantize(8)
        image.info["transparency"] = 3
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "in.png")
    photo = read_photo(tmp_path / "in.png", 3)
    expected = np.asarray(image.convert("RGBA"))
    np.testing.assert_array_equal(photo.alpha, expected[..., 3])
    save_photo(tmp_path / "out.png", photo.pixels, photo, {})
    np.testing.assert_array_equal(Image.open(tmp_path / "out.png").convert("RGBA"), expected)
    save_photo(tmp_path / "large.png", photo.pixels.repeat(1, 2, 2), photo, {})  # an enlarged one has a larger alpha
    assert Image.open(tmp_path / "large.png").size == (14, 12)


def test_gray_and_color_go_together_where_nothing_is_lost(tmp_path):
    gray = noise(4, 6)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(np.stack([gray] * 3, -1)).save(tmp_path / "gray_as_rgb.png")
    for name in ("gray", "gray_as_rgb"):
        np.testing.assert_array_equal(read_photo(tmp_path / f"{name}.png", 1).pixels[0], gray)
        np.testing.assert_array_equal(read_photo(tmp_path / f"{name}.png", 3).pixels, np.stack([gray] * 3))
    Image.fromarray(noise(4, 6, 3)).save(tmp_path / "color.png")
    with pytest.raises(ValueError, match="it has colors, but the model makes gray images"):
        read_photo(tmp_path / "color.png", 1)
    luma = gray_photo(tmp_path / "color.png").pixels
    np.testing.assert_array_equal(luma[0], Image.open(tmp_path / "color.png").convert("L"))


def test_how_an_image_was_made_is_read_from_it(tmp_path):
    photo = Photo(torch.zeros(1, 4, 4, dtype=torch.uint8))
    save_photo(tmp_path / "x.png", photo.pixels, photo, {"seed": 3, "method": "ddnm"})
    assert read_record(tmp_path / "x.png") == {"seed": 3, "method": "ddnm"}
    Image.new("L", (4, 4)).save(tmp_path / "other.png")
    (tmp_path / "no.png").write_text("no image")
    assert read_record(tmp_path / "other.png") is None
    assert read_record(tmp_path / "no.png") is None


def test_a_kernel_of_sixteen_bits_keeps_them(tmp_path):
    values = np.array([[0, 40000], [3, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "kernel.png")
    np.testing.assert_array_equal(read_kernel(tmp_path / "kernel.png"), values)


def write_bad_files(folder):
    (folder / "text.png").write_text("no image")
    Image.fromarray(noise(64, 64, 3)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:5000])
    Image.fromarray(noise(4, 4).astype(np.uint16) * 200).save(folder / "deep.png")
    Image.fromarray(noise(4, 4)).save(folder / "soft.png")
    Image.new("L", (4, 4)).save(folder / "black.png")


@pytest.mark.parametrize(
    ("read", "name", "message"),
    [
        (lambda f: read_photo(f, 3), "text.png", "not an image in a format that Pillow reads"),
        (lambda f: read_photo(f, 3), "cut.png", "it can't be read"),
        (lambda f: read_photo(f, 3), "missing.png", "it can't be read.*No such file"),
        (lambda f: read_photo(f, 3), "deep.png", "more than 8 bits per channel"),
        (read_mask, "text.png", "its mask '.*text.png' is not an image"),
        (read_mask, "soft.png", r"has gray values, such as \d+, but must be white \(255\).*threshold it"),
        (read_mask, "black.png", "all black"),
    ],
)
def test_what_can_not_be_read_says_why(read, name, message, tmp_path):
    write_bad_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)
