"""Round trips: what comes out is what went in, or an error that says why not."""

import copy
import hashlib
import itertools

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, compress, decompress
from ddpm_hf.codec.compress import encode, gather
from ddpm_hf.codec.container import Section, pack, unpack
from ddpm_hf.codec.measuring import with_calibration
from ddpm_hf.diffusion.ddpm_few_steps import Calibration, fingerprint, step_costs
from support.codec import smooth_images
from support.models import tiny_unet
from support.oracle import calibrated_scheduler, gaussian_images, oracle_pipeline


def as_tensor(images):
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def calibrated(pipeline, scale=1.0):
    """A copy of a pipeline with a made-up calibration."""
    pipe = DDPMPipelineCustom(pipeline.unet, DDPMSchedulerCustom.from_config(pipeline.scheduler.config))
    process = pipe.scheduler.process
    error = scale * 0.1 * (1 - process.alphas_cumprod)
    pipe.scheduler.set_calibration(
        Calibration(error, error, error, error, 16, fingerprint(process, pipe.scheduler.config))
    )
    return pipe


@pytest.fixture(scope="module")
def images():
    return smooth_images(21)


@pytest.fixture(scope="module")
def data(pipeline, images):
    return compress(pipeline, images, num_inference_steps=5, batch_size=4, model_name="tiny")


def test_images_come_back_bit_by_bit(pipeline, images, data):
    assert torch.equal(as_tensor(decompress(pipeline, data)), images[:, 0])


def test_equal_images_and_options_give_equal_bytes(pipeline, images, data):
    assert compress(pipeline, images, num_inference_steps=5, batch_size=4, model_name="tiny") == data


def test_batches_grow_as_the_bits_on_the_stack_allow(pipeline):
    result = encode(pipeline, gather(smooth_images(60), pipeline), num_inference_steps=3, batch_size=16)
    batches = unpack(result.data).header["batches"]
    assert sum(batches) == result.report.coded == 60 - result.report.opening
    assert batches[0] < 16 == max(batches)
    assert set(batches) <= {1, 2, 4, 8, 16}


def test_a_few_images_are_not_larger_than_their_png(pipeline):
    """There is nothing for the first latents to borrow from: the images are stored in PNG or WebP."""
    image = smooth_images(1)
    result = encode(pipeline, gather(image, pipeline))
    assert (result.report.coded, result.report.opening) == (0, 1)
    assert "bits/dim" in "\n".join(result.report.lines())
    assert torch.equal(as_tensor(decompress(pipeline, result.data)), image[:, 0])


