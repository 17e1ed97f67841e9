"""The networks that speed is measured on: of the digits, of a first model of one's own, and of the paper."""

from typing import Any

import torch
import yaml
from diffusers import UNet2DModel

from ddpm_hf.config.parsing import preset_file


def _of_preset(name: str, channels: int) -> dict[str, Any]:
    preset = yaml.safe_load(preset_file(name).read_text("utf-8"))
    return {
        **preset["unet"], "sample_size": preset["resolution"], "in_channels": channels, "out_channels": channels
    }  # fmt: skip


NETWORKS = {
    "tiny": _of_preset("digits", 1),  # 0.7 M parameters, 16×16
    "small": {**_of_preset("digits", 3), "block_out_channels": [32, 64, 128], "sample_size": 32},  # 2.7 M
    "paper": _of_preset("cifar10", 3),  # 35.7 M, 32×32
}


def build(name: str, **options: Any) -> UNet2DModel:
    """One of the networks with random weights, for inference."""
    torch.manual_seed(0)
    return UNet2DModel(**NETWORKS[name], **options).eval()
