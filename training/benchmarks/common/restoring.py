"""Restoration by other people's code, with the same network: diffusers' RePaint, deepinv's DDRM and DiffPIR.

All are functions of (pipe, y, problem) and return images in [0, 1]; `problem` says what was measured. A function that
does not serve a problem returns None.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import RePaintPipeline, RePaintScheduler
from torch import Tensor, nn

from ddpm_hf import Blur, DDPMPipelineCustom, Downsample, Grayscale, Inpaint


@dataclass(frozen=True)
class Problem:
    """What was measured of images in [0, 1]."""

    operator: Any
    noise_std: float


class EpsNetwork(nn.Module):
    """A network of any prediction as diffusers' RePaint expects it: one of ε."""

    def __init__(self, pipe: DDPMPipelineCustom) -> None:
        super().__init__()
        self.pipe, self.unet, self.dtype, self.device = pipe, pipe.unet, pipe.unet.dtype, pipe.unet.device

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        """ε̂."""
        process, kind = self.pipe.scheduler.process, self.pipe.scheduler.config.prediction_type
        output = self.unet(x, t).sample
        return SimpleNamespace(sample=process.predict_eps(output, x, int(t), kind).to(x.dtype))


def diffusers_repaint(pipe: DDPMPipelineCustom, y: Tensor, problem: Problem, steps: int) -> Tensor | None:
    """RePaint as diffusers has it, with its defaults of jumps (Lugmayr et al. 2022)."""
    if not isinstance(problem.operator, Inpaint) or problem.noise_std:
        return None
    config = pipe.scheduler.config
    scheduler = RePaintScheduler(
        num_train_timesteps=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end,
        beta_schedule=config.beta_schedule, clip_sample=True,
    )  # fmt: skip
    other = RePaintPipeline(EpsNetwork(pipe), scheduler)
    other.set_progress_bar_config(disable=True)
    mask = problem.operator.mask.float().expand(len(y), 1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    images = other(2 * y - 1, mask, steps, eta=1.0, generator=generator, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def deepinv_denoiser(pipe: DDPMPipelineCustom) -> Any:
    """E[x | x + σ n] for images in [0, 1]: the network at the timestep whose noise is nearest to σ."""
    import deepinv

    process = pipe.scheduler.process
    levels = ((1 - process.alphas_cumprod) / process.alphas_cumprod).sqrt() / 2

    class OfPipeline(deepinv.models.Denoiser):
        def forward(self, x: Tensor, sigma: Any, **kwargs: object) -> Tensor:
            level = float(torch.as_tensor(sigma).reshape(-1)[0])
            t = int((levels - level).abs().argmin())
            x_t = (2 * x - 1) * float(process.alpha_bar(t)) ** 0.5
            output = pipe.unet(x_t.float(), t).sample
            return (pipe.scheduler.predict_x_0(output, x_t.float(), t) / 2 + 0.5).to(x.dtype)

    return OfPipeline()


def physics_of(problem: Problem, shape: tuple[int, ...]) -> Any:
    """The operator as deepinv has it, with its singular values where it knows them."""
    import deepinv

    operator, noise = problem.operator, deepinv.physics.GaussianNoise(problem.noise_std)
    if isinstance(operator, Inpaint):
        return deepinv.physics.Inpainting(shape, mask=operator.mask[0].float().expand(shape), noise_model=noise)
    if isinstance(operator, Blur):
        kernel = operator.kernel[None, None].float()
        return deepinv.physics.BlurFFT(shape, filter=kernel, noise_model=noise)
    linear = operator.bind(shape)
    return deepinv.physics.LinearPhysics(
        A=lambda x, **_: linear(x.float()).to(x.dtype), A_adjoint=lambda v, **_: linear.adjoint(v.float()).to(v.dtype),
        noise_model=noise, max_iter=50,
    )  # fmt: skip


def deepinv_ddrm(pipe: DDPMPipelineCustom, y: Tensor, problem: Problem, steps: int) -> Tensor | None:
    """DDRM (Kawar et al. 2022), which needs singular values."""
    import deepinv

    if isinstance(problem.operator, (Downsample, Grayscale)):
        return None
    shape = tuple(pipe.unet.config.in_channels if i == 0 else pipe.unet.config.sample_size for i in range(3))
    model = deepinv.sampling.DDRM(deepinv_denoiser(pipe), sigmas=np.linspace(1, 0, steps))
    return model(y, physics_of(problem, shape), seed=1).clamp(0, 1)


def deepinv_diffpir(pipe: DDPMPipelineCustom, y: Tensor, problem: Problem, steps: int) -> Tensor:
    """DiffPIR (Zhu et al. 2023) with its defaults."""
    import deepinv

    shape = tuple(pipe.unet.config.in_channels if i == 0 else pipe.unet.config.sample_size for i in range(3))
    physics = physics_of(Problem(problem.operator, max(problem.noise_std, 1e-3)), shape)
    fidelity = deepinv.optim.data_fidelity.L2()
    model = deepinv.sampling.DiffPIR(
        deepinv_denoiser(pipe), fidelity, sigma=max(problem.noise_std, 1e-3), max_iter=steps
    )
    return model(y, physics, seed=1).clamp(0, 1)