@pytest.mark.parametrize(
    ("channels", "network", "scheduler"),
    [
        (3, {}, {}),
        (1, {"out_channels": 2}, {"variance_type": "learned_range"}),
        (1, {"out_channels": 2}, {"variance_type": "learned"}),
        (1, {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        (1, {}, {"prediction_type": "sample", "clip_sample": False}),
        (3, {}, {"thresholding": True, "clip_sample": False}),
        (1, {"num_class_embeds": 3}, {"variance_type": "fixed_large"}),
    ],
)
def test_every_kind_of_model_compresses(channels, network, scheduler):
    config = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", **scheduler}
    pipe = DDPMPipelineCustom(tiny_unet(channels, **network), DDPMSchedulerCustom(**config))
    images = smooth_images(14, channels)
    label = {"class_label": 2} if "num_class_embeds" in network else {}
    result = encode(pipe, gather(images, pipe), num_inference_steps=4, batch_size=4, **label)
    assert result.report.coded > 3
    expected = images[:, 0] if channels == 1 else images.permute(0, 2, 3, 1)
    assert torch.equal(as_tensor(decompress(pipe, result.data)), expected)


@pytest.mark.parametrize("timesteps", [[19], [7], [12, 3], "trailing"])
def test_every_trajectory_compresses(pipeline, images, timesteps):
    K = 6 if isinstance(timesteps, str) else None
    data = compress(pipeline, images, timesteps=timesteps, num_inference_steps=K)
    assert torch.equal(as_tensor(decompress(pipeline, data)), images[:, 0])


def test_any_noise_comes_back(pipeline):
    """Images that no model expects: white noise, black, white, one bright pixel."""
    g = torch.Generator().manual_seed(0)
    odd = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    odd[1] = 255
    odd[2, 0, 3, 3] = 255
    images = torch.cat([torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=g), odd])
    data = compress(pipeline, images, num_inference_steps=6)
    assert torch.equal(as_tensor(decompress(pipeline, data)), images[:, 0])


def test_images_of_pillow_come_back_with_their_modes(pipeline):
    images = [Image.fromarray(np.asarray(x[0])) for x in smooth_images(9)]
    images[3] = images[3].convert("1")
    again = decompress(pipeline, compress(pipeline, images, num_inference_steps=3))
    assert [image.mode for image in again] == ["L"] * 3 + ["1"] + ["L"] * 5
    for before, after in zip(images, again, strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_larger_and_smaller_images_are_cut_into_tiles_and_come_back(pipeline):
    sizes = [(20, 9), (8, 8), (3, 17)]
    images = [Image.fromarray(np.asarray(smooth_images(1, 1, 20, i)[0, 0])).resize(s) for i, s in enumerate(sizes)]
    with pytest.raises(ValueError, match=r"00000.png' has 20 × 9 pixels, but the model needs 8 × 8: .*--tile"):
        compress(pipeline, images)
    data = compress(pipeline, images, tile=True, num_inference_steps=3)
    assert sum(unpack(data).header["batches"]) > 2
    for before, after in zip(images, decompress(pipeline, data), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "no images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "3 channels, but the model has 1"),
        (torch.zeros(2, 1, 8, 8), "uint8"),
        ([Image.new("RGB", (8, 8))], "image 0 has mode 'RGB'"),
        (["missing.png"], "missing.png"),
    ],
)
def test_what_the_model_cannot_hold_is_refused(pipeline, images, says):
    with pytest.raises(ValueError, match=says):
        compress(pipeline, images)


def test_a_model_without_calibration_is_measured_on_the_images():
    """Errors and steps are about those of the best network; and the model's own scheduler stays as it is."""
    c, config = 0.05, {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
    pipe = oracle_pipeline(c, **config)
    measured = with_calibration(pipe, gaussian_images(c, 100).numpy(), None).scheduler
    exact = calibrated_scheduler(c, **config)
    # 32 images of 64 pixels know a mean square to 3 %.
    torch.testing.assert_close(measured.calibration.x_0_error, exact.calibration.x_0_error, rtol=0.12, atol=0)
    costs = step_costs(exact.process, exact.calibration.x_0_error)
    cost = [
        sum(float(costs[t, s]) for t, s in itertools.pairwise(scheduler.optimal_timesteps(8)))
        for scheduler in (measured, exact)
    ]
    assert cost[0] == pytest.approx(cost[1], rel=0.01)
    assert "_calibration" not in pipe.scheduler.config
    calibrated = DDPMPipelineCustom(pipe.unet, measured)
    assert with_calibration(calibrated, gaussian_images(c, 4).numpy(), None) is calibrated


# --- another model, another machine ----------------------------------------------------------------------------------


def test_another_model_is_refused(data):
    other = DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2"))
    with torch.no_grad():
        next(other.unet.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=r"made with the model 'tiny' of weights .* this one has .*: pass that model"):
        decompress(other, data)


@pytest.mark.parametrize("change", [{"beta_schedule": "laplace"}, {"prediction_type": "sample"}])
def test_another_schedule_is_refused(pipeline, data, change):
    scheduler = DDPMSchedulerCustom.from_config(pipeline.scheduler.config, **change)
    with pytest.raises(ValueError, match="schedule of betas, `prediction_type`"):
        decompress(DDPMPipelineCustom(pipeline.unet, scheduler), data)


def test_a_model_that_was_calibrated_again_still_reads_its_files(pipeline, images):
    data = compress(calibrated(pipeline), images, num_inference_steps=5)
    assert unpack(data).header["chain"]["variance"] == "optimal"
    for other in (calibrated(pipeline, scale=1.7), pipeline):
        assert torch.equal(as_tensor(decompress(other, data)), images[:, 0])


def test_other_arithmetic_is_refused_before_any_image_is_decoded(pipeline, data):
    """PyTorch's own convolutions instead of oneDNN's: sums of another order."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this PyTorch")
    says = "are not those of the machine that made the file.* oneDNN is 'False' here and 'True' in the file"
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(ValueError, match=says):
        decompress(pipeline, data)


def test_the_number_of_threads_does_not_matter_and_is_restored(pipeline, images, data):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(as_tensor(decompress(pipeline, data)), images[:, 0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


class Unsteady(UNet2DModel):
    """A network with a sum that comes out otherwise in one call of many."""

    calls, odd_calls = 0, ()

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls += 1
        (output,) = super().forward(sample, timestep, class_labels, return_dict=False)
        return (output * (1.001 if self.calls in self.odd_calls else 1),)


def test_a_sum_that_came_out_otherwise_once_spoils_nothing(pipeline):
    """Neither when a file is made nor when it is read: each batch is tried again."""
    unet = Unsteady.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    pipe, images = DDPMPipelineCustom(unet, pipeline.scheduler), smooth_images(21)
    steady = compress(pipeline, images, timesteps="linspace", num_inference_steps=5, variance_type="fixed_large")
    probes = len(set(unpack(steady).header["batches"]))
    unet.odd_calls = (60, 63)
    data = compress(pipe, images, timesteps="linspace", num_inference_steps=5, variance_type="fixed_large")
    assert data == steady
    unet.calls, unet.odd_calls = 0, (probes + 7,)
    assert torch.equal(as_tensor(decompress(pipe, data)), images[:, 0])
    unet.calls, unet.odd_calls = 0, range(probes + 1, 1000)
    with pytest.raises(ValueError, match="are not those that were compressed"):
        decompress(pipe, data)


def test_the_network_is_left_in_its_mode(pipeline, images):
    pipeline.unet.train()
    try:
        compress(pipeline, images[:4], num_inference_steps=2)
        assert pipeline.unet.training
    finally:
        pipeline.unet.eval()


# --- damage and malice ------------------------------------------------------------------------------------------------


def test_truncation_at_every_tenth_byte_is_an_error(pipeline, data):
    for length in range(0, len(data), 10):
        with pytest.raises(ValueError, match="ends at byte|is empty|starts with"):
            decompress(pipeline, data[:length])


def test_a_flipped_bit_anywhere_is_an_error(pipeline, data):
    for bit in range(0, 8 * len(data), 13):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="damaged|starts with|version|ends at byte"):
            decompress(pipeline, bytes(damaged))


def rewritten(data, payload=None, **changes):
    """A file with other contents, and checksums that fit them."""
    contents = unpack(data)
    sections = contents.sections if payload is None else [Section(b"DATA", payload)]
    return pack({**copy.deepcopy(contents.header), **changes}, sections)


def test_a_forged_payload_is_no_wrong_picture(pipeline, data):
    payload = b"".join(section.content for section in unpack(data).sections)
    for place in range(1, len(payload), 797):
        forged = bytearray(payload)
        forged[place] ^= 4
        with pytest.raises(ValueError, match="are not those that were compressed"):
            decompress(pipeline, rewritten(data, bytes(forged)))
    for short in (payload[: len(payload) // 8 * 4], payload[:4], payload[:3], b"", b"\0" * 8):
        with pytest.raises(ValueError, match="are not those|don't belong together"):
            decompress(pipeline, rewritten(data, short))


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "other"}, {"codec": None}, {"shape": [1, 8]}, {"shape": [1, 8, 16]}, {"shape": "abc"},
        {"batches": [10**9]}, {"batches": 3}, {"batches": [1.5]}, {"batches": []}, {"batches": [True]},
        {"checks": None}, {"checks": [0]},
        {"opening": [0, 5]}, {"opening": [1]}, {"opening": [1, 10**12]}, {"images": None}, {"images": []},
        {"model": None}, {"model": []}, {"model": {"weights": 3}}, {"chain": None}, {"arithmetic": None},
        {"arithmetic": {}}, {"coder": None}, {"coder": {"probe": "0", "constriction": "9"}},
        {"sha256": "00"}, {"sha256": None},
    ],
)  # fmt: skip
def test_a_forged_header_is_an_error(pipeline, data, change):
    with pytest.raises(ValueError, match="file"):
        decompress(pipeline, rewritten(data, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": None}, {"timesteps": []}, {"timesteps": [3, 4]}, {"timesteps": [50]}, {"timesteps": ["a"]},
        {"variance": "none"}, {"variance": 3}, {"variance": "learned"}, {"variance": "fixed_small"}, {"errors": [1]},
        {"bins": 0}, {"bins": 10**9}, {"bins": None}, {"table": "0"},
    ],
)  # fmt: skip
def test_a_forged_chain_is_an_error(pipeline, data, change):
    chain = unpack(data).header["chain"]
    with pytest.raises(ValueError, match="file|timesteps|variance"):
        decompress(pipeline, rewritten(data, chain=chain | change))


def test_the_header_is_small(data):
    header = len(data) - sum(len(section.content) for section in unpack(data).sections)
    assert header < 850
    assert hashlib.sha256().digest_size * 2 == len(unpack(data).header["sha256"])
