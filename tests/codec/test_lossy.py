"""Progressive files: any prefix is of use, no damage becomes a wrong picture, and the rate is what was ordered."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, calibrate, compress_progressive, decompress
from ddpm_hf.codec.compress import gather
from ddpm_hf.codec.container import read_header
from ddpm_hf.codec.formats import psnr_of, rate_at, rate_formats
from ddpm_hf.codec.lossy import decode_progressive, encode_progressive
from ddpm_hf.codec.lossy_report import Pictures, bound_points, report_page
from ddpm_hf.config.codec import CompressConfig
from support.codec import smooth_images
from support.models import tiny_unet

IMAGES = smooth_images(6)


@pytest.fixture(scope="module")
def calibrated():
    pipeline = DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2"))
    calibrate(pipeline, smooth_images(40, seed=1), show_progress=False)
    return pipeline


@pytest.fixture(scope="module")
def file(calibrated):
    return encode_progressive(calibrated, gather(IMAGES, calibrated), target_psnr=24, num_inference_steps=20)


def pixels_of(received):
    return np.stack([pixels for _, pixels in received.images])


def psnr(received):
    error = np.square(pixels_of(received).astype(float) - IMAGES.numpy()).mean()
    return 10 * np.log10(255**2 / error)


def test_the_receiver_sees_what_the_sender_saw(calibrated, file):
    data, sent = file
    received = decode_progressive(calibrated, data)
    assert (received.steps, received.problem) == (received.steps_sent, None)
    assert psnr(received) == pytest.approx(sent.points[-1].psnr, abs=1e-6)
    assert psnr(received) >= 24 > sent.points[-2].psnr  # no step more than needed
    assert sent.file_bytes == len(data)
    assert 8 * (len(data) - sent.header_bytes - sent.checksum_bytes) - sent.points[-1].bits in range(8)


def test_rounding_of_another_machine_changes_no_picture_by_more_than_a_level(calibrated, file):
    """Other batches, and outputs that differ by 1e-6, stand for it: what the bits mean depends on no output."""
    picture = pixels_of(decode_progressive(calibrated, file[0])).astype(int)
    batches = pixels_of(decode_progressive(calibrated, file[0], batch_size=4))
    assert np.abs(picture - batches).max() <= 1
    hook = calibrated.unet.register_forward_hook(lambda _module, _inputs, output: (output[0] * (1 + 1e-6),))
    try:
        other = pixels_of(decode_progressive(calibrated, file[0]))
    finally:
        hook.remove()
    assert np.abs(picture - other).max() <= 1


def test_any_prefix_decodes_to_the_picture_of_its_rate(calibrated, file):
    data, sent = file
    _, place = read_header(data)
    steps = []
    for length in range(place, len(data), 10):
        received = decode_progressive(calibrated, data[:length])
        assert f"ends at byte {length:,} of {len(data):,}" in received.problem
        assert psnr(received) == pytest.approx(sent.points[received.steps].psnr, abs=1e-6)
        steps.append(received.steps)
        assert sent.points[received.steps].bits <= 8 * (length - place)
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] >= len(sent.points) - 3
    with pytest.raises(ValueError, match="ends at byte"):
        decode_progressive(calibrated, data[: place - 1])


def test_a_flipped_bit_shows_the_picture_before_it_or_is_an_error(calibrated, file):
    data, sent = file
    _, place = read_header(data)
    for byte in range(0, len(data), 23):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << byte // 23 % 8
        if byte < place:
            with pytest.raises(ValueError, match=r"damaged|starts with|version|ends at byte"):
                read_header(bytes(damaged))
            continue
        received = decode_progressive(calibrated, bytes(damaged))
        assert "damaged between bytes" in received.problem
        assert received.steps == decode_progressive(calibrated, data[:byte]).steps
        assert psnr(received) == pytest.approx(sent.points[received.steps].psnr, abs=1e-6)


def test_a_rate_is_kept_and_used(calibrated):
    gathered = gather(IMAGES, calibrated)
    for rate in (6.0, 8.0):
        data, sent = encode_progressive(calibrated, gathered, bits_per_pixel=rate, num_inference_steps=20)
        assert 0.85 * rate < 8 * len(data) / (6 * 64) <= rate
        assert decode_progressive(calibrated, data).steps == len(sent.points) - 1


def test_the_rest_can_be_sampled(calibrated, file):
    data = file[0][: len(file[0]) * 3 // 4]
    picture = pixels_of(decode_progressive(calibrated, data))
    sampled = pixels_of(decode_progressive(calibrated, data, finish=True))
    assert not np.array_equal(picture, sampled)
    assert np.array_equal(sampled, pixels_of(decode_progressive(calibrated, data, finish=True)))
    assert psnr(decode_progressive(calibrated, data)) > psnr(decode_progressive(calibrated, data, finish=True))


def test_what_can_not_be_done_is_an_error_before_or_instead_of_a_file(calibrated):
    gathered = gather(IMAGES, calibrated)
    with pytest.raises(ValueError, match="the header alone has"):
        encode_progressive(calibrated, gathered, bits_per_pixel=0.01)
    with pytest.raises(ValueError, match=r"this model reaches .* dB"):
        encode_progressive(calibrated, gathered, target_psnr=200, num_inference_steps=3)
    with pytest.raises(ValueError, match="pass one of"):
        encode_progressive(calibrated, gathered)


def test_a_model_without_a_calibration_is_measured_on_the_images(calibrated):
    plain = DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2"))
    data, sent = encode_progressive(plain, gather(IMAGES, plain), target_psnr=24, num_inference_steps=20)
    assert plain.scheduler.config.get("_calibration") is None
    for pipeline in (plain, calibrated):  # a calibration that is made later does not matter
        received = decode_progressive(pipeline, data)
        assert received.problem is None
        assert psnr(received) == pytest.approx(sent.points[-1].psnr, abs=0.01)


def test_another_model_or_calibration_is_refused(calibrated, file):
    torch.manual_seed(5)
    other = tiny_unet(1)
    with torch.no_grad():
        other.conv_in.weight += 0.01
    with pytest.raises(ValueError, match="pass that model, in that state"):
        decode_progressive(DDPMPipelineCustom(other, calibrated.scheduler), file[0])
    again = DDPMPipelineCustom(calibrated.unet, DDPMSchedulerCustom.from_config(calibrated.scheduler.config))
    calibrate(again, smooth_images(16, seed=3), show_progress=False)
    with pytest.raises(ValueError, match="calibration was changed"):
        decode_progressive(again, file[0])


@pytest.mark.slow
def test_the_commands_in_processes_of_their_own(calibrated, image_files, tmp_path):
    calibrated.save_pretrained(tmp_path / "model")

    def ddpm_hf(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "ddpm_hf", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out, page = tmp_path / "out.ddpm", tmp_path / "out.html"
    options = "--target_psnr", 24, "--steps", 20, "--report", page
    made = ddpm_hf("compress", tmp_path / "model", *image_files, "-o", out, *options)
    data = out.read_bytes()
    assert f"{len(data):,} bytes: {8 * len(data) / (12 * 64):.4f} bits/pixel, 2" in made
    assert "JPEG, without headers" in page.read_text("utf-8")

    whole = decode_progressive(calibrated, data)
    out.write_bytes(data[:-100])
    part = decode_progressive(calibrated, data[:-100])
    assert part.steps < whole.steps
    message = ddpm_hf("decompress", out, "-o", tmp_path / "part")
    assert (
        f"ends at byte {len(data) - 100} of {len(data)}: these are the images of its first {part.steps} of" in message
    )
    for file, (_, pixels) in zip(image_files, part.images, strict=True):
        assert np.abs(np.array(Image.open(tmp_path / "part" / file.name)).astype(int) - pixels[0]).max() <= 1


def test_in_python_a_cut_file_is_a_warning(calibrated, image_files):
    data = compress_progressive(calibrated, image_files, bits_per_pixel=6, num_inference_steps=20)
    whole = decompress(calibrated, data)
    with pytest.warns(UserWarning, match="ends at byte"):
        part = decompress(calibrated, data[:-80])
    assert len(whole) == len(part) == 12
    assert [image.size for image in part] == [(8, 8)] * 12
    assert any(a.tobytes() != b.tobytes() for a, b in zip(whole, part, strict=True))


def test_options_that_exclude_each_other_are_errors():
    for options, message in (
        ({"bits_per_pixel": 1.0, "target_psnr": 30.0}, "one of --bits_per_pixel and --target_psnr"),
        ({"target_psnr": 30.0, "variance_type": "learned"}, "--variance_type is for lossless files"),
        ({"report": "page.html"}, "--report is for files with loss"),
    ):
        with pytest.raises(ValueError, match=message):
            CompressConfig(**options)


def test_the_report_has_the_pictures_and_the_rates(calibrated):
    gathered, pictures = gather(IMAGES, calibrated), Pictures()
    _, sent = encode_progressive(calibrated, gathered, bits_per_pixel=7, num_inference_steps=20, shown=pictures)
    last = pictures.stages[-1].astype(float)
    assert psnr_of(np.square(last - IMAGES.numpy()).mean()) == pytest.approx(sent.points[-1].psnr)
    bound = bound_points(calibrated, gathered.pixels, 20, 8)
    page = report_page(sent, pictures, gathered.pixels, bound, "a<b.ddpm")
    assert "a&lt;b.ddpm" in page
    point = sent.points[-1]
    assert f"{point.bits / sent.pixels:.3f} bits/pixel, {point.psnr:.1f} dB, t = {point.t}" in page
    assert page.count('type="radio"') == page.count('class="view"') > 5
    assert "<script" not in page


# --- other formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_other_formats_are_rated_by_their_files(channels):
    pixels = smooth_images(5, channels, size=16).numpy()
    found = rate_formats(pixels)
    assert {"JPEG", "WebP"} <= set(found)
    image = Image.fromarray(pixels[0, 0] if channels == 1 else pixels[0].transpose(1, 2, 0))
    for name, rated in found.items():
        assert all(0 < r.contents < r.files for r in rated), name
        assert rated[0].psnr < rated[-1].psnr
        assert rated[0].sheet < rated[0].files
        assert min(r.contents for r in rated) < 1.5 < min(r.files for r in rated)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=97, optimize=True, subsampling="4:2:0")
    one = rate_formats(pixels[:1])["JPEG"][-1]
    assert one.files == one.sheet == 8 * len(stream.getvalue()) / 256
    assert one.contents == 8 * (len(stream.getvalue().split(b"\xff\xda")[-1]) - (8 if channels == 1 else 12) - 2) / 256


def test_the_rate_at_a_psnr_is_read_between_points_and_not_outside():
    points = [(1.0, 30.0), (2.0, 40.0), (1.5, 29.0)]  # the last one is no gain
    assert rate_at(35, points) == pytest.approx(1.5)
    assert rate_at(29, points) is None
    assert rate_at(41, points) is None
    assert rate_at(30, []) is None
