"""Networks small enough for tests."""

import io

import torch
from diffusers import UNet2DModel
from PIL import Image


def tiny_unet(channels: int = 3, out_channels: int | None = None, sample_size: int = 8, **options) -> UNet2DModel:
    """A real network of two levels and about 9,000 parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=out_channels or channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def png(shade: int = 0) -> bytes:
    """A small picture in PNG."""
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "PNG")
    return file.getvalue()
