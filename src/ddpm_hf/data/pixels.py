"""Stored pixels and images in [-1, 1]: the only place that converts one into the other. And flips of such images."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS_PER_UNIT = 127.5  # of the 256 levels of uint8: 255 of them span [-1, 1]


def check_pixels(images: Tensor) -> None:
    """Raise a ValueError unless images are uint8 of shape (N, C, H, W), and at least one."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        found = f"{images.dtype} of {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"`images` are {found}, but must be a uint8 tensor of shape (N, C, H, W), N at least 1.")


def normalize(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] or uint16 in [0, 65535] → float32 in [-1, 1] (Section 3.3), on the same device."""
    return pixels.float() / (torch.iinfo(pixels.dtype).max / 2) - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → uint8, rounded to the nearest of the 256 levels."""
    return ((images.float().clamp(-1, 1) + 1) * LEVELS_PER_UNIT).round().to(torch.uint8)


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image (B, C, H, W) with probability 1/2, drawn from the global generator of its device."""
    flipped = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(flipped[:, None, None, None], x.flip(-1), x)
