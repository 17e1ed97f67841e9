"""Small models, extractors and images to evaluate, and the figures that were found."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom

QUICK = [
    "--dataset", "digits", "--num_images", "24", "--steps", "3", "--batch_size", "8", "--num_likelihood_images", "20",
]  # fmt: skip


def save_extractor(folder):
    """The folder of a small vision model with random weights: eight features of 32×32 images."""
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")).save_pretrained(
        folder
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_model(unet, folder):
    DDPMPipelineCustom(unet, DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


def save_noise(folder, count, seed):
    """A folder of 8×8 images that have nothing in common."""
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (count, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def figures(folder):
    return json.loads((folder / "metrics.json").read_text("utf-8"))["figures"]
