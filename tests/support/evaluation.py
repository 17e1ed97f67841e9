"""Small models, extractors and images to evaluate, and the stored results."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_repository import EVALUATION_FILES
from ddpm_hf.evaluation.results import RESULTS_FILE, Result, Settings, write_results
from ddpm_hf.storage.weights import hash_weights
from support.models import png

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


def save_evaluation(folder, *results):
    """What an evaluation of the model in a folder leaves: `metrics.json`, and every plot that there may be.

    Args:
        results: (metric, changes to its settings).
    """
    data = {"name": "digits", "hub_id": None, "split": "train"}
    chain = {
        "weights": hash_weights(DDPMPipelineCustom.from_pretrained(folder).unet), "num_inference_steps": 20,
        "num_train_timesteps": 20, "timesteps": "linspace", "dtype": "float32",
    }  # fmt: skip
    write_results(
        folder / RESULTS_FILE,
        [Result(metric, 1.0, 10, settings=Settings(data, chain, 10, **settings)) for metric, settings in results],
    )
    for name in EVALUATION_FILES[1:]:
        (folder / name).write_bytes(png() if name.endswith(".png") else b"{}")
    return folder


def stored_results(folder):
    """The results in `metrics.json`, as JSON."""
    return json.loads((folder / "metrics.json").read_text("utf-8"))["figures"]
