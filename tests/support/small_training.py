"""A network that is trained well enough to be examined: tinted digits of 8×8, in less than a minute on one core."""

import copy

import numpy as np
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.data.pixels import normalize

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "linspace"}
TINT = np.array([1.0, 0.7, 0.35])  # red is strongest


def tinted_digits():
    """uint8 of shape (1797, 8, 8, 3)."""
    gray = load_digits().images / 16
    return np.rint(gray[..., None] * TINT * 255).astype(np.uint8)


def train_small(shift=0.0, scale=1.0, updates=450):
    """A network of 208,000 parameters and its average over the last updates, trained on scale · x_0 + shift."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(24, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )  # fmt: skip
    average = copy.deepcopy(unet)
    pixels = torch.from_numpy(tinted_digits()).permute(0, 3, 1, 2)
    data = normalize(pixels) * scale + shift
    process = DDPMSchedulerCustom(**COSINE).process
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), fused=True)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, update / 50, 2 * (1 - update / updates))
        x_0 = data[torch.randint(len(data), (32,))]
        noise, t = torch.randn_like(x_0), torch.randint(1000, (32,))
        loss = (unet(process.q_sample(x_0, t, noise), t).sample - process.velocity(x_0, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 / min(update + 1, 50))
    return unet.eval(), average.eval()
