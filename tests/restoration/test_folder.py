"""Files of photographs: what stays untouched, what is made again, and what is reported; with untrained networks."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.config.restoration import EditConfig, RestoreConfig
from ddpm_hf.restoration.folder import edit_photos, restore_photos
from ddpm_hf.restoration.methods import METHODS
from ddpm_hf.restoration.operators import Blur, Downsample, Grayscale
from ddpm_hf.restoration.photos import Photo
from ddpm_hf.restoration.tasks import deblurring
from support.models import tiny_unet
from support.runs import run

pytestmark = pytest.mark.filterwarnings("ignore")


def model(channels=3):
    pipe = DDPMPipelineCustom(tiny_unet(channels), DDPMSchedulerCustom())
    pipe.calls = []
    pipe.unet.register_forward_hook(lambda *_: pipe.calls.append(1))
    return pipe


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, channels), dtype=np.uint8)


def save(file, pixels):
    Image.fromarray(pixels.squeeze()).save(file)
    return file


def mask(file, height, width, top=2, left=1, size=3):
    hole = np.zeros((height, width), np.uint8)
    hole[top : top + size, left : left + size] = 255
    return save(file, hole), hole > 0


def restored(pipe, photos, folder, **options):
    config = RestoreConfig(output_dir=str(folder / "out"), **{"num_inference_steps": 2, **options})
    return restore_photos(pipe, photos, config, show_progress=False)


def pixels_of(folder, name="photo.png"):
    return np.asarray(Image.open(folder / "out" / name))


def in_unit_range(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (24, 12), (11, 40)])
def test_outside_of_the_hole_a_photograph_stays_untouched_and_inside_it_is_not_seen(size, tiles, tmp_path):
    pixels = noise(*size, 4)
    drawn, hole = mask(tmp_path / "mask.png", *size)
    outputs = []
    for shade in (0, 255):
        folder = tmp_path / str(shade)
        folder.mkdir()
        pixels[hole, :3] = shade
        photo = save(folder / "photo.png", pixels)
        restored(model(), [photo], folder, mask=str(drawn), tiles=tiles)
        outputs.append(pixels_of(folder))
        np.testing.assert_array_equal(outputs[-1][~hole], pixels[~hole])
        np.testing.assert_array_equal(outputs[-1][..., 3], pixels[..., 3])
    np.testing.assert_array_equal(outputs[0][hole], outputs[1][hole])
    assert (outputs[0][hole][:, :3] != 255).any()
    assert (outputs[0][hole][:, :3] != 0).any()


def test_a_photograph_smaller_than_the_network_is_painted_too(tmp_path):
    drawn, hole = mask(tmp_path / "mask.png", 5, 7)
    photo = save(tmp_path / "photo.png", noise(5, 7))
    restored(model(), [photo], tmp_path, mask=str(drawn))
    np.testing.assert_array_equal(pixels_of(tmp_path)[~hole], noise(5, 7)[~hole])


@pytest.mark.parametrize("size", [(4, 4), (10, 6)])
def test_an_enlarged_photograph_explains_the_small_one(size, tmp_path):
    pixels = noise(*size) // 4 + 96
    restored(model(), [save(tmp_path / "photo.png", pixels)], tmp_path, upscale=2)
    made = in_unit_range(pixels_of(tmp_path))
    assert made.shape[2:] == (2 * size[0], 2 * size[1])
    assert (Downsample(2)(made) - in_unit_range(pixels)).abs().max() <= 1 / 255


def test_a_photograph_that_is_too_small_is_enlarged_further_and_made_smaller(tmp_path):
    restored(model(), [save(tmp_path / "photo.png", noise(3, 5))], tmp_path, upscale=2)
    assert pixels_of(tmp_path).shape == (6, 10, 3)


@pytest.mark.parametrize("size", [(8, 8), (30, 21)])
def test_colors_leave_the_luma_as_it_was(size, tmp_path):
    gray = noise(*size, 1) // 2 + 64
    restored(model(), [save(tmp_path / "photo.png", gray)], tmp_path, colorize=True)
    made = in_unit_range(pixels_of(tmp_path))
    assert (Grayscale()(made) - in_unit_range(gray)).abs().max() <= 1 / 255
    assert made.std(1).mean() > 0.01  # there are colors


def test_a_sharpened_photograph_explains_the_blurred_one_away_from_its_border(tmp_path):
    kernel = Blur(torch.tensor([[1.0, 2, 1], [0, 1, 0], [0, 0, 1]]))
    blurred = kernel(torch.from_numpy((noise(12, 16) // 2 + 64) / 255).permute(2, 0, 1)[None])
    blurred = (blurred[0].permute(1, 2, 0) * 255).round().byte().numpy()
    save(tmp_path / "kernel.png", (kernel.kernel * 6 * 127).round().byte().numpy())
    photo = save(tmp_path / "photo.png", blurred)
    restored(model(), [photo], tmp_path, deblur=str(tmp_path / "kernel.png"), method="diffpir", num_inference_steps=8)
    made = kernel(in_unit_range(pixels_of(tmp_path)))
    inside = np.s_[..., 1:-1, 1:-1]
    left_over = (made - in_unit_range(blurred))[inside].abs().mean()
    assert left_over < 0.3 * (kernel(in_unit_range(blurred)) - in_unit_range(blurred))[inside].abs().mean()


def test_pixels_whose_blur_saw_beyond_the_border_are_not_used():
    kernel = torch.ones(3, 5)
    tasks = [
        deblurring(Photo(torch.from_numpy(noise(12, 16, seed=i)).permute(2, 0, 1)), kernel, (8, 8)) for i in (0, 1)
    ]
    for task in tasks:
        seen = (task.operator(torch.rand(1, 3, 12, 16)) != 0)[0, 0]
        assert seen[1:-1, 2:-2].all()
        assert int(seen.sum()) == 10 * 12
        assert ((task.measurement != 0)[0].any(0) == seen).all()


def test_photographs_of_one_size_with_masks_of_their_own_are_restored_together(tmp_path):
    pipe, photos = model(), [save(tmp_path / f"{name}.png", noise(8, 8, seed=i)) for i, name in enumerate("ab")]
    (tmp_path / "masks").mkdir()
    holes = [mask(tmp_path / "masks" / f"{name}.png", 8, 8, left=i)[1] for i, name in enumerate("ab")]
    summary = restored(pipe, photos, tmp_path, mask=str(tmp_path / "masks"), num_samples=2, method="ddnm")
    assert summary.made == 4
    assert len(pipe.calls) == 2  # K
    for i, (name, hole) in enumerate(zip("ab", holes, strict=True)):
        first, second = pixels_of(tmp_path, f"{name}.png"), pixels_of(tmp_path, f"{name}-1.png")
        np.testing.assert_array_equal(first[~hole], noise(8, 8, seed=i)[~hole])
        std = pixels_of(tmp_path, f"{name}-std.png")
        assert (std[~hole] == 0).all()
        expected = np.stack([first, second]).astype(float).std(0).mean(-1) * 2
        np.testing.assert_allclose(std, expected, atol=0.51)
        assert std[hole].max() > 0
    alone = tmp_path / "alone"
    alone.mkdir()
    restored(model(), photos[1:], alone, mask=str(tmp_path / "masks"), method="ddnm")
    assert np.abs(pixels_of(alone, "b.png").astype(int) - pixels_of(tmp_path, "b.png")).max() <= 1  # by rounding


def test_what_is_there_is_not_made_again_and_what_is_missing_is_made_as_before(tmp_path):
    photos = [save(tmp_path / f"{name}.png", noise(8, 8, seed=i)) for i, name in enumerate("ab")]
    first = restored(model(), photos, tmp_path, upscale=2, num_samples=2, batch_size=1)
    assert (first.made, first.existing) == (4, 0)
    before = pixels_of(tmp_path, "b-1.png")
    (tmp_path / "out" / "b-1.png").unlink()
    pipe = model()
    again = restored(pipe, photos, tmp_path, upscale=2, num_samples=2, batch_size=1)
    assert (again.made, again.existing, len(pipe.calls)) == (1, 3, 2)
    np.testing.assert_array_equal(pixels_of(tmp_path, "b-1.png"), before)
    pipe = model()
    more = restored(pipe, photos, tmp_path, upscale=2, num_samples=3, batch_size=1)
    assert (more.made, more.existing, len(pipe.calls)) == (2, 4, 4)


def test_files_that_can_not_be_read_are_reported_and_the_rest_is_done(tmp_path):
    photos = [save(tmp_path / f"{name}.png", noise(8, 8)) for name in "ab"]
    (tmp_path / "bad.png").write_text("no image")
    small = save(tmp_path / "small.png", noise(4, 4))
    drawn, _ = mask(tmp_path / "mask.png", 8, 8)
    summary = restored(model(), [photos[0], tmp_path / "bad.png", small, photos[1]], tmp_path, mask=str(drawn))
    assert summary.made == 2
    assert set(summary.failures) == {tmp_path / "bad.png", small}
    assert "4×4 pixels, but its mask has 8×8" in summary.failures[small]
    assert (tmp_path / "out" / "b.png").is_file()


def bad_cases(folder):
    photo, other = save(folder / "photo.png", noise(8, 8)), save(folder / "other.png", noise(4, 6))
    save(folder / "gray.png", noise(8, 8, 1))
    (folder / "deeper").mkdir()
    same_name = save(folder / "deeper" / "photo.jpg", noise(8, 8))
    numbered = save(folder / "photo-1.jpg", noise(8, 8))
    (folder / "foreign").mkdir()
    save(folder / "foreign" / "photo.png", noise(8, 8))
    drawn = str(mask(folder / "mask.png", 8, 8)[0])
    return {
        "mask of another size": ([other], {"mask": drawn}, "6×4 pixels, but its mask has 8×8: make them equal"),
        "mask of gray": ([photo], {"mask": str(folder / "gray.png")}, "has gray values"),
        "no mask": ([photo], {"mask": "nowhere.png"}, "`mask` is 'nowhere.png', but there is no such file or folder"),
        "mask of none": ([other], {"mask": str(folder / "deeper")}, "has 0 files named 'other', but needs one"),
        "too small for tiles": ([other], {"colorize": True, "tiles": True}, "6×4 pixels, but the model makes 8×8"),
        "too small to sharpen": ([other], {"deblur": "1"}, "6×4 pixels, but the model makes 8×8"),
        "kernel": ([photo], {"deblur": "nothing.png"}, "`deblur` is 'nothing.png', but must be a positive number or"),
        "kernel too large": ([photo], {"deblur": "3"}, "too few for a kernel of 19×19"),
        "negative blur": ([photo], {"deblur": "-1"}, "`deblur` is -1, but must be a positive number"),
        "one name": ([photo, same_name], {"upscale": 2}, "would both be written to"),
        "a result's name": ([photo, numbered], {"upscale": 2, "num_samples": 2}, "would both be written to"),
        "twice": ([photo, photo], {"upscale": 2}, "would both be written to|given twice"),
        "onto itself": ([photo], {"upscale": 2, "output_dir": str(folder)}, "would be replaced by its result"),
        "foreign": ([photo], {"upscale": 2, "output_dir": str(folder / "foreign")}, "was not made by ddpm-hf"),
        "class": ([photo], {"upscale": 2, "class_label": "1"}, "`class_labels` were given, but the network is uncond"),
        "steps": ([photo], {"upscale": 2, "num_inference_steps": 2000}, "`num_inference_steps` is 2000"),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "mask of another size", "mask of gray", "no mask", "mask of none", "too small for tiles", "too small to sharpen",
    "kernel", "kernel too large", "negative blur", "one name", "a result's name", "twice", "onto itself", "foreign",
    "class", "steps",
])  # fmt: skip
def test_bad_input_is_named_before_the_network_is_called(case, tmp_path):
    photos, options, message = bad_cases(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    pipe = model()
    with pytest.raises(ValueError, match=message):
        restore_photos(pipe, photos, RestoreConfig(**{"output_dir": str(tmp_path / "out"), **options}), False)
    assert pipe.calls == []
    assert sorted(tmp_path.rglob("*")) == before


def test_other_settings_and_another_photograph_of_the_name_are_no_resumption(tmp_path):
    photo = save(tmp_path / "photo.png", noise(8, 8))
    restored(model(), [photo], tmp_path, upscale=2)
    for change in ({"upscale": 4}, {"seed": 1}, {"method": "ddnm"}, {"noise_std": 0.1}, {"num_inference_steps": 3}):
        pipe = model()
        with pytest.raises(ValueError, match="exists, and was made otherwise: `(upscale|seed|method|noise|num_inf)"):
            restored(pipe, [photo], tmp_path, **{"upscale": 2, **change})
        assert pipe.calls == []
    save(tmp_path / "photo.png", noise(8, 8, seed=1))
    with pytest.raises(ValueError, match="was made otherwise: `photo`"):
        restored(model(), [photo], tmp_path, upscale=2)
    other = model()
    torch.nn.init.zeros_(other.unet.conv_out.weight)
    save(tmp_path / "photo.png", noise(8, 8))
    with pytest.raises(ValueError, match="was made otherwise: `weights`"):
        restored(other, [photo], tmp_path, upscale=2)


def test_more_tiles_than_memory_holds_gradients_of_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.restoration.folder.images_in_memory", lambda unet: 16)  # a small machine
    photo = save(tmp_path / "photo.png", noise(8, 64))
    with pytest.raises(ValueError, match=r"takes \d+ tiles.*--method mmps.*memory holds 2: use --method ddnm"):
        restored(model(), [photo], tmp_path, upscale=2)
    assert restored(model(), [photo], tmp_path, upscale=2, method="ddnm").made == 1


@pytest.mark.parametrize("size", [(8, 8), (20, 13)])
def test_an_edited_photograph_has_its_size_and_transparency_and_is_the_nearer_the_weaker(size, tmp_path):
    pixels = noise(*size, 4) // 4 + 96
    photo = save(tmp_path / "photo.png", pixels)
    distances = []
    for strength in (0.02, 0.9):
        out = tmp_path / str(strength)
        edit_photos(model(), [photo], EditConfig(strength=strength, output_dir=str(out), tiles=True), False)
        made = np.asarray(Image.open(out / "photo.png"))
        np.testing.assert_array_equal(made[..., 3], pixels[..., 3])
        distances.append(np.abs(made.astype(int) - pixels).mean())
    assert distances[0] < distances[1] / 2
    assert distances[0] < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass one of --mask FILE.*none of them"),
        ({"mask": "m.png", "upscale": 2}, "this command has --mask and --upscale"),
        ({"upscale": 1}, "`upscale` is 1, but must be at least 2"),
        ({"upscale": 2, "tiles": True}, "--tiles is not needed"),
        ({"upscale": 2, "noise_std": -1.0}, "`noise_std` is -1.0"),
        ({"upscale": 2, "method": "repaint"}, "`method` is 'repaint', but serves --mask only, not --upscale"),
        ({"upscale": 2, "method": "magic"}, "`method` is 'magic', but must be one of"),
        ({"upscale": 2, "num_samples": 0}, "`num_samples` is 0"),
        ({"upscale": 2, "seed": -1}, "`seed` is -1"),
        ({"upscale": 2, "guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RestoreConfig(**options)


def test_a_strength_outside_of_its_range_is_refused():
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match="`strength` is .*, but must lie in"):
            EditConfig(strength=strength)


def test_the_option_names_every_method():
    for method in METHODS:
        RestoreConfig(mask="m.png", method=method)


@pytest.mark.slow
def test_the_commands_restore_and_edit_and_end_with_status_1_if_a_photo_was_left_out(tmp_path):
    model().save_pretrained(tmp_path / "model")
    photo = save(tmp_path / "photo.png", noise(8, 8))
    (tmp_path / "bad.png").write_text("no image")
    drawn, hole = mask(tmp_path / "mask.png", 8, 8)
    command = ["python", "-m", "ddpm_hf"]
    restore = [*command, "restore", str(tmp_path / "model"), str(photo), str(tmp_path / "bad.png"), "--steps", "2"]
    done = run([*restore, "--mask", str(drawn), "--output_dir", str(tmp_path / "out")])
    assert done.returncode == 1
    assert "1 of 2 photos were left out" in done.stderr
    assert "not an image in a format that Pillow reads" in done.stderr
    assert "Traceback" not in done.stderr
    np.testing.assert_array_equal(pixels_of(tmp_path)[~hole], noise(8, 8)[~hole])
    done = run([*command, "edit", str(tmp_path / "model"), str(photo), "--output_dir", str(tmp_path / "edited")])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "edited" / "photo.png").is_file()
