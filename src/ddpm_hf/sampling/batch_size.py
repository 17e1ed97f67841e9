"""How many images fit the memory of a device at once, and what to do where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import UNet2DModel

from ..diffusion.pipeline import image_size

# Peak memory of inference on one image, in feature maps of the first level: 22 to 25 were measured.
FEATURE_MAPS = 32
# More images per call make a CPU no faster, and a GPU little.
LARGEST = {"cpu": 64, "cuda": 256}


def fitting_batch_size(unet: UNet2DModel) -> int:
    """The largest power of two, up to 64 (256 on a GPU), of images that need at most half of the device's memory.

    Its total memory counts, not what is free, so that the same machine always samples the same images.
    """
    fitting = images_in_memory(unet)
    batch_size = LARGEST.get(unet.device.type, 64)
    while batch_size > max(fitting, 1):
        batch_size //= 2
    return batch_size


@contextmanager
def out_of_memory_explained(remedy: str) -> Iterator[None]:
    """Within this context, a device without memory left raises a MemoryError that ends with the remedy."""
    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        raise MemoryError(f"{str(error).splitlines()[0]} {remedy}") from error


def images_in_memory(unet: UNet2DModel) -> int:
    """How many images one call takes in half of the device's memory."""
    if unet.device.type == "cuda":
        memory = torch.cuda.get_device_properties(unet.device).total_memory
    else:
        memory = psutil.virtual_memory().total
    return memory // 2 // _bytes_per_image(unet)


def _bytes_per_image(unet: UNet2DModel) -> int:
    height, width = image_size(unet)
    return FEATURE_MAPS * height * width * unet.config.block_out_channels[0] * unet.dtype.itemsize
