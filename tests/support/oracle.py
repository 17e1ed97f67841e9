"""A network that is right: the optimal prediction for independent pixels x_0 ~ N(0, c), in closed form."""

import warnings

import torch
from diffusers import UNet2DModel

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_few_steps import Calibration, fingerprint


class OracleUNet(UNet2DModel):
    """A UNet2DModel whose forward pass is E[target | x_t] for x_0 ~ N(0, c), plus a constant raw variance."""

    def answer_for(self, process, prediction_type, c, raw_variance=None):
        alpha_bar = process.alphas_cumprod
        noise = 1 - alpha_bar
        slope = {
            "epsilon": noise.sqrt(),
            "sample": c * alpha_bar.sqrt(),
            "v_prediction": (1 - c) * (alpha_bar * noise).sqrt(),
        }[prediction_type]
        self.slope, self.raw_variance = (slope / (c * alpha_bar + noise)).float(), raw_variance
        return self

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        t = torch.as_tensor(timestep).expand(len(sample))
        output = self.slope[t].reshape(-1, 1, 1, 1) * sample
        if self.raw_variance is not None:
            output = torch.cat([output, torch.full_like(output, self.raw_variance)], dim=1)
        return (output,)


def oracle_pipeline(c, size=8, channels=1, raw_variance=None, **config):
    """A pipeline around the oracle; clipping is off by default, as Gaussian data has no range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = DDPMSchedulerCustom(**{"clip_sample": False, **config})
    unet = OracleUNet(
        sample_size=size,
        in_channels=channels,
        out_channels=channels * (1 if raw_variance is None else 2),
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).answer_for(scheduler.process, scheduler.config.prediction_type, c, raw_variance)
    pipe = DDPMPipelineCustom(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_images(c, number, size=8, channels=1, seed=0):
    """uint8 images whose pixels are N(0, c) in [-1, 1], rounded to the 256 levels."""
    x_0 = c**0.5 * torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def exact_x_0_error(process, c):
    """e_t = Var(x_0 | x_t) for x_0 ~ N(0, c), float64 of shape (T,)."""
    noise = 1 - process.alphas_cumprod
    return c * noise / (c * process.alphas_cumprod + noise)


def calibrated_scheduler(c, **config):
    """A scheduler with the exact calibration of x_0 ~ N(0, c)."""
    scheduler = oracle_pipeline(c, **config).scheduler
    error = exact_x_0_error(scheduler.process, c)
    zeros = torch.zeros_like(error)
    second_moment = (1 - scheduler.alphas_cumprod) / (c * scheduler.alphas_cumprod + 1 - scheduler.alphas_cumprod)
    scheduler.set_calibration(
        Calibration(error, zeros, second_moment, zeros, 100, fingerprint(scheduler.process, scheduler.config))
    )
    return scheduler
