"""Images of every kind become what the network takes, in an order that is a function of progress."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import DIGITS, run, train_command

from ddpm_hf.config import parse_train_config
from ddpm_hf.data import Images, load_images, prepare_image, to_uint8, to_unit_range


def test_the_stream_shows_each_image_once_per_epoch_in_new_orders():
    images = Images(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), "numbers")

    def stream(first, size):
        return to_uint8(images.batch(first, size, seed=0)).flatten().tolist()

    epochs = [stream(10 * e, 10) for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    endless = [*epochs[0], *epochs[1], *epochs[2]]
    assert stream(0, 30) == endless
    assert stream(7, 8) == endless[7:15]
    assert images.batch(0, 10, seed=1).flatten().tolist() != images.batch(0, 10, seed=0).flatten().tolist()


def test_pixels_map_to_plus_minus_one_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_unit_range(pixels)
    assert x[0] == -1
    assert x[255] == 1
    assert torch.equal(to_uint8(x), pixels)


def test_the_digits_are_scikit_learns():
    config = parse_train_config([], DIGITS)
    images = load_images(config, show_progress=False)
    assert images.pixels.shape == (1797, 1, 16, 16)
    from sklearn.datasets import load_digits

    pooled = torch.nn.functional.avg_pool2d(images.pixels[:, 0].double(), 2)
    correlation = np.corrcoef(pooled.flatten(), load_digits().images.ravel())[0, 1]
    assert correlation > 0.98  # 8×8 scans, only enlarged


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("CMYK", 3), ("LA", 1)])
def test_every_mode_becomes_what_the_network_takes(mode, channels):
    array = prepare_image(Image.new("RGB", (20, 10), (200, 100, 50)).convert(mode), 8, channels, None)
    assert array.shape == (channels, 8, 8)
    assert array.dtype == np.uint8
    if channels == 3 and mode != "L":
        assert np.abs(array[:, 4, 4].astype(int) - [200, 100, 50]).max() < 30


def test_flips_are_mirror_images_of_half_the_batch():
    pixels = torch.arange(64 * 4, dtype=torch.uint8).reshape(64, 1, 2, 2)
    images = Images(pixels, "numbers")
    torch.manual_seed(0)
    plain, flipped = images.batch(0, 64, seed=0), images.batch(0, 64, seed=0, flip=True)
    is_flipped = (flipped == plain.flip(-1)).flatten(1).all(1)
    is_plain = (flipped == plain).flatten(1).all(1)
    assert (is_flipped ^ is_plain).all()
    assert 16 < int(is_flipped.sum()) < 48


def test_crops_are_central_or_anywhere():
    gradient = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (10, 1)))
    assert prepare_image(gradient, 10, 1, None)[0, 0, 0] == 15
    rng = np.random.default_rng(0)
    starts = {int(prepare_image(gradient, 10, 1, rng)[0, 0, 0]) for _ in range(300)}
    assert starts == set(range(31))


def test_sixteen_bit_images_are_scaled_not_cut_off():
    image = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert (prepare_image(image, 8, 1, None) == 128).all()
    image = Image.fromarray(np.full((8, 8), 32768, np.int32))
    assert (prepare_image(image, 8, 1, None) == 128).all()
    with pytest.raises(ValueError, match="floating-point"):
        prepare_image(Image.fromarray(np.zeros((8, 8), np.float32)), 8, 1, None)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (16, 8))
    image.paste(255, (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90° to see it upright
    image.save(tmp_path / "i.jpg", exif=exif, quality=95)
    upright = prepare_image(Image.open(tmp_path / "i.jpg"), 8, 1, None)[0]
    assert upright[0].mean() > 200  # the white half is on top


@pytest.mark.slow
def test_a_folder_of_images_trains(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (12 + i, 20, 3), np.uint8)).save(folder / f"{i}.png")
    options = ["--train_data_dir", str(folder.parent), "--resolution", "8", "--channels", "3", "--max_train_steps", "2"]
    command = train_command(tmp_path / "out", *options, "--cache_dir", str(tmp_path / "cache"))
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "5 images" in done.stdout
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
