"""A strip and an animation between two photographs, by the closed-form network and an untrained one."""

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.config.restoration import InterpolateConfig
from ddpm_hf.restoration.strip import interpolate_photos
from support.models import tiny_unet
from support.oracle import oracle_pipeline
from support.runs import run


def photo(file, seed, height=8, width=8):
    pixels = np.random.default_rng(seed).integers(64, 192, size=(height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def strip_of(pipe, folder, a, b, **options):
    config = InterpolateConfig(output_dir=str(folder / "out"), **options)
    return interpolate_photos(pipe, a, b, config, show_progress=False)


def test_the_strip_begins_and_ends_with_the_photographs_and_the_animation_returns(tmp_path):
    a, b = photo(tmp_path / "a.png", 0), photo(tmp_path / "b.png", 1)
    strip = np.asarray(Image.open(strip_of(oracle_pipeline(0.3), tmp_path, a, b, num_images=4)))
    assert strip.shape == (48, 4 * 48)  # 8×8, enlarged to be seen
    for file, part in ((a, strip[:, :48]), (b, strip[:, -48:])):
        expected = np.asarray(Image.open(file)).repeat(6, 0).repeat(6, 1)
        assert np.abs(part.astype(int) - expected).max() <= 1
    with Image.open(tmp_path / "out" / "a-b.gif") as animation:
        assert animation.n_frames == 6
        assert animation.size == (48, 48)


def test_a_wide_photograph_shows_its_middle(tmp_path):
    a, b = photo(tmp_path / "a.png", 0, 8, 14), photo(tmp_path / "b.png", 1, 16, 16)
    strip = np.asarray(Image.open(strip_of(oracle_pipeline(0.3), tmp_path, a, b, num_images=2)))
    expected = np.asarray(Image.open(a))[:, 3:11].repeat(6, 0).repeat(6, 1)
    assert np.abs(strip[:, :48].astype(int) - expected).max() <= 1


def test_a_strip_that_is_there_is_not_made_again_and_other_settings_are_refused(tmp_path):
    a, b = photo(tmp_path / "a.png", 0), photo(tmp_path / "b.png", 1)
    pipe = oracle_pipeline(0.3)
    first = strip_of(pipe, tmp_path, a, b, timestep=50)
    before = first.read_bytes()
    pipe.unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    assert strip_of(pipe, tmp_path, a, b, timestep=50).read_bytes() == before
    with pytest.raises(ValueError, match="was made otherwise: `timestep` was 50 and is 60"):
        strip_of(pipe, tmp_path, a, b, timestep=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 1}, "`num_images` is 1, but must be at least 2"),
        ({"timestep": 1000}, "`timestep` is 1000, but must be an integer from 0 to 999"),
        ({"guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
        ({}, "'.*bad.png' can't be used: it is not an image"),
    ],
)
def test_bad_input_is_named_before_the_network_is_called(options, message, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    a = photo(tmp_path / "a.png", 0)
    pipe = oracle_pipeline(0.3)
    pipe.unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        strip_of(pipe, tmp_path, a, a if options else tmp_path / "bad.png", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_writes_both_files(tmp_path):
    DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    a, b = photo(tmp_path / "a.png", 0), photo(tmp_path / "b.png", 1)
    done = run([
        "python", "-m", "ddpm_hf", "interpolate", str(tmp_path / "model"), str(a), str(b), "--steps", "3",
        "--timestep", "500", "--num_inference_steps", "4", "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "out").glob("a-b.*")} == {"a-b.gif", "a-b.png"}
