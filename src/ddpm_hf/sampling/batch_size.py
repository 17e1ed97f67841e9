"""How many images a network takes at once."""

from __future__ import annotations

import psutil
import torch
from diffusers import UNet2DModel

from ..diffusion.pipeline import image_size

# What inference on one image holds at its peak, in feature maps of the first level: 22 to 25 in what was measured.
FEATURE_MAPS = 32
# More images per call make a CPU no faster, and a GPU little.
LARGEST = {"cpu": 64, "cuda": 256}


def fitting_batch_size(unet: UNet2DModel) -> int:
    """The largest power of two of images, up to 64 (256 on a GPU), that needs half of the device's memory at most.

    Of all of its memory, not of what is free: the same machine gives the same answer, and so the same images.
    """
    if unet.device.type == "cuda":
        memory = torch.cuda.get_device_properties(unet.device).total_memory
    else:
        memory = psutil.virtual_memory().total
    fitting = memory // 2 // _bytes_per_image(unet)
    batch_size = LARGEST.get(unet.device.type, 64)
    while batch_size > max(fitting, 1):
        batch_size //= 2
    return batch_size


def _bytes_per_image(unet: UNet2DModel) -> int:
    height, width = image_size(unet)
    return FEATURE_MAPS * height * width * unet.config.block_out_channels[0] * unet.dtype.itemsize
