"""Our scheduler inside other pipelines of diffusers does what stock's DDPM scheduler does there."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from ddpm_hf import DDPMSchedulerCustom

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
CALLS = {
    "text to image": (StableDiffusionPipeline, {"height": 16, "width": 16}),
    "image to image": (StableDiffusionImg2ImgPipeline, {"image": IMAGE, "strength": 0.8}),
    "inpainting": (
        StableDiffusionInpaintPipeline,
        {"image": IMAGE, "mask_image": (IMAGE[:, :1] > 0.5).float(), "height": 16, "width": 16, "strength": 0.9},
    ),
}


def run(pipeline_type, scheduler, **options):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = pipeline_type(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=torch.zeros_like(prompt), num_inference_steps=10,
        generator=torch.Generator().manual_seed(0), output_type="latent", **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_latents_are_those_of_the_stock_scheduler(name):
    pipeline_type, options = CALLS[name]
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    ours = run(pipeline_type, DDPMSchedulerCustom(**config), **options)
    stock = run(pipeline_type, DDPMScheduler(**config), **options)
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=1e-3)
