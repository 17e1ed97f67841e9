"""Likelihood, calibration and the process itself on pretended devices."""

import pytest
import torch

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, bits_per_dim, calibrate
from ddpm_hf.diffusion.ddpm_process import DDPMProcess
from support.models import tiny_unet
from support.pretend_gpu import PretendGpu

IMAGES = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pipe(outputs=3, variance_type="fixed_small"):
    scheduler = DDPMSchedulerCustom(10, beta_schedule="squaredcos_cap_v2", variance_type=variance_type)
    return DDPMPipelineCustom(tiny_unet(out_channels=outputs), scheduler)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize(("outputs", "variance_type"), [(3, "fixed_small"), (6, "learned_range")])
def test_the_likelihood_is_that_of_a_cpu(kind, outputs, variance_type):
    expected = bits_per_dim(pipe(outputs, variance_type), IMAGES, show_progress=False)
    with PretendGpu(kind) as gpu:
        actual = bits_per_dim(pipe(outputs, variance_type).to(kind), IMAGES, show_progress=False)
    assert not gpu.unsafe
    torch.testing.assert_close(actual.terms, expected.terms, rtol=0 if kind == "cuda" else 1e-3, atol=0)
    assert actual.total == pytest.approx(expected.total, rel=1e-4)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_calibration_is_that_of_a_cpu(kind):
    expected = calibrate(pipe(), IMAGES, show_progress=False)
    with PretendGpu(kind) as gpu:
        actual = calibrate(pipe().to(kind), IMAGES, show_progress=False)
    assert not gpu.unsafe
    torch.testing.assert_close(actual.x_0_error, expected.x_0_error, rtol=1e-6, atol=0)


def test_timesteps_on_a_gpu_and_images_on_the_cpu_wait_for_their_coefficients():
    process, x_0 = DDPMProcess([0.1, 0.2, 0.3]), torch.ones(2, 3, 8, 8)
    expected = process.q_sample(x_0, torch.tensor([0, 1]), x_0)
    with PretendGpu() as gpu:
        actual = process.q_sample(x_0, torch.tensor([0, 1], device="cuda"), x_0)
    assert torch.equal(actual, expected)
    assert not gpu.unsafe


@pytest.mark.parametrize("measure", [bits_per_dim, calibrate])
def test_more_network_calls_are_no_more_waits(measure):
    """Values are read once for many network calls, which take all that they need through pinned memory."""
    waits = {}
    for steps in (5, 10):
        scheduler = DDPMSchedulerCustom(steps, beta_schedule="squaredcos_cap_v2")
        with PretendGpu() as gpu:
            on_gpu = DDPMPipelineCustom(tiny_unet(), scheduler).to("cuda")
            gpu.waits.clear()
            measure(on_gpu, IMAGES, show_progress=False)
        waits[steps] = gpu.waits
    assert waits[5] == waits[10]
    assert waits[5].total() < 10
