"""Edit, vary, invert and interpolate: exact inverses, what is kept, and what bad input gets."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_hf.restoration.edit import edit, interpolate, inversion_timesteps, invert, slerp, variations
from support.oracle import OracleUNet, oracle_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def stock(make_unet):
    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(count, seed=0, channels=3):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [5, 50])
def test_inversion_of_a_linear_network_is_exact(steps):
    pipe = oracle_pipeline(0.3)
    pipe.unet.double()
    pipe.unet.slope = pipe.unet.slope.double()
    x_0 = images(3, channels=1).double()
    x_T = invert(pipe, x_0, num_inference_steps=steps)
    timesteps = inversion_timesteps(pipe, steps)
    back = pipe(3, latents=x_T, timesteps=timesteps, eta=0.0, output_type="latent").images
    assert (back / 2 + 0.5 - x_0).abs().max() < 1e-6


def test_edit_keeps_more_of_the_image_the_weaker_it_is(stock):
    x_0 = images(2)
    distances = [
        float((edit(stock, x_0, s, generator=torch.Generator().manual_seed(0)).images - x_0).abs().mean())
        for s in (0.02, 0.2, 0.9)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.05


@pytest.mark.parametrize(("strength", "calls"), [(0.1, 5), (0.5, 25), (1.0, 50)])
def test_edit_calls_the_network_for_its_part_of_the_chain(stock, strength, calls):
    made = []
    stock.unet.register_forward_hook(lambda *_: made.append(1))
    edit(stock, images(1), strength, num_inference_steps=50)
    assert len(made) == calls


def test_variations_share_less_the_later_their_x_t(stock):
    spread = [
        float(variations(stock, images(1), t, 6, generator=torch.Generator().manual_seed(0)).images.std(0).mean())
        for t in (5, 300, 900)
    ]
    assert spread == sorted(spread)
    assert spread[0] < 0.02


def test_interpolation_goes_from_one_image_to_the_other():
    pipe = oracle_pipeline(0.3)
    a, b = images(1, 0, 1), images(1, 1, 1)
    seed = torch.Generator().manual_seed(0)
    strip = interpolate(pipe, a, b, (0, 0.5, 1), timestep=20, generator=seed, output_type="latent").images / 2 + 0.5
    assert strip.shape == (3, 1, 8, 8)
    assert (strip[0] - a[0]).abs().mean() < (strip[0] - b[0]).abs().mean() / 3
    assert (strip[2] - b[0]).abs().mean() < (strip[2] - a[0]).abs().mean() / 3
    # All have the same noise and the network is linear: the middle is the mean of the ends.
    torch.testing.assert_close(strip[1], (strip[0] + strip[2]) / 2, atol=1e-4, rtol=0)


def test_interpolation_between_inverted_images_has_the_images_at_its_ends():
    pipe = oracle_pipeline(0.3)
    a, b = images(1, 0, 1), images(1, 1, 1)
    strip = interpolate(pipe, a, b, weights=(0, 0.5, 1)).images
    assert (strip[0] - a[0]).abs().max() < 1e-3
    assert (strip[2] - b[0]).abs().max() < 1e-3


def test_a_point_between_two_noises_is_as_long_as_noise_is():
    a, b = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    lengths = slerp(a, b, [0, 0.3, 0.5, 1]).flatten(1).norm(dim=1) / 3072**0.5
    assert (lengths - 1).abs().max() < 0.05
    torch.testing.assert_close(slerp(a, a, [0.5]), a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: edit(p, images(1), 0.0), r"`strength` is 0.0, but must be a number in \(0, 1\]"),
        (lambda p: edit(p, images(1) * 255, 0.5), r"must lie in \[0, 1\]: divide 8-bit images by 255"),
        (
            lambda p: edit(p, images(1, channels=1), 0.5),
            r"`image` has shape \(1, 1, 8, 8\), but must be",
        ),
        (lambda p: edit(p, images(1), 0.5, num_inference_steps=0), "`num_inference_steps` is 0"),
        (lambda p: variations(p, images(2), 10), "`image` holds 2 images, but must be one"),
        (lambda p: variations(p, images(1), 1000), "`timestep` is 1000, but must be an integer from 0 to 999"),
        (lambda p: interpolate(p, images(1), images(1), [1.5]), r"`weights` is 1.5, but must be numbers in \[0, 1\]"),
        (lambda p: invert(p, images(1).to(torch.uint8)), "must be a floating-point tensor"),
    ],
)
def test_bad_input_is_named_before_the_network_is_called(stock, call, message):
    stock.unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        call(stock)


class TwoImages(OracleUNet):
    """E[ε | x_t] for data around one of two images: a decision, which magnifies what an inversion leaves over."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        alpha_bar = self.alpha_bar[int(timestep)]
        variance = alpha_bar * 0.01 + 1 - alpha_bar
        centres = torch.stack([self.image, -self.image]).to(sample.dtype) * alpha_bar**0.5
        far = (sample[:, None] - centres[None]).flatten(2)
        share = torch.softmax(-far.square().sum(2) / (2 * variance), 1)
        score = -(share[..., None] * far).sum(1).reshape(sample.shape) / variance
        return (-((1 - alpha_bar) ** 0.5) * score,)


def test_inversion_of_own_samples_is_exact_where_sampling_magnifies_errors():
    pipe = oracle_pipeline(0.3, clip_sample=True)
    pipe.unet.__class__ = TwoImages
    pipe.unet.image, pipe.unet.alpha_bar = 1.6 * images(1, 3, 1)[0] - 0.8, pipe.scheduler.process.alphas_cumprod.float()
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    timesteps = inversion_timesteps(pipe, 50)
    seeds = [torch.Generator().manual_seed(i) for i in range(32)]
    samples = pipe(32, seeds, timesteps=timesteps, eta=0.0, output_type="pt").images
    calls.clear()
    x_T = invert(pipe, samples, num_inference_steps=50)
    assert len(calls) <= 250
    back = pipe(32, latents=x_T, timesteps=timesteps, eta=0.0, output_type="pt").images
    psnr = -10 * torch.log10((back - samples).square().flatten(1).mean(1).clamp(min=1e-12))
    assert psnr.min() >= 60
