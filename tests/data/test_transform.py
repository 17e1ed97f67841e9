"""One image: every mode, depth and orientation becomes what the network takes, and damage is named."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.config.training import IMAGE_MODES
from ddpm_hf.data.transform import Transform, Unreadable, decode, prepare_image

COLOR = (200, 100, 50)
GRAY = 124  # its luma by ITU-R 601


def encoded(image, format, **options):
    stream = BytesIO()
    image.save(stream, format, **options)
    return {"bytes": stream.getvalue(), "path": f"picture.{format}"}


def in_mode(mode):
    """A plain image of COLOR, or of GRAY where the mode has no colors."""
    if mode == "I;16":
        return Image.fromarray(np.full((10, 20), GRAY * 257, np.uint16))
    if mode == "I":
        return Image.fromarray(np.full((10, 20), GRAY * 257, np.int32))
    if mode == "F":
        return Image.fromarray(np.full((10, 20), GRAY / 255, np.float32))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(Image.new("RGB", (20, 10), COLOR), *profiles, outputMode="LAB")
    image = Image.new("RGB", (20, 10), COLOR)
    return image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("wanted", IMAGE_MODES)
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
@pytest.mark.parametrize("keep_16_bits", [False, True])
def test_every_mode_becomes_what_the_network_takes(mode, wanted, keep_16_bits):
    array = prepare_image(in_mode(mode), Transform(8, wanted, keep_16_bits=keep_16_bits))
    assert array.shape == (IMAGE_MODES[wanted], 8, 8)
    assert array.dtype == (np.uint16 if keep_16_bits else np.uint8)
    has_color = mode not in ("L", "LA", "I;16", "I", "F")
    expected = [*(COLOR if wanted.startswith("RGB") and has_color else [GRAY] * (3 if "R" in wanted else 1))]
    expected += [255] if wanted.endswith("A") else []
    unit = 257 if keep_16_bits else 1
    assert np.abs(array.transpose(1, 2, 0) / unit - expected).max() <= 2


def test_black_and_white_images_stay_so():
    image = Image.new("1", (8, 8), 1)
    image.paste(0, (0, 0, 4, 8))
    array = prepare_image(image, Transform(8, "L"))[0]
    assert (array[:, :4] == 0).all()
    assert (array[:, 4:] == 255).all()


# --- transparency ----------------------------------------------------------------------------------------------------


def half_transparent():
    """Left half opaque red, right half fully transparent, with green hidden under it."""
    image = Image.new("RGBA", (16, 16), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 16))
    return image


@pytest.mark.parametrize("file", ["RGBA.png", "P.png", "RGBA.gif", "RGB.png"])
def test_transparent_parts_become_white_or_stay_transparent(file):
    mode, format = file.split(".")
    image, options = half_transparent(), {}
    if mode == "P":
        image = image.quantize(4)
    if mode == "RGB":
        image, options = image.convert("RGB"), {"transparency": (0, 255, 0)}
    raw = encoded(image, format, **options)
    flat = decode(0, raw, Transform(16, "RGB"))
    assert flat[:, 8, 2].tolist() == [255, 0, 0]
    assert flat[:, 8, 13].tolist() == [255, 255, 255]
    kept = decode(0, raw, Transform(16, "RGBA"))
    assert kept[3, 8, [2, 13]].tolist() == [255, 0]
    assert decode(0, raw, Transform(16, "LA"))[1, 8, [2, 13]].tolist() == [255, 0]


def test_hidden_colors_do_not_bleed_into_visible_ones():
    for size in (5, 7):
        red, green, _, alpha = prepare_image(half_transparent(), Transform(size, "RGBA"))
        assert (green[alpha > 0] == 0).all()
        assert (red[alpha > 0] > 250).all()
        assert ((alpha > 0) & (alpha < 255)).any()


# --- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_kept_or_scaled_but_not_clipped(format):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257 + 100
    levels[-1, -1] = 65535
    raw = encoded(Image.fromarray(levels), format)
    kept = decode(0, raw, Transform(16, "L", keep_16_bits=True))
    np.testing.assert_array_equal(kept[0], levels)
    scaled = decode(0, raw, Transform(16, "L"))
    np.testing.assert_array_equal(scaled[0], (levels / 257).round())


def test_sixteen_bits_survive_resizing():
    ramp = np.tile(np.linspace(20000, 21000, 64).astype(np.uint16), (64, 1))  # four levels of 8 bits
    array = prepare_image(Image.fromarray(ramp), Transform(32, "RGB", keep_16_bits=True))
    assert len(np.unique(array)) == 32
    np.testing.assert_allclose(array[0, 5, 2:-2], ramp.reshape(64, 32, 2).mean(2)[5, 2:-2], atol=2)
    assert (array == array[0]).all()


def test_eight_bits_fill_the_range_of_sixteen():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    array = prepare_image(Image.fromarray(values), Transform(16, "L", keep_16_bits=True))
    np.testing.assert_array_equal(array[0], values.astype(int) * 257)


def test_integers_of_32_bits_are_read_by_the_range_that_they_fill():
    for top, unit in ((255, 1), (65535, 257)):
        image = Image.fromarray(np.array([[0, top], [top, 0]], np.int32))
        assert prepare_image(image, Transform(2, "L")).tolist() == [[[0, 255], [255, 0]]]
        assert unit * 255 == top


@pytest.mark.parametrize("value", [70000, -1, 1.5, -0.1, np.nan])
def test_numbers_of_unknown_range_are_refused(value):
    values = np.zeros((8, 8), np.float32 if isinstance(value, float) else np.int32)
    values[3, 3] = value
    with pytest.raises(ValueError, match=r"must lie in \[0, \d+\]"):
        prepare_image(Image.fromarray(values), Transform(8, "L"))


# --- geometry --------------------------------------------------------------------------------------------------------


def test_crops_are_central_or_anywhere_and_fixed_per_image():
    gradient = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (10, 1)))
    for image in (gradient, gradient.transpose(Image.Transpose.TRANSPOSE)):
        assert prepare_image(image, Transform(10, "L"))[0, 0, 0] == 15
        starts = [int(prepare_image(image, Transform(10, "L", crop_seed=0), i)[0, 0, 0]) for i in range(300)]
        assert set(starts) == set(range(31))
        again = [int(prepare_image(image, Transform(10, "L", crop_seed=0), i)[0, 0, 0]) for i in range(300)]
        other = [int(prepare_image(image, Transform(10, "L", crop_seed=1), i)[0, 0, 0]) for i in range(300)]
        assert starts == again != other


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((8, 8), np.uint8)
    upright[:2], upright[:, :2] = 120, 240  # no two of the eight orientations look the same
    back = {1: 0, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    back |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    image = Image.fromarray(upright)
    stored = image if orientation == 1 else image.transpose(Image.Transpose[back[orientation]])
    exif = stored.getexif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(0, encoded(stored, "PNG", exif=exif), Transform(8, "L"))[0], upright)


@pytest.mark.parametrize("resize", ["bicubic", "lanczos"])
def test_shrinking_averages_what_nearest_pixels_would_alias(resize):
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    array = prepare_image(Image.fromarray(stripes), Transform(8, "L", resize))
    assert np.abs(array[:, :, 1:-1].astype(int) - 127).max() < 8


def test_one_pixel_is_enlarged():
    assert (prepare_image(Image.new("RGB", (1, 1), COLOR), Transform(8, "RGB")) == np.reshape(COLOR, (3, 1, 1))).all()


# --- files -----------------------------------------------------------------------------------------------------------


def test_cmyk_jpegs_and_first_frames_of_animations():
    assert np.abs(decode(0, encoded(in_mode("CMYK"), "JPEG"), Transform(8, "RGB"))[:, 4, 4] - np.array(COLOR)).max() < 4
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (250, 0)]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        raw = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert decode(0, raw, Transform(8, "RGB"))[0, 4, 4] == 250


def test_damaged_images_are_named_with_the_reason(tmp_path, monkeypatch):
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    rows = {
        "truncated": {**whole, "bytes": whole["bytes"][:500]},
        "not an image in a format": {**whole, "bytes": b"just text"},
        "that Pillow reads": {**whole, "bytes": b""},
        "holds no image": None,
        "No such file": {"bytes": None, "path": str(tmp_path / "none.png")},
    }
    for i, (reason, raw) in enumerate(rows.items()):
        bad = decode(i, raw, Transform(8, "L"))
        assert isinstance(bad, Unreadable)
        assert (bad.index, bad.path) == (i, raw["path"] if raw else None)
        assert reason in bad.reason
        message = str(bad.error("pictures"))
        assert f"image {i} (from 0) of pictures" in message
        assert "--on_bad_image skip" in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)  # Pillow refuses twice as many
    assert "bomb" in decode(0, whole, Transform(8, "L")).reason
