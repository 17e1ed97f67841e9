"""Objects of deepinv, as they are. It is in no extra of ours: its torchvision has to be of the same build as torch."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_hf.restoration.operators import DeepInverse
from ddpm_hf.restoration.restore import restore
from support.oracle import oracle_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (3, 8, 8)


class Differences:
    """What a linear physics of deepinv offers; a map that makes nothing of constants."""

    def A(self, x):
        return x[..., ::2] - x[..., 1::2]

    def A_adjoint(self, y):
        return torch.stack([y, -y], dim=-1).flatten(-2)


def real_physics():
    """deepinv's own, by name."""
    try:
        import deepinv
    except (ImportError, RuntimeError) as error:  # a torchvision of another build raises the latter
        pytest.skip(f"deepinv can't be imported: {error}")
    physics, mask = deepinv.physics, torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.5
    kernel = torch.tensor([[1.0, 2.0, 1.0]]).T @ torch.tensor([[1.0, 2.0, 1.0]]) / 16
    return {
        "Inpainting": physics.Inpainting(SHAPE, mask=mask.float()),
        "BlurFFT": physics.BlurFFT(SHAPE, filter=kernel[None, None]),
        "Downsampling": physics.Downsampling(SHAPE, filter="bicubic", factor=2, padding="circular"),
        "Decolorize": physics.Decolorize(),
        "CompressedSensing": physics.CompressedSensing(m=60, img_size=SHAPE, rng=torch.Generator().manual_seed(0)),
    }


@pytest.mark.parametrize(
    "name", ["Differences", "Inpainting", "BlurFFT", "Downsampling", "Decolorize", "CompressedSensing"]
)
def test_a_physics_is_restored_from_as_it_is(make_unet, name):
    physics = Differences() if name == "Differences" else real_physics()[name]
    linear = DeepInverse(physics).bind(SHAPE)
    x, y = torch.randn(2, *SHAPE), torch.randn(2, *linear.measurement_shape)
    torch.testing.assert_close((linear(x) * y).sum(), (x * linear.adjoint(y)).sum(), rtol=1e-4, atol=1e-4)

    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    measurement = physics.A(torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(5)))
    images = restore(pipe, measurement, physics, num_inference_steps=4).images
    assert (physics.A(images) - measurement).abs().max() <= 1 / 255


def test_what_is_no_linear_physics_is_named():
    class Rectified(Differences):
        def A(self, x):
            return super().A(x).relu()

    class Unrelated(Differences):
        def A_adjoint(self, y):
            return torch.stack([y, y], dim=-1).flatten(-2)

    for physics, message in (
        (Rectified(), "Rectified is not linear: .*method='dps'"),
        (Unrelated(), "not the adjoint"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(oracle_pipeline(0.3), torch.rand(1, 1, 8, 4), physics)
